"""`kvpo doctor`: the invariants of method.md section 6, measured on the user's own run.

They are measured on its generator and recipe.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from kvpo.common.progress import Progress
from kvpo.common.rng import normal
from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.doctor.page_gradient import LeftOut, known, left_out, on_a_tiny_generator
from kvpo.doctor.preview_ranks import preview_agreement
from kvpo.doctor.step_effects import step_effects
from kvpo.generators.cache import FrameCache, gather
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.sampler import Stream
from kvpo.method.advantages import Advantage
from kvpo.method.explorers import Exploration, Explorer
from kvpo.method.prefix import Start
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import roll_out_branches, start_groups
from kvpo.method.routing import KVRouting
from kvpo.policy.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from kvpo.runs.parts import Parts
from kvpo.types import BranchPlan, Rollout, Script

SMALL = 10_000_000
"""Trained weights up to which the whole window's graph is built on the user's own generator."""


@dataclass(frozen=True)
class Finding:
    """One invariant, and what was measured."""

    name: str
    value: float
    rule: str
    holds: bool


@dataclass(frozen=True)
class _Empty(Exploration):
    """An explorer whose every plan is the anchor's."""

    explorer: Explorer

    deterministic_replay: ClassVar[bool] = True

    @property
    def window_blocks(self) -> int:
        return self.explorer.window_blocks

    @property
    def nearest(self) -> int:
        return self.explorer.nearest

    def eligible_forks(self, blocks, geometry):
        return self.explorer.eligible_forks(blocks, geometry)

    def plan(self, window, geometry, num_branches, generator, resident=None):
        return (BranchPlan(),) * num_branches


class _AllFrames(WanAttnProcessor):
    """diffusers' own self-attention over a whole sequence.

    Frame q reads frame k ``counts[q, k]`` times.
    """

    def __init__(self, counts_NN: torch.Tensor):
        super().__init__()
        self.counts_NN = counts_NN

    def __call__(self, attn, hidden, encoder, _mask, rotary):
        tokens = hidden.shape[1] // len(self.counts_NN)
        mask = (
            self.counts_NN.log()
            .to(hidden.dtype)
            .repeat_interleave(tokens, 0)
            .repeat_interleave(tokens, 1)
        )
        return super().__call__(attn, hidden, encoder, mask, rotary)


class _Watched(CausalWan):
    """A generator that looks at what a denoise pass is about to read of the prefix.

    It does so for every row, before it runs.
    """

    def __init__(self, model: CausalWan, prefix: FrameCache):
        # Not CausalWan's own, which would give the transformer new attention processors.
        torch.nn.Module.__init__(self)
        self.transformer = model.transformer
        self.calls = 0
        self.prefix = prefix
        self.left = _prints(prefix)
        self.reads = 0
        self.wrong = 0

    def velocity(self, x, sigma, text, frames, cache=None, past=(), rows=None):
        lists, found = past if isinstance(past, list) else [past] * len(x), cache.find(past, len(x))

        # Pages that rows encoded anew at a prompt switch are their own, and so is a bank that they
        # have recorded to.
        def shared(f):
            return (
                cache.bank is self.prefix.bank
                if f < 0
                else f in self.prefix.slots and f not in cache.slots
            )

        pages = [
            (row, i, f)
            for row, wanted in enumerate(lists)
            for i, f in enumerate(wanted)
            if shared(f)
        ]
        for layer in range(cache.layers if pages else 0):
            read = [
                kv.unflatten(1, (len(lists[0]), -1))
                for kv in gather(cache.sources(found, layer), len(x), len(lists[0]))
            ]
            self.wrong += sum(
                [_print(kv[row, i]) for kv in read] != self.left[f, layer] for row, i, f in pages
            )
            self.reads += len(pages)
        return super().velocity(x, sigma, text, frames, cache, past, rows)

    def finding(self) -> Finding:
        wrong = self.wrong + sum(
            page != self.left[key] for key, page in _prints(self.prefix).items()
        )
        return Finding(
            "pages of the prefix that a row reads otherwise than left",
            wrong,
            f"<= 0 of {self.reads}, bit for bit",
            wrong == 0 < self.reads,
        )


def examine(config: RunConfig) -> bool:
    """Print every finding as it is made; True if all hold."""
    started, all_hold = time.perf_counter(), True
    for finding in findings(config):
        all_hold &= finding.holds
        print(
            f"{'ok' if finding.holds else 'FAILED':<7} {finding.name:<58} {finding.value:<12.4g} {finding.rule}",
            flush=True,
        )
    print(
        f"{'all invariants hold' if all_hold else 'some invariants FAILED'}; {time.perf_counter() - started:.0f} s"
    )
    return all_hold


