"""Rank correlation of a preview decoder's rewards with the full decoder's, on branches of training.

Groups of the start weights, each decoded and scored twice; by reward and signal the mean of
Spearman's correlation within a group, over branches and anchor, and its standard error. 1 = training
on the preview decoder follows the same order of the branches.

    python benchmarks/preview.py longlive --preview taew2_1.safetensors [--groups 24] [--out FILE]
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
from kvpo.common.weights import identity
from kvpo.config import load_config, recipe_path
from kvpo.doctor.preview_ranks import Agreement, preview_agreement
from kvpo.runs.parts import Parts


def measured(run: Parts, groups: int, progress: Progress) -> list[Agreement]:
    """Both decoders on so many groups that no training reaches."""
    found = []
    with progress.bar("explore", groups) as bar, torch.no_grad():
        for i in range(groups):
            script = run.source.script(1000, i)
            rollout, *_ = run.explore(script, run.embed(script), ("preview", i))
            found.append(preview_agreement(run, rollout))
            bar.advance()
    return found


def summary(found: list[Agreement]) -> dict[str, dict[str, float]]:
    """``signal reward`` -> mean, standard error, and the groups that have a correlation."""
    results = {}
    for key in found[0].ranks:
        x = torch.tensor([f.ranks[key] for f in found])
        x = x[x.isfinite()]
        error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        results[" ".join(key)] = {"mean": float(x.mean()), "error": error, "groups": len(x)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--preview", default="", help="default: the recipe's")
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = load_config(recipe_path(args.recipe))
    if args.preview:
        config = replace(config, score=replace(config.score, preview=args.preview))
    progress = Progress()
    run = Parts(config, progress)
    found = measured(run, args.groups, progress)
    results = summary(found)
    for key, r in results.items():
        print(f"{key:32s} {r['mean']:+.3f} ({r['error']:.3f})  {r['groups']} groups")
    apart = sum(f.pixels for f in found) / len(found)
    print(f"pixels differ by {apart:.2f} of 255 on average")
    if args.out:
        content = {
            "environment": environment(run.device),
            "recipe": args.recipe,
            "preview": identity("preview", [Path(config.score.preview)]),
            "groups": args.groups,
            "results": results,
            "pixels": apart,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
