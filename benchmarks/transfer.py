"""Gains of alignment where nothing was trained: longer videos, other words, another sampler.

    python benchmarks/transfer.py RUN:ema [RUN:ema ...] [--recipe mini] [--scripts 64]
        [--evaluation-seed 9001] [--out runs/transfer]

Every cell is a paired difference to the start weights, same scripts and noise:

    as trained    scripts of the recipe's kind; none of them was looked at, and their noise is new too
    longer        videos of three times as many blocks, with the four prompts that a story may have
    other words   sentences that the grammar of the training prompts does not have, in words that it has
    ode           the sampler without noise between its steps, which no update has seen

And the visual quality of the last fifth of 147 latent frames over that of the first, of each of the
weights. What is measured is kept in OUT, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
from claims import claimed_by, interval_text, over_seeds, values

from kvpo.api.shared import loaded
from kvpo.common.files import write_atomic
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.evaluation.intervals import TOTAL
from kvpo.mini.pretraining.card import LONG, held_out, videos
from kvpo.mini.rewards.facts import decay
from kvpo.mini.stories import understand
from kvpo.mini.world import Scene
from kvpo.rewards.base import VideoBatch
from kvpo.runs.build import evaluation_scripts
from kvpo.types import Script

LONGER = 3
MOTIONS = {
    "left": "goes to the left",
    "right": "goes to the right",
    "up": "goes up",
    "down": "goes down",
    "circle": "goes round",
    "bounce": "keeps hops",
}
PLACES = {"night": "the night sky", "paper": "a place as paper", "stripes": "grey stripes"}


def in_other_words(script: Script) -> Script:
    """The same story in sentences that `kvpo.mini.stories` does not write."""
    scenes = understand(script.texts)
    texts = [_sentence(scenes[0])]
    for before, scene in itertools.pairwise(scenes):
        texts.append(_change(before, scene))
    other = replace(script, texts=tuple(texts))
    if understand(other.texts) != scenes:
        raise ValueError(f"{other.texts} does not say what {script.texts} says")
    return other


def _sentence(scene: Scene) -> str:
    pillar = " with a pillar" if scene.pillar else ""
    return (
        f"there is a {scene.size} {scene.colour} {scene.shape}, it {MOTIONS[scene.motion]} "
        f"{scene.speed}, over {PLACES[scene.place]}{pillar}"
    )


def _change(before: Scene, scene: Scene) -> str:
    if scene.colour != before.colour:
        return f"then there is a {scene.colour} one"
    if scene.shape != before.shape:
        return f"then there is a {scene.shape}"
    if scene.motion == "hide":
        return f"and then it hides {scene.speed} behind the pillar"
    return f"and then the {scene.shape} {MOTIONS[scene.motion]} {scene.speed}"


def variants(config: RunConfig) -> dict[str, tuple[RunConfig, list[Script]]]:
    """Name -> the configuration it is evaluated by, and its scripts."""
    data = replace(config.data, blocks=LONGER * config.data.blocks, segments=4)
    longer, scripts = replace(config, data=data), evaluation_scripts(config)
    return {
        "as trained": (config, scripts),
        "longer": (longer, evaluation_scripts(longer)),
        "other words": (config, [in_other_words(script) for script in scripts]),
        "ode": (replace(config, sampler="ode"), scripts),
    }


def last_over_first(spec: str, config: RunConfig, number: int, path: Path) -> torch.Tensor:
    """Quality of the last fifth of 147 latent frames over the first's, per video, kept in ``path``."""
    if not path.exists():
        pipeline, _ = loaded(spec, torch.device("cpu"), config)
        stories = held_out(number, blocks=LONG, memory=False)
        clips = VideoBatch(
            videos(pipeline, stories, config.sampler),
            float(pipeline.geometry.fps),
            tuple(story.script.texts[0] for story in stories),
        )
        write_atomic(path, json.dumps(decay(clips).tolist()) + "\n")
    return torch.tensor(json.loads(path.read_text()), dtype=torch.float64)


def row(name: str, start: dict[str, torch.Tensor], runs: list[dict[str, torch.Tensor]]) -> str:
    """One line of the table: the start's mean, then every component's gain over all runs."""
    cells = [name, f"{float(start[TOTAL].nanmean()):.3f}"]
    for component in start:
        diff_SN = torch.stack([run[component] - start[component] for run in runs])
        diff_SN = diff_SN[:, diff_SN.isfinite().all(dim=0)]
        cells.append(interval_text(*over_seeds(diff_SN, f"transfer {name} {component}")))
    return "| " + " | ".join(cells) + " |"


def file_name(spec: str) -> str:
    """A generator's name without the folders' separators."""
    return spec.replace("/", "_")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="aligned generators, such as runs/align:ema")
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--scripts", type=int, default=64)
    parser.add_argument("--evaluation-seed", type=int, default=9001)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    recipe, progress = load_config(recipe_path(args.recipe)), Progress()
    config = claimed_by(recipe, args.scripts, args.evaluation_seed)
    kept = args.out / f"values-{args.evaluation_seed}-{args.scripts}"
    lines: list[str] = []
    for name, (changed, scripts) in variants(config).items():
        found = [
            values(
                spec,
                changed,
                scripts,
                kept / name.replace(" ", "_") / f"{file_name(spec)}.json",
                progress,
            )
            for spec in (config.pipeline, *args.runs)
        ]
        if not lines:
            lines = [
                f"| scripts | start | {' | '.join(found[0])} |",
                "|---" * (2 + len(found[0])) + "|",
            ]
        lines.append(row(name, found[0], found[1:]))
        write_atomic(args.out / "transfer.md", "\n".join(lines) + "\n")
    number = max(2, args.scripts // 4)
    lines.append(
        f"\nVisual quality of the last fifth of 147 latent frames over the first's, {number} videos:\n"
    )
    for spec in (config.pipeline, *args.runs):
        kept_N = last_over_first(spec, config, number, kept / f"long_{file_name(spec)}.json")
        lines.append(f"- {spec}: {float(kept_N.nanmean()):.3f}")
    write_atomic(args.out / "transfer.md", "\n".join(lines) + "\n")
    print((args.out / "transfer.md").read_text())


if __name__ == "__main__":
    main()