def findings(config: RunConfig) -> Iterator[Finding]:
    """The checks, cheapest first, on one group of the recipe."""
    # a clip would hide a gradient that is wrong by a factor
    unclipped = replace(config.optimizer, clip=math.inf)
    run = Parts(replace(config, shuffle_advantages=False, optimizer=unclipped), Progress())
    g = run.pipeline.geometry
    exact = run.pipeline.generator.dtype == torch.float32
    close, tolerance = (1e-4, 1e-9) if exact else (5e-2, 1e-3)
    yield _at_most(
        "one block without a past == the stock model's forward", _against_stock(run, 0), close
    )
    # the window has then moved on, and pages have been given up and used again
    rolled = 3 if g.window < 0 else g.window // g.block + 2
    yield _at_most(
        "a block read through the cache == one uncached forward", _against_stock(run, rolled), close
    )
    group = _Group(run)
    yield _at_most(
        "empty plans: every row is the anchor, bit for bit",
        _spread(group.roll(_Empty(config.exploring)).latents),
        0.0,
    )
    rollout = group.roll(config.exploring)
    yield from _rows(group, rollout, tolerance)
    yield from _energies(config.exploring, group.replay, rollout, tolerance)
    yield from _gradients(run, group.replay, rollout)
    if isinstance(config.exploring, KVRouting):
        yield from _steps(run, group.start, rollout, group.embeddings)
        yield from _pages(run, rollout, group.embeddings)
    yield _resumed(run, group.replay, rollout)


class _Group:
    """One group of the recipe: a past that it is rolled out from again and again."""

    def __init__(self, run: Parts):
        self.run = run
        self.name = ("doctor",)
        config, script = run.config, run.source.script(0, 0)
        self.embeddings = run.embed(script)
        with run.policy.using(run.policy.behaviour):
            (self.start,) = start_groups(
                run.pipeline,
                run.sampler,
                config.exploring,
                config.rollout,
                [script],
                self.embeddings,
                config.seed,
                [self.name],
                [lambda fork: ()],
            )
        self.watched = _Watched(run.pipeline.generator, self.start.past.cache)

    def roll(self, explorer: Explorer) -> Rollout:
        """The group by an explorer, its passes watched."""
        run, config = self.run, self.run.config
        with run.policy.using(run.policy.behaviour):
            return roll_out_branches(
                replace(run.pipeline, generator=self.watched),
                explorer,
                config.rollout,
                self.start,
                config.seed,
                self.name,
                Phases(),
            )

    def replay(self, rollout: Rollout, rows: Sequence[int] | None = None, size: int = 0) -> Replay:
        """The group's replay; ``size``: most velocities in a pass, 0 = all."""
        config = self.run.config
        return Replay(
            self.run.pipeline,
            rollout,
            self.embeddings,
            CONTEXTS[config.context],
            config.energy,
            rows,
            size,
            config.rollout.together,
        )


def _rows(group: _Group, rollout: Rollout, tolerance: float) -> Iterator[Finding]:
    """Check what the rows of a group have in common: start noise, prefix, decoder, policy."""
    routed = any(plan.frames for plan in rollout.plans)
    inputs = rollout.trajectory.inputs
    assert inputs is not None, "all of the window was recorded"
    yield _at_most(
        "branches start from the same noise: first inputs differ by",
        _spread(inputs[:, 0, 0]) if routed else 0.0,
        0.0,
    )
    if group.watched.left:  # videos of their own have no prefix
        yield group.watched.finding()
    yield _at_most(
        "rows decoded on from the prefix: equal latents differ by", _decoded_apart(rollout), 0.0
    )
    if group.run.pipeline.preview is not None:
        yield from _preview(group.run, rollout)
    yield _at_most(
        "the anchor, replayed by the weights that made it: energy",
        float(group.replay(rollout, [rollout.num_branches]).energies()),
        tolerance,
    )


@torch.no_grad()
def _against_stock(run: Parts, blocks: int) -> float:
    """Relative difference of a block's velocity from diffusers' own forward over all frames.

    The block follows ``blocks`` clean ones, of which the last lies in a fork as a branch's does.
    """
    model = run.pipeline.generator
    g = run.pipeline.geometry
    F = run.pipeline.geometry.block
    N = (blocks + 1) * run.pipeline.geometry.block
    prompt = run.source.script(0, 0).texts[0]
    x = normal(run.pipeline.latent_shape(N), run.config.seed, "doctor", "frames")[None].to(
        run.device
    )
    text = run.pipeline.encode_text([prompt])
    cache = run.pipeline.new_cache(N if g.window < 0 else g.window)
    # which prototypes a head would choose hangs on its queries, and no mask says that: here it
    # reads them all
    if cache.bank is not None:
        cache.bank = replace(cache.bank, keep=0)
    stream = Stream(
        model,
        g,
        None,
        [Script("doctor", (prompt,), (0,), blocks + 1)],
        {prompt: text[0]},
        None,
        cache,
    )
    counts_LNN = torch.zeros(cache.layers, N, N, device=run.device)
    for block in range(blocks + 1):
        if block == blocks - 1:
            stream.cache = stream.cache.fork(1, F)
        stream.switch()
        frames = list(range(block * F, (block + 1) * F))
        past = g.history.past(frames[0], F)
        for layer, counts_NN in enumerate(counts_LNN):
            for f in (*past, *frames):
                counts_NN[frames, _frame_of(f, layer, stream.cache)] += 1
        if block < blocks:
            model.commit(x[:, frames], text, frames, stream.cache, past)
            stream.blocks.append(x[:, frames])
    v = model.velocity(x[:, frames], 0.5, text, frames, stream.cache, past)
    return _relative(v, _stock(model, x, [0.0] * (N - F) + [500.0] * F, text, counts_LNN)[:, -F:])


