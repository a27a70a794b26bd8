"""The loop of preferences at scale: a scripted rater with a hidden taste, a model, a training.

    python benchmarks/preference.py --out runs/preference --list      what is done of it
    python benchmarks/preference.py --out runs/preference             all of it, two hours of one quiet core

For each of three tastes (brighter, larger, steadier): 60 pairs of branches of the miniature, forked
in 20 stories and recorded as the studio records them, by a rater who errs in 10 % of them; `kvpo
preference fit`; a training; 128 stories that nothing was chosen by, before and after. Arms:

    alone    the recipe as the studio's button changes it: the preference alone, with the KL
    beside   the recipe with the preference beside its own rewards, as heavy as all of them together
    recipe   the recipe without any preference, one run for all tastes: what it does to them itself

Claimed are a taste that has risen with its interval above 0, and exact rewards that have not fallen
by more than 0.02. The rater speaks to the studio's library and not through its page. The stories
are forked once for all tastes and the start weights measured once for all runs; what is finished is
not done again, so it may be killed at any time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from claims import claimed_by, interval_text, must_align, over_scripts, values

from kvpo.common.files import write_atomic
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path, to_dict
from kvpo.generators.pipeline import Pipeline
from kvpo.mini.source import StorySource
from kvpo.preference.records import FILE, read_lines
from kvpo.preference.saved import ABOUT, read
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.entry import RewardEntry
from kvpo.rewards.registry import PREFERENCE
from kvpo.runs.build import evaluation_scripts
from kvpo.runs.loading import load_generator
from kvpo.studio.aligning import align_to
from kvpo.studio.group import Group
from kvpo.studio.library import Library
from kvpo.studio.live import Live, start
from kvpo.studio.tree import Fork, Tree, new_tree

PAIRS, PER_STORY, WRONG = 60, 3, 0.1
FEATURES = ("frames",)
"""The cheapest set; the others take minutes of a fit, and a second of every group that trains."""
SCRIPTS, EVALUATION_SEED, ALLOWED = 128, 9000, 0.02
FIRST_FORK, FORKS = 4, 8
"""Stories are forked at one of so many blocks from the first on, in turn, most behind a switch."""
EXACT = {"world_vq": "VQ", "world_mq": "MQ", "world_ta": "TA"}
"""Exact reward of the recipe -> its name in a table."""
WEIGHT = float(len(EXACT))
"""Weight of the preference beside the recipe's rewards: that of all of them together."""
COLOURFUL = 50
"""Levels of 255 between the largest and the smallest channel from which on a pixel is an object's."""


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


# --- Answers ---


def told(pipeline: Pipeline, number: int) -> tuple[Tree, Group]:
    """Tell a story of training's kind up to its fork, and make its branches, two for each pair."""
    script = StorySource(7000, blocks=15, memory=0.0, segments=4).script(0, number)
    tree = new_tree(f"story-{number:02d}", "mini", "renoise", 7000 + number, script.texts[0])
    # Behind its first block the miniature hardly looks at noise: branches of start noise are alike.
    fork = Fork(FIRST_FORK + number % FORKS, "kv_routing", {"window_blocks": 2}, 2 * PER_STORY)
    live = start(Live(pipeline, tree, script.blocks, 33, 2**26))
    for block in range(fork.block + 1):
        if block in script.starts:
            live.say(script.texts[script.starts.index(block)])
        if block < fork.block:
            live.advance()
    group = live.fork(fork)
    while not group.complete:
        group.advance()
    return tree, group


def record(out: Path, pipeline: Pipeline, pairs: int = PAIRS) -> None:
    """Record what is left of every taste's pairs; a story's pairs are answered one after another."""
    done = {taste: answered(out, taste) for taste in TASTES}
    fps = pipeline.geometry.fps
    for number in range(min(done.values()) // PER_STORY, -(-pairs // PER_STORY)):
        tree, group = told(pipeline, number)
        pixels = torch.cat(group.pixels, dim=1)
        for taste, likes in TASTES.items():
            library = Library(out / "answers" / taste)
            for at in range(number * PER_STORY, min(pairs, (number + 1) * PER_STORY)):
                if at < done[taste]:
                    continue
                rows = [2 * (at % PER_STORY), 2 * (at % PER_STORY) + 1]
                left, right = likes(VideoBatch(pixels[rows], fps, ("",) * 2)).tolist()
                answer = "left" if (left > right) != errs(at, pairs) else "right"
                library.compared("scripted", tree, group, rows, answer, fps)


def answered(out: Path, taste: str) -> int:
    return len(read_lines(out / "answers" / taste / FILE)[0])


def errs(pair: int, pairs: int) -> bool:
    """Whether the rater errs at this pair: every tenth of a fixed shuffle."""
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(11)).tolist()
    return order[pair] < round(WRONG * pairs)


# --- Training ---


def alone(recipe: RunConfig, model: Path) -> RunConfig:
    return align_to(recipe, model)


def beside(recipe: RunConfig, model: Path) -> RunConfig:
    trained = RewardEntry(f"{PREFERENCE}{model}", weight=WEIGHT)
    return replace(recipe, rewards=(*recipe.rewards, trained))


ARMS: Mapping[str, Callable[[RunConfig, Path], RunConfig]] = {"alone": alone, "beside": beside}
CONTROL = "recipe"


