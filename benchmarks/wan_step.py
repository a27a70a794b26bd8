"""One group and its update at the paper's shape on one GPU, and a stream.

It is Wan2.1-1.3B with random weights, 147 latent frames of 60 x 104, G 8, P 5, LoRA.

Random weights make no video, but the same shapes are the same work. Without rewards and decoding.
Phases wait for the device; utilisation is the planner's count of operations over the card's stated
dense bf16 rate.

    python benchmarks/wan_step.py [--fork 38] [--rows-per-pass 16] \\
        [--schedules batched one-by-one] [--card h200] [--no-compile]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import WanTransformer3DModel
from schedule import PAPER, PAPER_GEOMETRY, one_by_one

from kvpo.common.environment import environment
from kvpo.common.files import write_atomic
from kvpo.common.rng import normal
from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.pipeline import Geometry, Pipeline
from kvpo.generators.sampler import SAMPLERS, NamedNoise, Stream
from kvpo.method.advantages import Advantage
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import roll_out
from kvpo.method.routing import KVRouting
from kvpo.method.score import horizon
from kvpo.method.update import Updater
from kvpo.planning.costs import UMT5_XXL, WAN_1_3B, Sizes, costs
from kvpo.planning.plan import CARDS
from kvpo.policy.policy import Policy, PolicyConfig
from kvpo.types import Rollout, Script, Window


def new_run(
    config: RunConfig, shape: dict, geometry: Geometry, device: torch.device
) -> SimpleNamespace:
    """The parts of a run that roll out and replay, around a random transformer in bf16."""
    with torch.device(device):
        transformer = WanTransformer3DModel(**WAN_1_3B | shape).to(torch.bfloat16).eval()
    transformer.enable_gradient_checkpointing()
    pipeline = Pipeline(CausalWan(transformer), None, geometry, None, "random")
    policy = Policy(pipeline.generator, config.policy, config.seed)
    updater = Updater(
        policy, config.optimizer, config.objective, config.temperature, config.unsafe, groups=1
    )
    return SimpleNamespace(
        config=config,
        pipeline=pipeline,
        policy=policy,
        updater=updater,
        sampler=SAMPLERS[config.sampler],
    )


def rolled_out(
    run: SimpleNamespace, schedule: str, embeddings: dict, fork: int, phases: Phases
) -> Rollout:
    if schedule == "one-by-one":
        return one_by_one(run, PAPER, embeddings, fork, ("wan",), phases)

    def end(window):
        return horizon(PAPER, window, run.pipeline.geometry, run.config.score)

    return roll_out(
        run.pipeline,
        run.sampler,
        run.config.exploring,
        run.config.rollout,
        PAPER,
        embeddings,
        run.config.seed,
        ("wan",),
        phases,
        fork,
        end,
    )


def measure(
    run: SimpleNamespace, schedule: str, fork: int, rows_per_pass: int, update: bool = False
) -> dict:
    """Measure seconds by phase, calls, and GiB above the loaded weights.

    It makes three replays, as in a step after the first update: reference, behaviour, gradient.
    ``update``: and the optimizer's, after which the weights are others.
    """
    device, g, phases = run.pipeline.device, run.pipeline.geometry, Phases()
    text_dim = run.pipeline.generator.transformer.config.text_dim
    embeddings = {
        text: normal((g.text_length, text_dim), 0, "text", text).to(device, torch.bfloat16)
        for text in PAPER.texts
    }
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    calls = run.pipeline.generator.calls
    with torch.no_grad(), phases("rollout"):
        rollout = rolled_out(run, schedule, embeddings, fork, phases)
        float(rollout.latents.sum())  # waits for the device
    A_G = torch.linspace(-1.0, 1.0, rollout.num_branches, dtype=torch.float64)
    advantage = Advantage(
        A_G, A_G, torch.zeros(0), torch.zeros(0), torch.ones(len(A_G), dtype=torch.bool), True, {}
    )
    replay = Replay(
        run.pipeline,
        rollout,
        embeddings,
        CONTEXTS[run.config.context],
        run.config.energy,
        rows_per_pass=rows_per_pass,
    )
    with phases("replay_reference"):
        energy = replay.energies()
    norm = run.updater.accumulate(replay, advantage, phases).metrics["optim/grad_norm"]
    if update:
        with phases("update"):
            run.updater.step()
    run.updater.optimizer.zero_grad(set_to_none=True)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return {
        "seconds": phases.take(),
        "calls": run.pipeline.generator.calls - calls,
        "peak GiB above the weights": peak,
        "energy": energy.tolist(),
        "gradient norm": norm,
    }


def utilisation(
    config: RunConfig, sizes: Sizes, fork: int, seconds: dict[str, float], card: str
) -> dict[str, float]:
    """Share of the card's rate in the batched schedule, by phase."""
    c, S, P, G = (
        costs(config, sizes),
        len(sizes.geometry.sigmas),
        config.exploring.window_blocks,
        config.rollout.branches,
    )
    row, velocities = c.replay.flops / c.rows["replay"], G * P * S - (G - 1)
    blocks = horizon(PAPER, Window(fork, P), sizes.geometry, config.score) - fork
    found = {
        "time/prefix": fork * (S + 1) * c.prefix.flops,
        "time/branches": (G + 1) * blocks * (S + 1) * c.branches.flops / c.rows["branches"],
        "time/replay_reference": (G * (P - 1) + velocities) * row,
        "time/replay_grad": (2 * G * (P - 1) + velocities) * row
        + velocities * c.gradient.flops / c.rows["gradient"],
    }
    return {
        phase: flops / seconds[phase] / (CARDS[card][0] * 1e12)
        for phase, flops in found.items()
        if seconds.get(phase)
    }