def _frame_of(f: int, layer: int, cache: FrameCache) -> int:
    """The frame of a page: of a slot of the memory bank, the one that the layer keeps in it."""
    if f >= 0:
        return f
    assert cache.bank is not None, "only a bank has slots"
    return int(cache.bank.frames[layer, 0, -1 - f])


def _stock(
    model: CausalWan,
    x_BNCHW: torch.Tensor,
    times_N: list[float],
    text: torch.Tensor,
    counts_LNN: torch.Tensor,
) -> torch.Tensor:
    """v_BNCHW of diffusers' own forward with its own attention; a time for every frame."""
    net = model.transformer
    ours = model.transformer.attn_processors
    rows, columns = model.grid(*x_BNCHW.shape[-2:])
    time = torch.tensor(times_N, device=x_BNCHW.device).repeat_interleave(rows * columns)[None]
    net.set_attn_processor(
        {
            name: _AllFrames(counts_LNN[int(name.split(".")[1])])
            if "attn1" in name
            else WanAttnProcessor()
            for name in ours
        }
    )
    v = net(x_BNCHW.transpose(1, 2).to(model.dtype), time, text.to(model.dtype), return_dict=False)[
        0
    ].transpose(1, 2)
    net.set_attn_processor(ours)
    return v


def _prints(cache: FrameCache) -> dict[tuple[int, int], list[int]]:
    """Prints of the keys and values of all that can be read.

    Keyed by (frame or slot of the bank, layer).
    """
    readable = (*cache.resident, *(cache.bank.slots if cache.bank else ()))
    return {
        (f, layer): [_print(kv) for kv in cache.page(f, layer)]
        for f in readable
        for layer in range(cache.layers)
    }


def _print(x: torch.Tensor) -> int:
    """A number that stands for the bits: a copy of the prefix's pages may not fit beside them."""
    words = x.contiguous().view(torch.int16).flatten().long()
    return int((words * torch.arange(1, 2 * len(words), 2, device=x.device)).sum())


def _decoded_apart(rollout: Rollout) -> float:
    """Decode the anchor's first frame in all rows, twice, and compare.

    Every row starts from the same state, and decoding leaves that state as it was.
    """
    assert rollout.decoder is not None, "a group that went on from its past has one"
    decoder = rollout.decoder()
    rows = rollout.latents[-1:, :1].expand(len(rollout.plans), -1, -1, -1, -1)
    return _spread(torch.cat([decoder.fork(len(rows))(rows) for _ in range(2)]).float())


def _preview(run: Parts, rollout: Rollout) -> Iterator[Finding]:
    """Give a line a reward and signal, which is no rule: what training on the preview follows."""
    found = preview_agreement(run, rollout)
    for (signal, name), rank in found.ranks.items():
        yield Finding(
            f"preview decoder: ranks of {name}, {signal}, with the VAE's",
            rank,
            f"1 = the same order of {len(rollout.plans)} rows; pixels differ by {found.pixels:.2f} of 255",
            True,
        )


def _energies(explorer: Explorer, replay, rollout: Rollout, tolerance: float) -> Iterator[Finding]:
    """Check the branches' energies; those that the unrouted policy makes itself have none."""
    energy = replay(rollout).energies()
    if explorer.deterministic_replay:
        name = "branches of other noise, replayed: largest energy"
        yield _at_most(name, float(energy.max()), tolerance)
        return
    yield _at_most(
        "replay one velocity at a time against all at once, relative",
        _relative(replay(rollout, size=1).energies(), energy),
        1e-4,
    )
    yield Finding(
        "energies of the branches: spread / mean",
        float(energy.std() / energy.mean()),
        "> 0: not all equal",
        float(energy.std()) > 0.0,
    )


