"""One KVPO step in two schedules, with the same weights and the same numbers, both timed here.

Ours has branches, blocks and steps in one batch over one shared cache; the one-by-one schedule is
that of the paper's public code (batch 1, every branch alone, three replays).

    python benchmarks/schedule.py [--pipeline FOLDER] [--repeats 3]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.bench.one_by_one import one_by_one
from kvpo.bench.sizes import WAN_GEOMETRY
from kvpo.common.environment import environment
from kvpo.common.progress import Progress
from kvpo.common.timing import Phases
from kvpo.config import load_config, recipe_path
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import roll_out
from kvpo.method.routing import KVRouting
from kvpo.method.score import ScoreConfig, horizon
from kvpo.planning.amounts import longest
from kvpo.runs.parts import Parts
from kvpo.types import Rollout, Script, Window

EXPLORER = KVRouting()
"""Windows of more than one block, as the paper's: the miniature's recipe has a single one."""


def energies_one_by_one(run: Parts, rollout: Rollout, embeddings) -> torch.Tensor:
    """Energies of every branch alone, every velocity alone.

    The graph of all is kept where gradients are enabled.
    """
    energies = []
    for g in range(rollout.num_branches):
        replay = Replay(
            run.pipeline,
            rollout,
            embeddings,
            CONTEXTS[run.config.context],
            run.config.energy,
            rows=[g],
            rows_per_pass=1,
        )
        energies.append(torch.stack([share.sum() for _, share in replay.passes()]).sum())
    return torch.stack(energies)


def gradient(run: Parts, energy_G: torch.Tensor, A_G: torch.Tensor) -> None:
    """Backward of the objective's policy part at theta = old."""
    tau = run.config.temperature.resolve(energy_G)
    loss = run.config.objective(-energy_G.detach() / tau, -energy_G.detach() / tau, None, A_G)
    torch.dot(-loss.cotangent / tau, energy_G).backward()


