"""Results of the library's functions: frozen records that print as the commands' output does."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kvpo.common.pictures import html_video
from kvpo.common.provenance import about_video
from kvpo.common.video import encode_mp4, write_mp4
from kvpo.evaluation.evaluate import table
from kvpo.report.read_run import Row
from kvpo.types import BranchPlan, RewardTable, Rollout, Script


@dataclass(frozen=True, eq=False)
class Video:
    """A generated video."""

    frames: torch.Tensor
    """RGB uint8 [T, C=3, H, W]."""
    fps: float
    """Frames a second."""
    script: Script
    """Prompts of the video, and the block from which each of them holds."""
    seed: int
    generator: str = ""
    """Name of the generator that made it; "" where that is not known."""
    sampler: str = ""

    @property
    def seconds(self) -> float:
        """Length of the video, s."""
        return len(self.frames) / self.fps

    def save(self, path: str | Path) -> Path:
        """Write it as MP4; the file is there when it is whole, or not at all.

        It says where it comes from, as those of `kvpo generate` do: prompts, seed, generator.
        ValueError for a name of another kind of file.
        """
        path = Path(path)
        if path.suffix.lower() != ".mp4" or path.is_dir():
            raise ValueError(
                f"{path} is no name of an MP4; give a file such as {path / 'video.mp4'}"
            )
        about = about_video(self.script, self.seed, self.generator, sampler=self.sampler)
        return write_mp4(path, self.frames, self.fps, about=about)

    def _repr_html_(self) -> str:
        """A player that holds the video, for notebooks."""
        return html_video(encode_mp4(self.frames, self.fps), " | ".join(self.script.texts))

    def __repr__(self) -> str:
        T, _, H, W = self.frames.shape
        return (
            f"Video({T} frames of {W} x {H}, {self.seconds:.1f} s, {' | '.join(self.script.texts)})"
        )


@dataclass(frozen=True)
class Mean:
    """Mean of one component in an evaluation of one generator."""

    component: str
    kind: str
    """train, part, heldout, related or guard, as in `kvpo evaluate`."""
    mean: float
    """Mean over the scripts; NaN where no script could be measured."""
    low: float
    high: float
    """The mean's 95 % bootstrap interval over scripts; NaN below two scripts."""
    n: int
    """Scripts that could be measured."""


@dataclass(frozen=True)
class Evaluation:
    """A generator measured on fixed scripts and noise, alone or against another one."""

    label: str
    """Name of the weights that were measured."""
    against: str
    """Name of the weights they are compared with; "" where they stand alone."""
    rows: tuple[Row, ...] | tuple[Mean, ...]
    """One row a component, each with its 95 % interval; the first is "mean of trained".

    A `Row` holds the paired difference, a `Mean` the mean itself.
    """
    scripts: int
    videos: int
    """Videos of every script, each with noise of its own."""
    seed: int
    """Names the scripts' and the noise's streams."""

    def __getitem__(self, component: str) -> Row | Mean:
        """The row of a component.  KeyError with those that there are."""
        for row in self.rows:
            if row.component == component:
                return row
        known = ", ".join(row.component for row in self.rows)
        raise KeyError(f"no component {component!r}; there are {known}")

    def __str__(self) -> str:
        """The table that `kvpo evaluate` prints."""
        videos = f"{self.videos} video{'s' * (self.videos > 1)} of each"
        facts = f"{self.scripts} scripts, {videos}, seed {self.seed}"
        if self.against:
            rows = [_with_none(row) for row in self.rows]
            return f"{table(rows, 'A', 'B')}\nA = {self.label}, B = {self.against}, {facts}"
        head = f"{'component':<20} {'kind':<9} {'mean':>9} {'95 % interval':>19} {'n':>5}"
        return "\n".join([head, *map(_line, self.rows), f"{self.label}, {facts}"])


def _with_none(row: Row | Mean) -> dict:
    """A row as `kvpo.evaluation.evaluate.compare` makes it: what was not measured is None."""
    values = dataclasses.asdict(row)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _line(row: Row | Mean) -> str:
    assert isinstance(row, Mean), "a generator alone has no differences"
    between = f"[{row.low:>+7.4f}, {row.high:>+7.4f}]"
    return f"{row.component:<20} {row.kind:<9} {row.mean:>9.4f}  {between} {row.n:>5}"


@dataclass(frozen=True)
class Run:
    """A run of `kvpo.align`: where it is, and what became of it."""

    folder: Path
    report: Path
    """An HTML page that opens offline; written when the run is complete."""
    steps: int
    """Steps that are done and saved; fewer than asked where the run was stopped."""
    evaluation: Evaluation | None
    """The averaged (EMA) weights against the start weights after the last step; None till then."""

    def __str__(self) -> str:
        found = "not evaluated" if self.evaluation is None else str(self.evaluation)
        return f"{self.folder}, {self.steps} steps, {self.report}\n{found}"


@dataclass(frozen=True, eq=False)
class Exploration:
    """The branches of one story from a fork on, their anchor last, and what the rewards say."""

    label: str
    """Name of the weights that made the branches."""
    pixels: torch.Tensor
    """RGB uint8 [B, T, C=3, H, W] from the fork on: G branches, then the anchor."""
    fps: float
    rewards: RewardTable
    """r_KB of the trained rewards; ``components`` names the K."""
    advantages: torch.Tensor
    """A_M float64 of the group's M members, the first M rows: centred, clamped."""
    energies: torch.Tensor
    """E_M of the members: how unlikely the unrouted policy finds each of them."""
    plans: tuple[BranchPlan, ...]
    """Plan of each row: what it reads in place of the rolling window; the anchor's is empty."""
    diversity: float
    """Mean squared difference of two branches, pixels in [0, 1]."""
    rollout: Rollout
    """The whole rollout: script, window, trajectory, latents."""

    @property
    def fork(self) -> int:
        """The block at which the branches part."""
        return self.rollout.window.fork

    @property
    def script(self) -> Script:
        return self.rollout.script

    def __repr__(self) -> str:
        texts = " | ".join(self.script.texts)
        return f"Exploration({len(self.plans) - 1} branches from block {self.fork} on, {texts})"

    def __str__(self) -> str:
        """The table that `kvpo explore` prints."""
        return branch_table(self.rollout, self.rewards, self.advantages, self.energies)


def branch_table(
    rollout: Rollout, rewards: RewardTable, advantages: torch.Tensor, energies: torch.Tensor
) -> str:
    """A line a row: its local rewards, advantage and energy, and the past frames that it reads."""
    names = "".join(f"{name:>12}" for name in rewards.components)
    lines = [f"row       {names}{'A':>9}{'energy':>11}  reads"]
    for row, plan in enumerate(rollout.plans):
        anchor = row == rollout.num_branches
        numbers = "".join(f"{float(r):>12.3f}" for r in rewards.local[:, row])
        judged = f"{'':>20}"
        if row < len(energies):
            judged = f"{float(advantages[row]):>+9.2f}{float(energies[row]):>11.2e}"
        window = "rolling window" if anchor else "rolling window, other noise"
        reads = " ".join(map(str, plan.frames)) or window
        lines.append(f"{'anchor' if anchor else f'branch {row}':<10}{numbers}{judged}  {reads}")
    return "\n".join(lines)