def _gradients(run: Parts, replay, rollout: Rollout) -> Iterator[Finding]:
    advantage = _made_up_advantage(run, rollout)
    update = run.updater.accumulate(replay(rollout), advantage, Phases())
    together = _take_gradients(run)
    ends = ("loss/ratio_min", "loss/ratio_max")
    ratios = [update.metrics[end] for end in ends if end in update.metrics]
    if ratios:  # regressions have none
        worst = max(abs(ratio - 1.0) for ratio in ratios)
        yield _at_most("ratio before the first update: distance from 1", worst, 0.0)
    dead = [name for name, g in zip(run.policy.names, together) if not g.any()]
    if (
        run.config.policy.train == "lora"
    ):  # B starts at zero, so A's gradient is zero until the first update
        dead = [name for name in dead if "lora_A" not in name]
    yield _at_most(
        "trainable tensors without gradient" + (f", first {dead[0]}" if dead else ""),
        len(dead),
        0.0,
    )
    run.updater.accumulate(
        replay(rollout, size=len(run.pipeline.geometry.sigmas)), advantage, Phases()
    )
    apart = _take_gradients(run)
    norm = sum(float(g.square().sum()) for g in together) ** 0.5
    yield _at_most(
        "gradient a few velocities at a time against all at once",
        sum(float((a - b).square().sum()) for a, b in zip(together, apart)) ** 0.5 / norm,
        1e-4,
    )


def _steps(
    run: Parts, start: Start, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    """Give one line a denoise step, which is no rule.

    It is what there is to know before `velocity_energy.weights` is chosen.
    """
    effects = step_effects(
        run.pipeline,
        start,
        rollout,
        embeddings,
        known(run.config),
        run.config.energy,
        run.config.rollout.together,
    )
    for s, e in enumerate(effects):
        name = f"denoise step {s}, sigma {e.sigma:.3f}, weight {e.weight:.3g}: share of the energy"
        yield Finding(
            name,
            e.says,
            f"routed alone it moves the window by {e.does:.3f} of all",
            math.isfinite(e.says) and math.isfinite(e.does),
        )


def _pages(
    run: Parts, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    """Compare training's gradient with the one through the whole window.

    It does so on a tiny generator in float64, also on this generator where it is small.
    """
    tiny, P = on_a_tiny_generator(run.config, run.pipeline), run.config.exploring.window_blocks
    yield _at_most(
        "tiny: gradient through all pages against finite differences", tiny.difference, 1e-5
    )
    yield _left_out("tiny", tiny, P)
    if run.policy.num_trainable <= SMALL and not run.config.gradient_checkpointing:
        found = left_out(
            run.pipeline,
            rollout,
            embeddings,
            known(run.config),
            run.config.energy,
            run.policy.layout.computing,
            run.config.seed,
        )
        yield _left_out("this generator", found, P)


def _left_out(whose: str, found: LeftOut, P: int) -> Finding:
    """Judge what training's gradient leaves out: at P = 1 a rule, beyond it a number to know."""
    exact = f"relative error {found.relative:.2g}"
    rule = f"1 at P = 1; {exact}" if P == 1 else f"at P = {P}, 1 = pages leave nothing out; {exact}"
    return Finding(
        f"{whose}: cosine of training's gradient with the exact one",
        found.cosine,
        rule,
        found.cosine > 0.9999 if P == 1 else math.isfinite(found.cosine),
    )


def _resumed(run: Parts, replay, rollout: Rollout) -> Finding:
    """Two updates in one go against one update, a checkpoint read back, and the second."""
    advantage = _made_up_advantage(run, rollout)

    def update() -> None:
        run.updater.accumulate(replay(rollout), advantage, Phases())
        run.updater.step()

    update()
    with tempfile.TemporaryDirectory() as folder:
        saved = save_checkpoint(
            Path(folder), Snapshot.of(1, run.policy, run.updater.optimizer, {}), keep=1
        )
        update()
        straight = run.policy.snapshot()
        load_checkpoint(saved, run.policy, run.updater.optimizer)
    update()
    worst = max(float((a - b).abs().max()) for a, b in zip(straight, run.policy.snapshot()))
    return _at_most("an update after resuming == without the interruption, bit for bit", worst, 0.0)


def _made_up_advantage(run: Parts, rollout: Rollout) -> Advantage:
    A_G = normal((rollout.num_branches,), run.config.seed, "doctor", "advantage").double()
    nothing = torch.zeros(0)
    return Advantage(
        A_G - A_G.mean(), A_G, nothing, nothing, torch.ones(len(A_G), dtype=torch.bool), True, {}
    )


def _take_gradients(run: Parts) -> list[torch.Tensor]:
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.policy.parameters]
    run.updater.optimizer.zero_grad(set_to_none=True)
    return taken


def _spread(x: torch.Tensor) -> float:
    """Largest difference of any row from the last."""
    return float((x - x[-1:]).abs().max())


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _at_most(name: str, value: float, limit: float) -> Finding:
    return Finding(name, value, f"<= {limit:g}", value <= limit)
