"""Where does each explorer's diversity come from, and what is it worth?  KV routing against start noise at equal branches.

For many groups: the rewards' spread, the best branch minus the anchor, and how far branches differ low-level (pixels) and in
meaning (attributes, by the held-out classifier), split by stories that need memory and stories that do not.

    python benchmarks/exploration.py [--generator mini] [--groups 24]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.align import Alignment
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.environment import environment
from kvpo.exploration.kv_routing import KVRouting
from kvpo.exploration.noise import StartNoise
from kvpo.loading import load_generator
from kvpo.mini.source import StorySource
from kvpo.progress import Progress
from kvpo.rewards.attributes import load_network
from kvpo.rewards.heldout import diversity
from kvpo.rollout import roll_out
from kvpo.score import score
from kvpo.timing import Phases

EXPLORERS = {
    **{f"routing, nearest {n}, P {p}": KVRouting(nearest=n, window_blocks=p) for p in (3, 1) for n in (1, 2, 3, 4)},
    **{f"start noise {m}, P {p}": StartNoise(mix=m, window_blocks=p) for p in (3, 1) for m in (0.5, 1.0)},
}


def story_fork(story, explorer, geometry) -> int:
    """The last prompt switch that can be a fork (in a memory story: where the object comes out again), else the middle one."""
    eligible = explorer.eligible_forks(story.script.blocks, geometry)
    switches = [s for s in story.script.starts if s in eligible]
    return switches[-1] if switches else eligible[len(eligible) // 2]


def measure(run: Alignment, network, explorer, story, name, cache_frames: int, fork: int) -> dict[str, float]:
    embeddings = run.embed(story.script)
    rollout_config = replace(run.config.rollout, cache_frames=cache_frames)
    rollout = roll_out(run.pipeline, run.sampler, explorer, rollout_config, story.script, embeddings, run.config.seed, name, Phases(), fork)
    table, pixels = score(run.pipeline, rollout, run.rewards, run.config.score, Phases())
    r_KB = (table.local + table.global_) / 2
    r_B = r_KB.mean(dim=0)
    length = 4 * rollout.trajectory.clean.shape[1] * rollout.trajectory.clean.shape[2]
    apart = diversity(pixels[:-1, :length], network)
    best = {f"best - anchor, {n}": float(r[:-1].max() - r[-1]) for n, r in zip(table.components, r_KB)}
    return {
        "mean - anchor": float(r_B[:-1].mean() - r_B[-1]), "std": float(r_B[:-1].std()), "best > anchor": float(r_B[:-1].max() > r_B[-1]),
        "best - anchor": float(r_B[:-1].max() - r_B[-1]), **best, "pixel diversity": apart["pixels"], "attribute diversity": apart["attributes"],
    }  # fmt: skip


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", default="mini")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--cache-frames", type=int, default=0, help="frames the prefix keeps; 0 = the recipe's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exploration.json"))
    args = parser.parse_args()
    config: RunConfig = load_config(recipe_path("mini"))
    progress = Progress()
    run = Alignment(config, Path("."), progress)
    run.pipeline, label = load_generator(args.generator, run.device, config.vae_dtype)
    run.pipeline.generator.requires_grad_(False)
    network, results = load_network(), {}
    with progress.bar("explore", len(EXPLORERS) * 2 * args.groups) as bar, torch.no_grad():
        for memory in (True, False):
            source = StorySource(config.evaluate.seed, "explore", config.data.blocks, 1.0 if memory else 0.0)
            for name, explorer in EXPLORERS.items():
                rows = []
                for i in range(args.groups):
                    story = source.story(0, i)
                    fork = story_fork(story, explorer, run.pipeline.geometry)
                    rows.append(measure(run, network, explorer, story, ("explore", i), args.cache_frames or config.rollout.cache_frames, fork))
                    bar.advance()
                results.setdefault("memory stories" if memory else "other stories", {})[name] = mean(rows)
    record = {"environment": environment(run.device), "generator": label, "groups": args.groups, "branches": config.rollout.branches, "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for kind, table in results.items():
        columns = ["mean - anchor", "std", "best > anchor", "best - anchor", "pixel diversity", "attribute diversity"]
        print(f"\n{kind}\n| explorer | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
        for name, row in table.items():
            print(f"| {name} | " + " | ".join(f"{row[c]:.4f}" for c in columns) + " |")


if __name__ == "__main__":
    main()
