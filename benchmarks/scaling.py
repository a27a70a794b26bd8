"""Cost of more ranks: 1, 2 and 4 on this machine's cores, with fixed work per rank.

A model of nodes of eight cards goes with it.

python benchmarks/scaling.py --measure     # writes benchmarks/results/scaling.json
python benchmarks/scaling.py > docs/scaling.md
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kvpo.common.environment import environment
from kvpo.common.files import write_atomic
from kvpo.common.progress import Progress
from kvpo.common.rng import stream
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.distributed.process_end import end_by
from kvpo.distributed.ranks import Ranks, leave
from kvpo.method.routing import KVRouting
from kvpo.planning.amounts import amounts
from kvpo.planning.cards import CARDS
from kvpo.planning.costs import Costs, Sizes, costs, sizes_of
from kvpo.planning.plan import UTILISATION
from kvpo.planning.work import work
from kvpo.train import Alignment

RESULTS = Path("benchmarks/results/scaling.json")
CARDS_A_NODE, NVLINK = 8, 450e9
LINKS = {"8 x 400 Gb/s": 400e9, "200 Gb/s": 25e9, "10 Gb/s": 1.25e9}
"""Bytes a second out of a node, as stated.

They are a card of NDR InfiniBand for every GPU, one of HDR for all, Ethernet.
"""
MEMORY, UPDATE_BYTES = 3.35e12, 60
"""Bytes a second of an H100, and bytes that an update moves for each trained number.

