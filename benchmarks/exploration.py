"""Source and worth of each explorer's diversity: KV routing against start noise.

Both have equally many branches.

For many groups: the rewards' spread, the best branch minus the anchor, and how far branches differ
low-level (pixels) and in meaning (attributes, by the held-out classifier), split by stories that
need memory and stories that do not, and by where they fork. Groups of one story are the same for
all explorers but for what the explorer does.

    python benchmarks/exploration.py [--generator mini] [--groups 12]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from kvpo.common.environment import environment
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.method.explorers import StartNoise
from kvpo.method.routing import KVRouting
from kvpo.mini.rewards.attributes import load_network
from kvpo.mini.rewards.heldout import diversity
from kvpo.mini.source import StorySource
from kvpo.runs.loading import load_generator
from kvpo.runs.parts import Parts
from kvpo.types import Script

KINDS = {"memory stories": 1.0, "other stories": 0.0}
"""Kind of stories -> share of them that only the past can resolve."""
EXPLORERS = {
    **{
        f"routing, nearest {n}, P {p}": KVRouting(nearest=n, window_blocks=p)
        for p in (3, 1)
        for n in (1, 2, 3, 4)
    },
    **{
        f"start noise {m}, P {p}": StartNoise(mix=m, window_blocks=p)
        for p in (3, 1)
        for m in (0.5, 1.0)
    },
}
ELSEWHERE = ("routing, nearest 1, P 3", "routing, nearest 2, P 1", "start noise 0.5, P 1")
"""Explorers that are also measured at the forks away from a switch."""


def at_switch(script: Script, eligible: list[int]) -> int:
    """The last prompt switch that can be a fork, else the middle block that can.

    In a memory story the object comes out again there.
    """
    switches = [s for s in script.starts if s in eligible]
    return switches[-1] if switches else eligible[len(eligible) // 2]


FORKS = {
    "at a switch": at_switch,
    "earliest": lambda script, eligible: eligible[0],
    "latest": lambda script, eligible: eligible[-1],
}


def forks_of_all(blocks: int, geometry) -> list[int]:
    """Blocks at which every explorer can fork.

    So all of them are compared at the same places.
    """
    return sorted(
        set.intersection(*(set(e.eligible_forks(blocks, geometry)) for e in EXPLORERS.values()))
    )


def measure(run: Parts, network, explorer, story, name, fork: int) -> dict[str, float]:
    rollout, table, pixels = run.explore(
        story.script, run.embed(story.script), name, explorer, fork
    )
    r_KB = (table.local + table.global_) / 2
    r_B = r_KB.mean(dim=0)
    length = 4 * rollout.trajectory.clean.shape[1] * rollout.trajectory.clean.shape[2]
    apart = diversity(pixels[:-1, :length], network)
    best = {
        f"best - anchor, {n}": float(r[:-1].max() - r[-1]) for n, r in zip(table.components, r_KB)
    }
    return {
        "mean - anchor": float(r_B[:-1].mean() - r_B[-1]),
        "std": float(r_B[:-1].std()),
        "best > anchor": float(r_B[:-1].max() > r_B[-1]),
        "best - anchor": float(r_B[:-1].max() - r_B[-1]),
        **best,
        "pixel diversity": apart["pixels"],
        "attribute diversity": apart["attributes"],
    }


def mean_and_error(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Name -> mean over the groups and its standard error."""
    columns = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
    return {k: (float(x.mean()), float(x.std()) / math.sqrt(len(rows))) for k, x in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", default="mini")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exploration.json"))
    args = parser.parse_args()
    config: RunConfig = load_config(recipe_path("mini"))
    progress = Progress()
    run = Parts(config, progress)
    run.pipeline, label = load_generator(args.generator, run.device, config.vae_dtype, config.dtype)
    run.pipeline.generator.requires_grad_(False)
    network, results = load_network(), {}
    eligible = forks_of_all(config.data.blocks, run.pipeline.geometry)
    cases = [
        (kind, where, name)
        for kind in KINDS
        for where in FORKS
        for name in EXPLORERS
        if where == "at a switch" or name in ELSEWHERE
    ]
    with progress.bar("explore", len(cases) * args.groups) as bar, torch.no_grad():
        for kind, where, name in cases:
            source = StorySource(config.evaluate.seed, "explore", config.data.blocks, KINDS[kind])
            explorer = EXPLORERS[name]
            rows = []
            for i in range(args.groups):
                story = source.story(0, i)
                fork = FORKS[where](story.script, eligible)
                rows.append(measure(run, network, explorer, story, ("explore", i), fork))
                bar.advance()
            results.setdefault(f"{kind}, fork {where}", {})[name] = mean_and_error(rows)
    record = {
        "environment": environment(run.device),
        "generator": label,
        "groups": args.groups,
        "branches": config.rollout.branches,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for kind, table in results.items():
        columns = [
            "mean - anchor",
            "std",
            "best > anchor",
            "best - anchor",
            "pixel diversity",
            "attribute diversity",
        ]
        print(
            f"\n{kind}\n| explorer | "
            + " | ".join(columns)
            + " |\n|---" * 1
            + "|---" * len(columns)
            + "|"
        )
        for name, row in table.items():
            print(
                f"| {name} | "
                + " | ".join(f"{row[c][0]:.4f} ({row[c][1]:.4f})" for c in columns)
                + " |"
            )


if __name__ == "__main__":
    main()