def stream_rate(run: SimpleNamespace, blocks: int, compiled: bool) -> dict[str, float]:
    """Pixel frames a second of one stream over a full window, and the seconds before it.

    The latter include compilation.
    """
    g, model = run.pipeline.geometry, run.pipeline.generator
    if compiled:
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    script = Script("stream", ("a",), (0,), blocks)
    embeddings = {
        "a": normal((g.text_length, model.transformer.config.text_dim), 0, "text").to(
            model.device, model.dtype
        )
    }
    stream = Stream(
        model,
        g,
        run.sampler,
        [script],
        embeddings,
        NamedNoise(run.pipeline.latent_shape(g.block), 0, ("stream",)),
        run.pipeline.new_cache(g.resident(blocks)),
    )
    full, seconds = -(-g.window // g.block) + 1, []
    for _ in range(blocks):
        started = time.perf_counter()
        float(stream.advance().sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {
        "frames a second": 4 * g.block * (blocks - full) / sum(seconds[full:]),
        "warm-up s": sum(seconds[:full]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fork", type=int, default=38, help="fork block of 49")
    parser.add_argument(
        "--rows-per-pass",
        type=int,
        default=16,
        help="velocities replayed together in the batched schedule",
    )
    parser.add_argument("--schedules", nargs="+", default=["batched", "one-by-one"])
    parser.add_argument(
        "--card",
        default="h200",
        choices=sorted(CARDS),
        help="whose stated rate utilisation is a share of",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled stream")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wan_step.json"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda")
    config = replace(
        RunConfig(),
        dtype="bfloat16",
        gradient_checkpointing=True,
        rows_per_pass=args.rows_per_pass,
        kv_routing=KVRouting(window_blocks=5),
        policy=PolicyConfig(rank=256),
        data=replace(
            RunConfig().data, prompts="paper", blocks=49, segments=4, switches=(13, 25, 37)
        ),
    )
    run = new_run(config, {}, PAPER_GEOMETRY, device)
    weights = torch.cuda.memory_allocated() / 2**30
    result = {
        "environment": environment(device),
        "fork": args.fork,
        "rows per pass": args.rows_per_pass,
        "weights GiB": weights,
        "schedules": {},
    }

    def keep(key: str, found: dict) -> None:
        result[key] = found
        print(json.dumps({key: found}), flush=True)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")

    for schedule in args.schedules:
        found = measure(
            run,
            schedule,
            args.fork,
            args.rows_per_pass if schedule == "batched" else 1,
            update=schedule == args.schedules[-1],
        )
        keep("schedules", result["schedules"] | {schedule: found})
    if "batched" in args.schedules:
        sizes = Sizes(WAN_1_3B, {}, UMT5_XXL, PAPER_GEOMETRY, "paper")
        keep(
            "utilisation",
            utilisation(
                config, sizes, args.fork, result["schedules"]["batched"]["seconds"], args.card
            ),
        )
    keep("stream", stream_rate(run, 20, compiled=False))
    if not args.no_compile:
        keep("stream, compiled", stream_rate(run, 20, compiled=True))


if __name__ == "__main__":
    main()