AdamW, the EMA and the copies move them.
"""


# --- Measured ---


@dataclass(frozen=True)
class Timed(Ranks):
    """Ranks that write down what every message took and sent.

    A step has the errors, where all wait for the slowest; the metrics; the gradients.
    """

    messages: list[tuple[float, int]] = field(default_factory=list)

    def gather(self, value):
        begun = time.perf_counter()
        found = super().gather(value)
        self.messages.append(
            (time.perf_counter() - begun, (self.world - 1) * len(pickle.dumps(value)))
        )
        return found

    def add_gradients(self, parameters):
        begun = time.perf_counter()
        super().add_gradients(parameters)
        # a ring, each of its two rounds
        sent = 2 * (self.world - 1) / self.world * 4 * (1 + sum(p.numel() for p in parameters))
        self.messages.append((time.perf_counter() - begun, int(sent)))


def worker(config: RunConfig, steps: int, out: Path) -> None:
    """Run one rank; the first step warms up and is not counted."""
    run = Alignment(config, out.parent / "run", Progress())
    parts = run.parts
    parts.ranks = parts.policy.layout.ranks = ranks = Timed(**vars(parts.ranks))
    rows = []
    for step in range(steps + 1):
        ranks.messages.clear()
        cpu, begun = time.process_time(), time.perf_counter()
        run.step(step)
        names = ("waiting", "metrics", "gradients")
        seconds = {"step": time.perf_counter() - begun, "cpu": time.process_time() - cpu} | {
            n: s for n, (s, _) in zip(names, ranks.messages)
        }
        rows.append(seconds | {"sent": sum(b for _, b in ranks.messages)})
    everyone = ranks.gather(rows[1:])
    if ranks.first:
        flat = [row for rows in everyone for row in rows]
        write_atomic(
            out, json.dumps({name: sum(r[name] for r in flat) / len(flat) for name in flat[0]})
        )
    leave()


def measure(recipe: str, pipeline: str, world: int, steps: int) -> dict[str, float]:
    """Means over ranks and steps, seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            __file__,
            "--worker",
            str(out),
            "--recipe",
            recipe,
            "--steps",
            str(steps),
        ]
        subprocess.run(
            [*command, *(["--pipeline", pipeline] if pipeline else [])],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return json.loads(out.read_text())


# --- Modelled ---


@dataclass(frozen=True)
class OneFork(KVRouting):
    """Explorer that forks at one block, to count the work of each fork by itself."""

    fork: int = 0

    def eligible_forks(self, blocks, geometry):
        return [self.fork]


def group_seconds(config: RunConfig, sizes: Sizes, found: Costs) -> list[float]:
    """Seconds of a group on one H100, for every fork that can be drawn; without rewards."""
    forks = config.exploring.eligible_forks(config.data.blocks, sizes.geometry)
    every = [replace(config, kv_routing=OneFork(**vars(config.kv_routing), fork=f)) for f in forks]
    return [
        sum(work(c, sizes, found, amounts(c, sizes.geometry)).values())
        / (CARDS["h100"][0] * 1e12 * UTILISATION)
        for c in every
    ]


def slowest(seconds: Sequence[float], ranks: int, groups: int = 1, draws: int = 4000) -> float:
    """Mean over steps of the longest rank's mean group, each group with its own fork."""
    picked = torch.randint(
        len(seconds), (draws, ranks, groups), generator=stream(0, "scaling", ranks, groups)
    )
    return float(torch.tensor(seconds)[picked].mean(2).amax(1).mean())


def messages(numbers: int, nodes: int, link: float) -> float:
    """Seconds of the gradients' sum: rings within a node, and between nodes."""

    def share(n):
        return 2 * (n - 1) / n

    return 4 * numbers * (share(CARDS_A_NODE) / NVLINK + share(nodes) / link)


def modelled() -> list[dict]:
    rows, base = [], load_config(recipe_path("longlive"))
    for size in ("1.3b", "14b"):
        for train in ("lora", "full"):
            config = replace(base, policy=replace(base.policy, train=train))
            sizes = sizes_of(config, size)
            found = costs(config, sizes)
            seconds = group_seconds(config, sizes, found)
            rows += [
                {
                    "size": size,
                    "train": train,
                    "numbers": found.trainable,
                    "mean": sum(seconds) / len(seconds),
                    "nodes": n,
                    "slowest": slowest(seconds, n * CARDS_A_NODE),
                    "of four": slowest(seconds, n * CARDS_A_NODE, 4),
                    "update": UPDATE_BYTES * found.trainable / MEMORY,
                    "messages": {
                        name: messages(found.trainable, n, rate) for name, rate in LINKS.items()
                    },
                }
                for n in (1, 2, 4, 8, 16)
            ]
    return rows


# --- Said ---

HEAD = """# What more ranks cost

Written by `python benchmarks/scaling.py`. The first table was measured; the second is a model, and no run of more than one card stands behind it.

## Measured: one machine's cores

The recipe `{recipe}` with videos of 9 blocks and 4 branches, on {cores} cores ({hardware}), with nothing else running; one thread a rank, two groups a rank and step, gloo, mean over ranks and {steps} steps. With 4 ranks there are more ranks than cores: "a step" and "waiting"
then say how the system shares its cores, not what KVPO costs. "CPU" is what a rank's own process used, and shows the fixed work. "Waiting" is for the slowest rank, whose groups were longer; "metrics" and "gradients" are the messages after that.

| ranks | a step, s | CPU, s | waiting, s | metrics, s | gradients, s | sent by a rank (counted), MB |
|---|---|---|---|---|---|---|"""

MODEL = """
## Modelled: nodes of eight H100

One group a card and step, the recipe `longlive`. A step is its slowest group, then the update, then the gradients' sum:

- a group: the planner's operations for its fork at {utilisation:.0%} of the card's rate, which is what a group reached on one H200 ([results.md](results.md), claim 5), in every phase; without rewards. Forks are drawn as in a run, the longest of a step's is the mean over 4,000 simulated steps;
- the update: {bytes} bytes moved for each trained number at 3.35 TB/s; computed, not measured;
- the gradients: float32, in rings over 450 GB/s within a node and over the stated rate of the network between nodes, at these full rates, not overlapped with work. Sharded training sends as much (reduce-scatter, all-gather) and the weights in addition.

"Slowest of four" is the slowest rank's mean group where each has four. "Efficiency" is a mean group over the step of one group a card. Full training of 14B does not fit a card unsharded; its row says what its messages would cost.

| weights | trained | nodes | mean group, s | slowest, s | of four, s | update, s | gradients, s: {links} | efficiency: {links} |
|---|---|---|---|---|---|---|---|---|"""

TAIL = """
What follows from it: forks differ, so groups do, and waiting for the slowest costs about a quarter of a step, more than all messages in every row; 10 Gb/s Ethernet is enough for adapters. Four groups a rank (`groups` four times the ranks)
halve that wait on one node and take a third off it on sixteen; the price is larger steps.

## One stream over several cards

```bash
kvpo generate models/krea --prompt "..." --seconds 60 --processes 4      # or: torchrun --standalone --nproc-per-node 4 -m kvpo generate ...
```

The processes share every stream by the scheme of DeepSpeed-Ulysses ([kvpo/generators/sequence_split.py](../kvpo/generators/sequence_split.py)): each has a P-th of every frame's tokens, and in self-attention a P-th of the heads over the whole past. Take it where a stream is too slow on one card, or where its cache does not fit one.

- **Kept on a card**: a P-th of the cache (of 14B at 480 x 832 a latent frame's keys and values are 1.28 GB in bfloat16, of 1.3B 0.29), a P-th of the activations and of the transformer's operations but those on the text. Weights, text encoder and decoder are whole on every card, and all decode; the first writes.
- **Sent by a card** in a pass of one block and row, counted: 4 x layers x width x (tokens / P) x (P - 1) / P numbers, and the output's part. For 3 frames at 480 x 832 in bfloat16: 14B 1.92 GB with 2 cards, 1.44 with 4, 0.84 with 8; 1.3B 0.43 with 2, 0.32 with 4. A block of 4 denoise steps is 5 passes; a prompt switch sends its re-encoded frames once. Nothing overlaps with work. Times are not measured: no several cards were at hand.
- **Equal** to one process within 1e-4 of latents of order 1 in float32: streams with a prompt switch, forked and routed groups (`tests/distributed/test_sequence_split.py`, two gloo ranks, which also holds the formula against the bytes that were sent).
- **Refused** before weights are read: processes that do not divide the heads (12 of 1.3B, 24 of 5B, 40 of 14B) or the tokens of a frame (1,560 at 480 x 832), and generators with a memory bank, whose choice of frames all heads make.

Missing: training. A pass with gradient is refused, because the exchanges carry none back; `kvpo align` does not share streams, so no recipe has a setting for it and `kvpo plan` does not count it. It takes differentiable exchanges, replays whose losses count once in a row of ranks, and a rollout that all of a row make together; till then a group is shared by `branch_parallel`. Padding for heads that do not divide is not built either.

## FSDP2 instead of own gathering: what stands against it

`policy.shard` uses FSDP2 for the layout of the masters only ([kvpo/policy/sharding.py](../kvpo/policy/sharding.py)); whole weights are gathered once a step. To let FSDP2 gather and reduce block by block, in every pass, each of these has to be answered first:

- Each group's gradient is clipped by its own norm (`optimizer.clip_of: group`, the default), and `agreement` keeps a sketch of it. FSDP2 sums over ranks within the backward pass, so where ranks have different groups, no group's gradient is ever there. It leaves `clip_of: step` and `agreement.window: 0`, or all ranks in one group (`branch_parallel`), which has every prefix made by every rank.
- A pass waits for the same pass of all ranks. `rollout.alike_forks` makes forks alike, and not the passes: a prompt switch is a pass of its own in prefix, branches and replay, and without `data.segments` and `data.switches` stories switch at different blocks; `pairs.count` draws other blocks for each group and `velocity_penalty` holds others; a group that is tied or can not be measured is left out, and so is a rank that has a group fewer; evaluations share their scripts out as they divide. Each needs one draw for all of a step, a pass of weight 0, or a refusal at the start.
- An error inside a group is told when the rank leaves it (`Ranks.together`). With hooks, others would be waiting for its next gathering, for as long as `patience`: errors would have to be asked for before every pass.
- It wants one dtype of what it trains in a group of parameters. Wan's blocks hold norms and modulation in float32 among bfloat16 maps: two groups a block, and two at the root.
- Rollouts swap in other sets of weights (behaviour, reference, average, merged adapters) by giving parameters other memory. Under FSDP2 each swap would be one of shards, and every pass a new gathering.
- Our loop calls the blocks, not the transformer's forward, where the root's hooks sit: the root has to be `CausalWan`, with its own method registered as a forward. What asks a parameter for its dtype or shape between passes meets a shard in float32.
- With it, activation checkpointing gathers every block twice in the backward pass, once to recompute.

What it would bring: of 14B in full on eight cards (`kvpo plan krea --policy.train full --policy.shard --gpus 8`, [plans.md](plans.md)) 173 GiB of a card's 247 are weights, sets, moments and gradient, of which FSDP2 would leave 47 and a block or two gathered, 1.3: 122 planned, which cards of 141 GB hold. With one branch and one velocity at a time and a cache of 12 frames it would be 81, still more than the 79 of a card of 80 GB: there the sets have to be kept in bfloat16 as well, or streams cut over the cards in training, which is not built (above). For adapters it brings the frozen weights' share alone, where they are sharded too.
"""


def page(result: dict) -> str:
    facts = result["environment"]
    lines = [
        HEAD.format(
            recipe=result["recipe"],
            hardware=facts["hardware"].rpartition(",")[0],
            cores=result["cores"],
            steps=result["steps"],
        )
    ]
    lines += [
        f"| {n} | {r['step']:.2f} | {r['cpu']:.2f} | {r['waiting']:.3f} | {r['metrics']:.4f} | {r['gradients']:.4f} | {r['sent'] / 1e6:.2f} |"
        for n, r in result["ranks"].items()
    ]
    lines.append(MODEL.format(utilisation=UTILISATION, bytes=UPDATE_BYTES, links=" / ".join(LINKS)))
    for r in modelled():
        efficiency = [r["mean"] / (r["slowest"] + r["update"] + m) for m in r["messages"].values()]
        sent = (
            " / ".join(f"{m:.3g}" for m in r["messages"].values())
            if r["nodes"] > 1
            else f"{min(r['messages'].values()):.3g}"
        )
        reached = (
            " / ".join(f"{e:.0%}" for e in efficiency) if r["nodes"] > 1 else f"{efficiency[0]:.0%}"
        )
        lines.append(
            f"| {r['size'].upper()} | {r['train']}, {r['numbers'] / 1e9:.2f} G | {r['nodes']} | {r['mean']:.0f} | {r['slowest']:.0f} | {r['of four']:.0f} | {r['update']:.2g} | {sent} | {reached} |"
        )
    return "\n".join([*lines, TAIL])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--pipeline", default="")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    config = load_config(recipe_path(args.recipe))
    small = {"data": replace(config.data, blocks=9), "rollout": replace(config.rollout, branches=4)}
    config = replace(
        config,
        groups=2 * int(os.environ.get("WORLD_SIZE", "1")),
        show_every=0,
        device="cpu",
        pipeline=args.pipeline or config.pipeline,
        **small,
    )
    if args.worker:
        worker(config, args.steps, args.worker)
    elif args.measure:
        ranks = {str(n): measure(args.recipe, args.pipeline, n, args.steps) for n in (1, 2, 4)}
        result = {
            "environment": environment(torch.device("cpu")),
            "recipe": args.recipe,
            "cores": len(os.sched_getaffinity(0)),
            "steps": args.steps,
            "ranks": ranks,
        }
        write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    else:
        print(page(json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    end_by(main)
