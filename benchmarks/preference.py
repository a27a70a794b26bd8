"""The loop of preferences at scale: a scripted rater with a hidden taste, a model, a training.

    python benchmarks/preference.py --out runs/preference --list      what is done of it
    python benchmarks/preference.py --out runs/preference             all of it, an hour or two on two cores

For each of three tastes (brighter, larger, steadier): 60 pairs of branches of the miniature, forked
in 20 stories and recorded as the studio records them, by a rater who errs in 10 % of them; `kvpo
preference fit`; 60 updates of the recipe mini with the preference beside its own rewards; its
evaluation on 128 unseen scripts. Claimed are a taste that has risen with its interval above 0, and
rewards of the recipe that have not fallen by more than 0.02. The rater speaks to the studio's
library and not through its page. What is finished is not done again: it may be killed at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from kvpo.config import load_config, recipe_path, to_dict
from kvpo.generators.pipeline import Pipeline
from kvpo.mini.source import StorySource
from kvpo.preference.records import FILE, read_lines
from kvpo.rewards.base import VideoBatch
from kvpo.runs.loading import load_generator
from kvpo.studio.library import Library
from kvpo.studio.live import Live, start
from kvpo.studio.tree import Fork, new_tree

PAIRS, PER_STORY, WRONG = 60, 3, 0.1
STEPS, SCRIPTS, ALLOWED = 60, 128, 0.02
FORK = Fork(6, "start_noise", {"window_blocks": 3}, 2 * PER_STORY)
"""Fork of every story: each pair has two branches of its own."""
WEIGHT = 3.0
"""Weight of the preference: that of the recipe's three rewards together."""
COLOURFUL = 50
"""Levels of 255 between the largest and the smallest channel from which on a pixel is an object's."""
Run = Callable[[Sequence[str]], int]


def brighter(batch: VideoBatch) -> torch.Tensor:
    """Mean level of all pixels, in [0, 1]."""
    return batch.frames.float().mean((1, 2, 3, 4)) / 255


def _coloured(batch: VideoBatch) -> torch.Tensor:
    x = batch.frames.int()
    return (x.amax(2) - x.amin(2) > COLOURFUL).float()


def larger(batch: VideoBatch) -> torch.Tensor:
    """Share of pixels that are an object's."""
    return _coloured(batch).mean((1, 2, 3))


def steadier(batch: VideoBatch) -> torch.Tensor:
    """Mean second difference of the objects' centre, pixels a frame squared, negative."""
    mass = _coloured(batch) + 1e-6
    total = mass.sum((2, 3))
    y = (mass.sum(3) * torch.arange(mass.shape[2])).sum(2) / total
    x = (mass.sum(2) * torch.arange(mass.shape[3])).sum(2) / total
    return -torch.stack((x, y), 2).diff(n=2, dim=1).norm(dim=2).mean(1)


TASTES: Mapping[str, Callable[[VideoBatch], torch.Tensor]] = {
    "brighter": brighter,
    "larger": larger,
    "steadier": steadier,
}


def record(folder: Path, taste: str, pipeline: Pipeline, pairs: int = PAIRS) -> None:
    """Record what is left of the pairs; a story's pairs are answered one after the other."""
    library, fps = Library(folder), pipeline.geometry.fps
    done = len(read_lines(folder / FILE)[0])
    for number in range(done // PER_STORY, -(-pairs // PER_STORY)):
        prompt = StorySource(seed=7000).script(0, number).texts[0]
        tree = new_tree(f"story-{number:02d}", "mini", "renoise", 7000 + number, prompt)
        live = start(Live(pipeline, tree, FORK.block + 4, 30, 2**26))
        for _ in range(FORK.block):
            live.advance()
        group = live.fork(FORK)
        while not group.complete:
            group.advance()
        pixels = torch.cat(group.pixels, dim=1)
        for pair in range(PER_STORY):
            at = number * PER_STORY + pair
            if not done <= at < pairs:
                continue
            rows = [2 * pair, 2 * pair + 1]
            left, right = TASTES[taste](VideoBatch(pixels[rows], fps, ("",) * 2)).tolist()
            answer = "left" if (left > right) != errs(at, pairs) else "right"
            library.compared("scripted", tree, group, rows, answer, fps)


def errs(pair: int, pairs: int) -> bool:
    """Whether the rater errs at this pair: every tenth of a fixed shuffle."""
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(11)).tolist()
    return order[pair] < round(WRONG * pairs)


def recipe(folder: Path, taste: str) -> dict[str, Any]:
    """The recipe mini with the preference beside its rewards, and the taste as an evaluator."""
    content = to_dict(load_config(recipe_path("mini")))
    content["rewards"] = [
        *content["rewards"],
        {"name": f"preference:{folder / 'model'}", "weight": WEIGHT},
        {"name": f"benchmarks.preference:{taste}", "role": "eval"},
    ]
    content["steps"] = STEPS
    content["evaluate"] |= {"scripts": SCRIPTS}
    return content


def verdict(run: Path, taste: str) -> dict[str, Any]:
    """Differences of the last evaluation, and whether both claims hold."""
    last = sorted((run / "evaluation").glob("ema-step-*.json"))[-1]
    rows = {row["component"]: row for row in json.loads(last.read_text())["rows"]}
    kept = {
        n: r["diff"] for n, r in rows.items() if n.startswith("world_") and r["diff"] is not None
    }
    return {
        "taste": {key: rows[taste][key] for key in ("diff", "low", "high")},
        "risen": rows[taste]["low"] > 0,
        "rewards": kept,
        "kept": min(kept.values()) > -ALLOWED,
    }


def benchmark(out: Path, taste: str, run: Run) -> dict[str, Any] | None:
    """All that is left for one taste; None where a step failed."""
    folder, trained = out / taste, out / taste / "run"
    if len(read_lines(folder / "answers" / FILE)[0]) < PAIRS:
        record(folder / "answers", taste, load_generator("mini")[0])
    fit = ["preference", "fit", str(folder / "answers"), "--out", str(folder / "model")]
    if not (folder / "model").exists() and run(fit):
        return None
    if not (trained / "report.html").exists():
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(folder, taste)), encoding="utf-8")
        resume = ["--resume"] if (trained / "config.resolved.yaml").exists() else []
        if run(["align", str(path), "--out", str(trained), *resume]):
            return None
    return verdict(trained, taste)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is done, or do what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/preference"))
    parser.add_argument("--list", action="store_true", help="print what is done and run nothing")
    args = parser.parse_args(argv)
    if args.list:
        for taste in TASTES:
            answers = len(read_lines(args.out / taste / "answers" / FILE)[0])
            parts = [(args.out / taste / name).exists() for name in ("model", "run/report.html")]
            print(f"{taste:10} answers {answers}/{PAIRS}, fitted {parts[0]}, trained {parts[1]}")
        return

    def run(command: Sequence[str]) -> int:
        return subprocess.run([sys.executable, "-m", "kvpo", *command]).returncode

    for taste in TASTES:
        print(taste, json.dumps(benchmark(args.out, taste, run)))


if __name__ == "__main__":
    main()