def train(name: str, config: RunConfig, out: Path) -> Path:
    """Train, or go on with, the run of this name; returns its folder.

    It evaluates hardly anything itself: all runs are measured in one way afterwards.
    """
    run, path = out / "runs" / name, out / "recipes" / f"{name}.yaml"
    few = replace(config.evaluate, scripts=2, every=0, videos=0)
    write_atomic(path, yaml.safe_dump(to_dict(replace(config, evaluate=few)), sort_keys=False))
    must_align(run, str(path))
    return run


# --- Numbers ---


def measuring(recipe: RunConfig, out: Path) -> RunConfig:
    """The recipe with what is measured of every run: exact rewards, hidden tastes, fitted models."""
    exact = [entry for entry in recipe.rewards if entry.name in EXACT]
    tastes = [RewardEntry(f"benchmarks.preference:{taste}", role="eval") for taste in TASTES]
    models = [RewardEntry(f"{PREFERENCE}{model}", role="guard") for model in fitted(out).values()]
    config = claimed_by(recipe, SCRIPTS, EVALUATION_SEED)
    return replace(config, rewards=(*exact, *tastes, *models))


def fitted(out: Path) -> dict[str, Path]:
    """Taste -> its model, of those that could be fitted."""
    folders = {taste: (out / "models" / taste).resolve() for taste in TASTES}
    return {taste: folder for taste, folder in folders.items() if (folder / ABOUT).is_file()}


def difference(
    start: Mapping[str, torch.Tensor], run: Mapping[str, torch.Tensor], name: str
) -> tuple[float, float, float]:
    """Mean paired difference of a component and its 95 % interval over scripts."""
    return over_scripts(run[name] - start[name], "preference", name)


def verdict(
    taste: str, start: Mapping[str, torch.Tensor], run: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Differences of one run, and whether both claims hold of it."""
    found = {name: difference(start, run, name) for name in start if name in run}
    return {
        "differences": found,
        "risen": found[taste][1] > 0,
        "kept": min(found[name][0] for name in EXACT.values()) >= -ALLOWED,
    }


def lines_of(
    name: str, start: Mapping[str, torch.Tensor], run: Mapping[str, torch.Tensor]
) -> list[str]:
    """A row of the table for every run: difference of every component, and the claims."""
    arm, _, taste = name.partition("-")
    found = {key: interval_text(*difference(start, run, key)) for key in start if key in run}
    claims = "| |"
    if taste:
        said = verdict(taste, start, run)
        claims = f"{'yes' if said['risen'] else 'no'} | {'yes' if said['kept'] else 'no'}"
    return [f"| {arm} | {taste} | " + " | ".join(found.values()) + f" | {claims} |"]


def table(start: Mapping[str, torch.Tensor], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: every run against the start weights."""
    head = ["arm", "taste", *start, "risen", "exact rewards kept"]
    means = [f"{float(start[key].nanmean()):.4f}" for key in start]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines.append("| start weights | | " + " | ".join(means) + " | | |")
    for name, run in runs.items():
        lines += lines_of(name, start, run)
    return "\n".join(lines) + "\n"


def fit(out: Path) -> list[str]:
    """Fit what is left to fit; returns a sentence on every model."""
    said = []
    for taste in TASTES:
        model, refusal = out / "models" / taste, out / "models" / f"{taste}.txt"
        if not (model / ABOUT).is_file() and not refusal.is_file():
            command = [sys.executable, "-m", "kvpo", "preference", "fit"]
            done = subprocess.run(
                [
                    *command,
                    str(out / "answers" / taste),
                    "--out",
                    str(model),
                    "--features",
                    *FEATURES,
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                write_atomic(refusal, done.stderr)
        if refusal.is_file():
            said.append(f"{taste}: refused: {refusal.read_text().strip().splitlines()[-1]}")
            continue
        about = read(model).about
        n = about["numbers"]
        low, high = n["interval"]
        said.append(
            f"{taste}: {', '.join(about['sets'])}; held-out accuracy {n['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {n['judged']} answers, log loss {n['log_loss']:.3f}"
        )
    return said


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is done, or do what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/preference"))
    parser.add_argument("--arms", nargs="+", default=[*ARMS, CONTROL], choices=[*ARMS, CONTROL])
    parser.add_argument("--list", action="store_true", help="print what is done and run nothing")
    args = parser.parse_args(argv)
    out, recipe = args.out, load_config(recipe_path("mini"))
    if args.list:
        for taste in TASTES:
            print(
                f"{taste:10} answers {answered(out, taste)}/{PAIRS}, fitted {taste in fitted(out)}"
            )
        print("measured:", ", ".join(sorted(p.stem for p in (out / "values").glob("*.json"))))
        return
    if any(answered(out, taste) < PAIRS for taste in TASTES):
        record(out, load_generator("mini")[0])
    facts, models = fit(out), fitted(out)
    print("\n".join(facts), flush=True)
    config, progress = measuring(recipe, out), Progress()
    scripts = evaluation_scripts(config)
    start = values("mini", config, scripts, out / "values" / "start.json", progress)
    runs: dict[str, Mapping[str, torch.Tensor]] = {}
    for arm in args.arms:
        own = {f"{arm}-{t}": ARMS[arm](recipe, m) for t, m in models.items()} if arm in ARMS else {}
        for name, trained in (own or {arm: recipe}).items():
            folder, path = train(name, trained, out), out / "values" / f"{name}.json"
            runs[name] = values(f"{folder}:ema", config, scripts, path, progress)
            write_atomic(out / "preference.md", "\n\n".join((*facts, table(start, runs))))
    print((out / "preference.md").read_text())


if __name__ == "__main__":
    main()
