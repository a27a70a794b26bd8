"""Correlation of a recipe's trained rewards with its evaluators, on branches of training.

For many groups of the start weights: Spearman's rank correlation over branches and anchor, of every
trained reward with every other one, on the global signal; mean over groups and its standard error.
0 = a group's ranking says nothing of the other.

    python benchmarks/reward_signal.py [mini_offline] [--groups 24]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.common.environment import environment
from kvpo.common.progress import Progress
from kvpo.config import load_config, recipe_path
from kvpo.method.advantages import spearman
from kvpo.rewards.scorer import load_rewards
from kvpo.runs.parts import Parts


def correlations(
    components: tuple[str, ...], trained: list[str], r_KB: torch.Tensor
) -> dict[str, float]:
    """``trained ~ other`` -> rank correlation in one group over the rows that have both.

    NaN where one is constant.
    """
    rows = dict(zip(components, r_KB))
    pairs = [(a, b) for a in trained for b in components if a != b]
    both = {pair: rows[pair[0]].isfinite() & rows[pair[1]].isfinite() for pair in pairs}
    return {f"{a} ~ {b}": spearman(rows[a][both[a, b]], rows[b][both[a, b]]) for a, b in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="mini_offline")
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reward_signal.json"))
    args = parser.parse_args()
    config = load_config(recipe_path(args.recipe))
    progress = Progress()
    run = Parts(config, progress)
    trained = [r.spec.name for r in run.rewards]
    run.rewards = load_rewards(
        [replace(entry, role="train") for entry in config.rewards], run.device
    )
    groups = []
    with progress.bar("explore", args.groups) as bar, torch.no_grad():
        for i in range(args.groups):
            script = run.source.script(1000, i)  # steps that no training reaches
            _, table, _ = run.explore(script, run.embed(script), ("signal", i))
            groups.append(correlations(table.components, trained, table.global_))
            bar.advance()
    results = {}
    for pair in groups[0]:
        x = torch.tensor([g[pair] for g in groups])
        x = x[x.isfinite()]
        results[pair] = {
            "mean": float(x.mean()),
            "error": float(x.std()) / math.sqrt(max(1, len(x))),
            "groups": len(x),
        }
        print(
            f"{pair:32s} {results[pair]['mean']:+.3f} ({results[pair]['error']:.3f})  {len(x)} groups"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {
                "environment": environment(run.device),
                "recipe": args.recipe,
                "groups": args.groups,
                "results": results,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