def measure(run: Parts, batched: bool) -> dict:
    """Measure rollout, old, initial and current replay, and gradient.

    There are no rewards, which are the same work in both.
    """
    script, name = run.source.script(0, 0), ("benchmark",)
    embeddings, phases, model = run.embed(script), Phases(), run.pipeline.generator
    forks = run.config.exploring.eligible_forks(script.blocks, run.pipeline.geometry)
    fork = forks[len(forks) // 2]
    run.updater.optimizer.zero_grad(set_to_none=True)
    calls, started = model.calls, time.perf_counter()
    if batched:
        rollout = roll_out(
            run.pipeline,
            run.sampler,
            run.config.exploring,
            run.config.rollout,
            script,
            embeddings,
            run.config.seed,
            name,
            phases,
            fork,
        )
        A_G = torch.linspace(-1.0, 1.0, rollout.num_branches, dtype=torch.float64)
        replay = Replay(
            run.pipeline, rollout, embeddings, CONTEXTS[run.config.context], run.config.energy
        )
        with phases("replay_old"):
            # of the initial policy; the behaviour policy's are the detached current ones
            reference = replay.energies()
        with phases("replay_grad"):
            shares = list(replay.passes())
            energy_G = torch.zeros(rollout.num_branches, dtype=torch.float64).index_add(
                0, torch.cat([b for b, _ in shares]), torch.cat([s for _, s in shares])
            )
            gradient(run, energy_G, A_G)
    else:
        rollout = one_by_one(run, script, embeddings, fork, name, phases)
        A_G = torch.linspace(-1.0, 1.0, rollout.num_branches, dtype=torch.float64)
        with phases("replay_old"), torch.no_grad():
            energies_one_by_one(run, rollout, embeddings)
            reference = energies_one_by_one(run, rollout, embeddings)
        with phases("replay_grad"):
            energy_G = energies_one_by_one(run, rollout, embeddings)
            gradient(run, energy_G, A_G)
    total = time.perf_counter() - started
    grads = torch.cat([p.grad.flatten() for p in run.policy.parameters])
    return {
        "rollout": rollout,
        "energy": energy_G.detach(),
        "reference": reference,
        "gradient": grads,
        "calls": model.calls - calls,
        "seconds": phases.take() | {"time/total": total},
    }


def peak_mib(pipeline: str, batched: bool) -> float:
    """Most memory of one schedule above what the loaded run holds, MiB.

    It runs in a process of its own, so that neither schedule's leftovers count.
    """
    command = [
        sys.executable,
        __file__,
        "--pipeline",
        pipeline,
        "--peak",
        "batched" if batched else "one-by-one",
    ]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def print_peak(run: Parts, batched: bool) -> None:
    """Print the peak memory of the device, or the resident one, MiB.

    Linux keeps a process's peak in VmHWM, and forgets it when asked.
    """
    run.embed(run.source.script(0, 0))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(run, batched)
        return print((torch.cuda.max_memory_allocated() - before) / 2**20)
    ctypes.CDLL(None).malloc_trim(0)  # else what loading has freed is used again, and not seen
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    measure(run, batched)
    print((resident_kib("VmHWM") - before) / 2**10)


def resident_kib(field: str) -> int:
    return int(
        next(
            line.split()[1]
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )
    )


PAPER = Script("paper", ("a", "b", "c", "d"), (0, 13, 25, 37), 49)
"""147 latent frames, prompts switching at frames 39, 75 and 111."""
PAPER_FORKS = (7, 8, 13, 14, 19, 20, 25, 26, 31, 32, 37, 38)
"""Blocks that the paper's code forks at."""


def counted(fork: int, P: int = 5, S: int = 4) -> dict[str, int]:
    """Calls of our schedule for one group of the paper's shape, its window inside one segment.

    The number of branches does not matter.
    """
    end = horizon(PAPER, Window(fork, P), WAN_GEOMETRY, ScoreConfig())
    return {
        "prefix": (S + 1) * fork,
        "branches and anchor": (S + 1) * (end - fork),
        "replays": 2 * (P - 1 + 1),
    }


def mean_calls(prefixes: int) -> float:
    """Calls of one group, on average over its fork, with so many prefixes side by side.

    They are those of `rollout.prefixes`.
    """
    alone = [counted(fork) for fork in PAPER_FORKS]
    beside = sum(c["branches and anchor"] + c["replays"] for c in alone) / len(alone)
    return longest([c["prefix"] for c in alone], prefixes) / prefixes + beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="mini")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peak",
        choices=("batched", "one-by-one"),
        help="only print how much memory this schedule adds, MiB",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/schedule.json"))
    args = parser.parse_args()
    config = replace(load_config(recipe_path("mini")), pipeline=args.pipeline, kv_routing=EXPLORER)
    run = Parts(config, Progress())
    if args.peak:
        return print_peak(run, args.peak == "batched")
    runs = {True: [], False: []}
    for _ in range(args.repeats):
        ours, theirs = measure(run, True), measure(run, False)
        runs[True].append(ours), runs[False].append(theirs)
    differences = {
        "latents": float((ours["rollout"].latents - theirs["rollout"].latents).abs().max()),
        "energy, relative": float(
            ((ours["energy"] - theirs["energy"]) / ours["energy"]).abs().max()
        ),
        "gradient, relative": float(
            (ours["gradient"] - theirs["gradient"]).norm() / ours["gradient"].norm()
        ),
    }

    def median(batched: bool, phase: str) -> float:
        return statistics.median(r["seconds"][phase] for r in runs[batched])

    phases = ("time/prefix", "time/branches", "time/replay_old", "time/replay_grad", "time/total")
    replays = [median(b, "time/replay_old") + median(b, "time/replay_grad") for b in (True, False)]
    result = {
        "environment": environment(run.device),
        "fork": ours["rollout"].window.fork,
        "blocks": ours["rollout"].script.blocks,
        "calls": {"batched": ours["calls"], "one by one": theirs["calls"]},
        "seconds": {
            p.removeprefix("time/"): {"batched": median(True, p), "one by one": median(False, p)}
            for p in phases
        },
        "peak memory above the loaded run, MiB": {
            "batched": peak_mib(args.pipeline, True),
            "one by one": peak_mib(args.pipeline, False),
        },
        "speedup": {
            "whole step": median(False, "time/total") / median(True, "time/total"),
            "replays": replays[1] / replays[0],
        },
        "largest difference": differences,
        "paper's shape": {
            f"fork {fork}": counted(fork) | {"total": sum(counted(fork).values())}
            for fork in (7, 8, 19, 38)
        },
        "paper's shape, mean calls of a group by prefixes side by side": {
            n: mean_calls(n) for n in (1, 2, 4, 8)
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
