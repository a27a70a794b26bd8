"""The measurements of `kvpo bench`: one group in two schedules, an update, and a stream.

Every phase waits for the device, and is warm: the first pass of each kind is made before.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch

from kvpo.bench.one_by_one import one_by_one
from kvpo.bench.sizes import Load, embeddings_of, new_parts, script_of, settings_of
from kvpo.bench.work import decoding, matmul_rate, operations, watched
from kvpo.common.environment import environment
from kvpo.common.rng import normal
from kvpo.common.timing import Phases
from kvpo.generators.sampler import NamedNoise, Stream
from kvpo.method.advantages import Advantage
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import roll_out
from kvpo.method.score import decode
from kvpo.planning.costs import Sizes
from kvpo.types import Rollout, Script

PHASES = ("prefix", "branches", "decode", "replay", "replay_grad", "update")
SCHEDULES = ("batched", "one-by-one")


@dataclass
class Peaks:
    """Most memory of the device in every phase, bytes above what was there at the beginning."""

    device: torch.device
    base: int = 0
    found: dict[str, int] = field(default_factory=dict)

    def begin(self, _doing: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self, done: str, _seconds: float) -> None:
        if self.device.type == "cuda":
            name = done.removeprefix("phase ")
            peak = torch.cuda.max_memory_allocated(self.device) - self.base
            self.found[name] = max(self.found.get(name, 0), peak)


def rolled_out(
    parts: SimpleNamespace, schedule: str, script: Script, fork: int, phases: Phases
) -> Rollout:
    """A group by one of the two schedules; both give the same one."""
    embeddings, name = embeddings_of(parts, script), ("bench",)
    with torch.no_grad():
        if schedule == "one-by-one":
            return one_by_one(parts, script, embeddings, fork, name, phases)
        return roll_out(
            parts.pipeline,
            parts.sampler,
            parts.config.exploring,
            parts.config.rollout,
            script,
            embeddings,
            parts.config.seed,
            name,
            phases,
            fork,
        )


def group(
    parts: SimpleNamespace, schedule: str, script: Script, fork: int, update: bool
) -> dict[str, Any]:
    """Seconds, passes and memory by phase of a group; without rewards.

    Its replays are those of a step that compares with one other set of weights: `replay` without
    gradient, `replay_grad` what the update takes. ``update``: and the optimizer's, after which the
    weights are others.
    """
    device, model = parts.pipeline.device, parts.pipeline.generator
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    peaks = Peaks(device, base)
    phases = Phases(peaks.begin, peaks.end)
    alone = schedule == "one-by-one"
    calls = model.calls
    with watched(model, phases) as log:
        rollout = rolled_out(parts, schedule, script, fork, phases)
        with phases("decode"):
            frames = 4 * rollout.latents.shape[1]
            decode(parts.pipeline, rollout, frames, 1 if alone else 3)
        replay = Replay(
            parts.pipeline,
            rollout,
            embeddings_of(parts, script),
            CONTEXTS[parts.config.context],
            parts.config.energy,
            rows_per_pass=1 if alone else parts.config.rows_per_pass,
            together=int(alone),
        )
        with phases("replay"):
            energy = replay.energies()
        norm = parts.updater.accumulate(replay, _advantage(len(energy)), phases).metrics[
            "optim/grad_norm"
        ]
        if update:
            with phases("update"):
                parts.updater.step()
        parts.updater.optimizer.zero_grad(set_to_none=True)
    seconds = {k.removeprefix("time/"): s for k, s in phases.take().items()}
    return {
        "calls": model.calls - calls,
        "seconds": {name: seconds[name] for name in PHASES if name in seconds},
        "peak GiB above the weights": {n: b / 2**30 for n, b in peaks.found.items()},
        "latent frames decoded": [
            len(rollout.prefix),
            rollout.latents.shape[0] * rollout.latents.shape[1],
        ],
        "energy": energy.tolist(),
        "gradient norm": norm,
        "log": log,
    }


def _advantage(branches: int) -> Advantage:
    """Advantages that give every branch a gradient; no reward is asked."""
    A_G = torch.linspace(-1.0, 1.0, branches, dtype=torch.float64)
    none = torch.zeros(0)
    return Advantage(A_G, A_G, none, none, torch.ones(branches, dtype=torch.bool), True, {})


def stream_rate(parts: SimpleNamespace, compiled: bool, after: int = 4) -> dict[str, float]:
    """Pixel frames a second of one stream over a full window, and the seconds before that.

    The latter include compilation; ``after``: blocks that are timed. Text and decoding are not
    in it.
    """
    g, model = parts.pipeline.geometry, parts.pipeline.generator
    full = -(-max(g.window, g.block) // g.block) + 1
    if compiled:
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    script = Script("stream", ("a",), (0,), full + after)
    text = normal((g.text_length, model.transformer.config.text_dim), 0, "text")
    stream = Stream(
        model,
        g,
        parts.sampler,
        [script],
        {"a": text.to(model.device, model.dtype)},
        NamedNoise(parts.pipeline.latent_shape(g.block), 0, ("stream",)),
        parts.pipeline.new_cache(g.resident(script.blocks)),
    )
    seconds = []
    for _ in range(script.blocks):
        started = time.perf_counter()
        float(stream.advance().sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {
        "frames a second": 4 * g.block * after / sum(seconds[full:]),
        "warm-up s": sum(seconds[:full]),
    }


@dataclass(frozen=True)
class Bench:
    """The measurement: of which shape, on which device, and for how long."""

    sizes: Sizes
    load: Load
    device: torch.device
    dtype: Literal["float32", "bfloat16"]
    compile: bool
    budget: float
    """Seconds after which no further part is begun."""
    say: Callable[[str], None]

    def __call__(self) -> dict[str, Any]:
        """Measure; JSON-ready. Parts that had no time are named under `left out`."""
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        config = settings_of(self.load, self.dtype)
        script, fork = script_of(self.load, self.sizes.geometry)
        parts = new_parts(config, self.sizes, self.device)
        self._warm(parts, script, fork)
        rate = matmul_rate(self.device, getattr(torch, self.dtype))
        result: dict[str, Any] = {
            "environment": environment(self.device),
            "size": self.sizes.source,
            "load": vars(self.load) | {"fork": fork, "blocks": script.blocks, "dtype": self.dtype},
            "weights GiB": _bytes(parts.pipeline.generator) / 2**30,
            "matmul TFLOP/s": rate / 1e12,
            "schedules": {},
            "streams": {},
            "left out": [],
        }
        for name, part in self._parts(parts, script, fork):
            if time.perf_counter() - started > self.budget:
                result["left out"].append(name)
                continue
            self.say(name)
            kind, found = part()
            result[kind][name] = found
            gc.collect()
        self.say("counting operations")
        self._count(result, config, rate)
        result["seconds in all"] = time.perf_counter() - started
        return result

    def _warm(self, parts: SimpleNamespace, script: Script, fork: int) -> None:
        """One pass of every kind, so that no phase pays for the first use of a kernel."""
        self.say("warming up")
        small = replace(self.load, branches=2, window_blocks=1, fork=None)
        script, fork = script_of(small, self.sizes.geometry)
        kept, parts.config = parts.config, settings_of(small, self.dtype)
        group(parts, "batched", script, fork, update=False)
        parts.config = kept

    def _parts(self, parts: SimpleNamespace, script: Script, fork: int):
        for i, name in enumerate(SCHEDULES):
            yield (
                name,
                lambda name=name, last=i + 1 == len(SCHEDULES): (
                    "schedules",
                    group(parts, name, script, fork, update=last),
                ),
            )
        yield "stream", lambda: ("streams", stream_rate(parts, compiled=False))
        if self.compile:
            yield "stream, compiled", lambda: ("streams", stream_rate(parts, compiled=True))

    def _count(self, result: dict[str, Any], config, rate: float) -> None:
        """Put operations and utilisation beside the seconds."""
        for name, found in result["schedules"].items():
            log, (before, after) = found.pop("log"), found["latent frames decoded"]
            flops = log.by_phase(operations(config, self.sizes, log))
            rows = 1 if name == "one-by-one" else min(3, self.load.branches + 1)
            flops["decode"] = (
                before * decoding(config, self.sizes, 1)
                + after * decoding(config, self.sizes, rows) // rows
            )
            found["TFLOP"] = {p: flops[p] / 1e12 for p in PHASES if p in flops}
            found["utilisation"] = {
                p: flops[p] / s / rate for p, s in found["seconds"].items() if p in flops and s
            }
        both = list(result["schedules"].values())
        if len(both) == 2:
            a, b = (torch.tensor(found["energy"]) for found in both)
            result["largest difference of energies, relative"] = float(((a - b) / a).abs().max())


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
