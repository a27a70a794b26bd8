"""`kvpo rewards`: which there are, what one says of a video, whether a recipe's can be cheated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from kvpo.commands.options import Positional
from kvpo.common.environment import command, pick_device
from kvpo.common.files import try_file, write_atomic
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.rewards.entry import RewardEntry

if TYPE_CHECKING:
    from kvpo.rewards.base import RewardSpec, VideoBatch
    from kvpo.rewards.calibration import Verdict


@dataclass(frozen=True)
class List:
    """Every reward that has a name: what it looks at, its licence, whether it can run here."""

    def __call__(self) -> None:
        from kvpo.rewards.registry import find, known

        rows = [_listed(name, find(name).spec) for name in known()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@dataclass(frozen=True)
class Score:
    """Score a video by one reward."""

    file: Positional[Path]
    """An mp4."""
    reward: str
    """A name of `kvpo rewards list`, or package.module:Class."""
    prompt: str = ""
    params: tuple[str, ...] = ()
    """Parameters of the reward, key=value each."""
    seconds: float = 0.0
    """Length of the clips that the video is cut into, 0 = the whole video is one."""
    device: str = "auto"

    def __call__(self) -> None:
        from kvpo.common.video import read_mp4
        from kvpo.rewards.base import VideoBatch
        from kvpo.rewards.scorer import load_rewards, make_scorers

        if not 0.0 <= self.seconds < math.inf:
            raise ValueError(
                f"--seconds {self.seconds:g} is no length of a clip; give more than 0, or 0 for the whole video"
            )
        device = pick_device(self.device)
        entry = RewardEntry(self.reward, params=dict(map(_param, self.params)))
        # Weights of 20 GiB are not loaded for a video that is not there.
        (unloaded,) = make_scorers([entry])
        if unloaded.spec.needs_prompt and not self.prompt:
            raise ValueError(
                f"reward {self.reward!r} judges how a video fits its prompt: give --prompt"
            )
        video, fps = read_mp4(self.file, original=True)
        (scorer,) = load_rewards([entry], device)
        length = round(self.seconds * fps) or len(video)
        for first in range(0, len(video) - min(length, len(video)) + 1, length):
            output = scorer.score(
                VideoBatch(video[None, first : first + length], fps, (self.prompt,))
            )
            parts = "  ".join(f"{name} {value.item():.4f}" for name, value in output.parts.items())
            score = f"{output.scores.item():.4f}" if output.valid.item() else "can not be measured"
            print(
                f"{first / fps:6.2f} s  {scorer.spec.name} {score}  {parts}  ({output.info['seconds']:.2f} s)"
            )


@dataclass(frozen=True)
class Calibrate:
    """Check that spoilt copies of good clips score below the good ones.

    It shows which flaws a recipe's rewards see, each and together.
    """

    recipe: Positional[str]
    clips: Path | None = None
    """Folder of good videos with clips.csv (columns file, prompt).
    Default: the recipe's, or the miniature's true clips."""
    count: int = 16
    """Clips of the miniature."""
    out: Path = Path("runs/calibration.json")
    device: str = "auto"

    def __call__(self) -> None:
        if self.clips and self.count != Calibrate.count:
            raise ValueError(
                f"--count {self.count} is of the miniature's clips, and --clips gives others; leave one out"
            )
        config = load_config(recipe_path(self.recipe))
        try_file(self.out)
        from kvpo.rewards.calibration import FLAWS, MAY_PASS, MUST_WIN, calibrate
        from kvpo.rewards.scorer import load_rewards
        from kvpo.runs.build import trained

        device, batches = pick_device(self.device), _clips(self, config)
        scorers = trained(load_rewards(config.rewards, device))
        weights, progress = {s.spec.name: s.entry.weight for s in scorers}, Progress()
        table: dict[str, dict[str, Verdict]] = {}
        with progress.bar("calibrate", len(FLAWS)) as bar:
            for flaw in FLAWS:
                table |= calibrate(scorers, batches, weights, flaws=[flaw])
                bar.advance(flaw)
        progress.say(_table(table, [*weights, "all"]))
        verdicts = {
            flaw: {name: [verdict.won, verdict.margin] for name, verdict in row.items()}
            for flaw, row in table.items()
        }
        write_atomic(
            self.out,
            json.dumps(
                {
                    "recipe": self.recipe,
                    "clips": sum(map(len, batches)),
                    "weights": weights,
                    "won_and_margin": verdicts,
                    "command": command(),
                },
                indent=1,
            )
            + "\n",
        )
        progress.say(f"{sum(map(len, batches))} good clips; written to {self.out}")
        if lost := [
            flaw
            for flaw, row in table.items()
            if row["all"].won < MUST_WIN and flaw not in MAY_PASS
        ]:
            raise ValueError(
                f"the combination does not see {', '.join(lost)}: it prefers fewer than {MUST_WIN:.0%} of the good clips to their spoilt copies; change rewards or weights"
            )


@dataclass(frozen=True)
class Rewards:
    """Rewards: which there are, what one says of a video, whether a recipe's can be cheated."""

    do: Annotated[List | Score | Calibrate, tyro.conf.OmitSubcommandPrefixes]

    def __call__(self) -> None:
        self.do()


def _listed(name: str, spec: RewardSpec) -> tuple[str, ...]:
    from kvpo.common.extras import missing_modules

    missing = missing_modules(spec.packages)
    here = (
        f"needs kvpo[{spec.extra}]"
        if missing
        else "ready"
        if not spec.memory_gb or spec.extra == "offline"
        else "needs its weights"
    )
    return (
        name,
        spec.looks_at.replace("`", ""),
        spec.family,
        f"{spec.memory_gb:g} GiB" if spec.memory_gb else "",
        here,
        spec.licence,
    )


def _param(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--params {text!r} must be key=value")
    return key, yaml.safe_load(value)


def _clips(args: Calibrate, config: RunConfig) -> list[VideoBatch]:
    from kvpo.rewards.clips import folder_clips
    from kvpo.runs.build import calibration_clips

    found = folder_clips(args.clips) if args.clips else calibration_clips(config, args.count)
    if not found:
        raise ValueError(
            f"recipe {args.recipe} names no good clips to calibrate on: give --clips FOLDER, or set calibration_clips in it"
        )
    return found


def _table(table: Mapping[str, Mapping[str, Verdict]], names: Sequence[str]) -> str:
    lines = [f"{'share of good clips preferred':<30}" + "".join(f"{name:>14}" for name in names)]
    lines += [
        f"{flaw:<30}" + "".join(f"{row[name].won:>14.0%}" for name in names)
        for flaw, row in table.items()
    ]
    return "\n".join(lines)
