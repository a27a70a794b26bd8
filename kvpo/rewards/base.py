"""The one interface of all rewards: clips with their prompts in, one number per clip out.

    history = (("a small red circle ...",),)
    batch = VideoBatch(frames, fps=16.0, prompts=("it turns blue",), history=history)
    output = check_output(reward.spec, batch, reward.score(batch))

Clips have one layout, uint8 RGB [B, T, C, H, W], so that no scorer has to guess it from a shape. A
clip that cannot be measured is *invalid* (score NaN, ``valid`` False); it never gets a 0, which
would be a verdict. Nothing heavy is imported or loaded before ``load``. What most rewards share is
in `kvpo.rewards.measured`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

UNBOUNDED = (float("-inf"), float("inf"))


@dataclass(frozen=True, eq=False)
class VideoBatch:
    """Clips to be scored together: equal length, equal size.

    They are compared by identity, so that measurements can be shared. Raises ValueError for frames
    of another layout or type, and for lists of another length than the clips.

    >>> frames = torch.zeros(2, 16, 3, 64, 64, dtype=torch.uint8)
    >>> batch = kvpo.VideoBatch(frames, fps=16.0, prompts=("a red circle rises", "it turns blue"))
    >>> len(batch), batch.length
    (2, 16)
    """

    frames: torch.Tensor
    """RGB uint8 [B, T, C=3, H, W]; no other layout, no other type."""
    fps: float
    """True rate of the pixel frames given, frames a second."""
    prompts: tuple[str, ...]
    """Prompt of each clip: the one that holds in this clip."""
    history: tuple[tuple[str, ...], ...] = ()
    """Earlier prompts of each clip's script, oldest first; () = none for all clips.

    A later prompt may only say "it".
    """

    def __post_init__(self):
        _check_frames(self.frames)
        B = len(self.frames)
        if not self.fps > 0:
            raise ValueError(
                f"fps = {self.fps} must be above 0; give the true rate of the frames (16 for Wan and the miniature)"
            )
        if isinstance(self.prompts, str) or not all(isinstance(p, str) for p in self.prompts):
            raise ValueError(f"prompts = {self.prompts!r} must be a tuple with one string per clip")
        lengths = {
            "prompts": len(self.prompts),
            "history": len(self.history) or B,
        }
        for name, length in lengths.items():
            if length != B:
                raise ValueError(f"{length} {name} for {B} clips; give one per clip")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "history", tuple(tuple(h) for h in self.history) or ((),) * B)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def length(self) -> int:
        """T, pixel frames of every clip."""
        return self.frames.shape[1]

    @functools.cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Hash of each clip's pixels, by which it is known again."""
        return tuple(
            hashlib.blake2b(clip.contiguous().cpu().numpy(), digest_size=16).digest()
            for clip in self.frames
        )

    def script(self, clip: int) -> tuple[str, ...]:
        """All prompts that a clip's meaning depends on: its history, then its own."""
        return (*self.history[clip], self.prompts[clip])

    def cut(self, first: int, stop: int) -> VideoBatch:
        """Clips of the same videos with frames [first, stop) only."""
        return replace(self, frames=self.frames[:, first:stop])

    def take(self, frames: Sequence[int]) -> VideoBatch:
        """Clips of the same videos with these frames only, evenly spread.

        ``fps`` becomes the rate of what remains.
        """
        return replace(
            self, frames=self.frames[:, frames], fps=self.fps * len(frames) / self.length
        )

    def rows(self, clips: Sequence[int]) -> VideoBatch:
        """Batch of some of the clips."""
        pick = list(clips)
        return VideoBatch(
            self.frames[pick],
            self.fps,
            tuple(self.prompts[i] for i in pick),
            tuple(self.history[i] for i in pick),
        )


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch by one reward."""

    scores: torch.Tensor
    """float32 [B], higher is better; NaN where not valid."""
    valid: torch.Tensor
    """bool [B]: clips that could be measured."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name -> float32 [B]: parts that the score is made of, for logs.

    NaN where a clip has no such part.
    """
    info: Mapping[str, Any] = field(default_factory=dict)
    """``seconds`` it took, versions ..."""


@dataclass(frozen=True)
class RewardSpec:
    """Facts about a reward that are known without running it.

    >>> kvpo.RewardSpec("redness", family="colour", looks_at="how red a clip is").bounds
    (0.0, 1.0)
    """

    name: str
    family: str
    """Name of a family: its rewards see alike and fail alike.

    An evaluator is held out only from training rewards of other families.
    """
    bounds: tuple[float, float] = (0.0, 1.0)
    looks_at: str = ""
    """Description of what it judges, in a few words."""
    needs_prompt: bool = True
    min_frames: int = 1
    """Fewest frames of a clip; shorter clips are invalid.

    It is also the fewest frames of a clip that are looked at, whatever ``fps`` asks.
    """
    fps: float = 0.0
    """Frames a second that it looks at, 0 = every frame."""
    max_frames: int = 0
    """Most frames of a clip that it looks at, 0 = any number."""
    max_pixels: int = 0
    """Most pixels (clips x frames x height x width) of one call, 0 = any number.

    More are scored in several calls.
    """
    licence: str = "Apache-2.0"
    weights: str = ""
    """Identity of the weights (name and hash), known once they are loaded; "" = none."""
    packages: tuple[str, ...] = ()
    """Modules that must be importable, beyond those kvpo itself needs."""
    extra: str = ""
    """Extra of kvpo that installs them: pip install 'kvpo[extra]'."""
    memory_gb: float = 0.0
    """GiB of the device that weights and one call take, roughly; 0 = hardly any."""
    report: tuple[str, ...] = ()
    """Parts that evaluations list beside the score, as ``name.part``."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of an evaluation's table: the score, then the reported parts."""
        return (self.name, *(f"{self.name}.{part}" for part in self.report))


class Reward(Protocol):
    """A reward model.  ``score`` may be called only between ``load`` and ``offload``.

    `kvpo.rewards.measured` has what most of them share.  Where there is nothing to load, a function
    of a `VideoBatch` that returns one number a clip is enough.

    >>> from kvpo.rewards.measured import Measured
    >>> class Redness(Measured):
    ...     spec = kvpo.RewardSpec("redness", family="colour", needs_prompt=False)
    ...
    ...     def measure(self, batch):
    ...         return batch.frames[:, :, 0].float().mean(dim=(1, 2, 3)) / 255.0, {}
    >>> white = torch.full((1, 8, 3, 4, 4), 255, dtype=torch.uint8)
    >>> Redness().score(kvpo.VideoBatch(white, fps=16.0, prompts=("day",))).scores
    tensor([1.])
    """

    @property
    def spec(self) -> RewardSpec: ...

    def load(self, device: str | torch.device) -> None: ...

    def score(self, batch: VideoBatch) -> RewardOutput: ...

    def offload(self) -> None: ...


def check_output(spec: RewardSpec, batch: VideoBatch, output: RewardOutput) -> RewardOutput:
    """The output itself, or a ValueError that says in one line what is wrong with it."""
    B = len(batch)
    for name, value, kind in (
        ("scores", output.scores, torch.float32),
        ("valid", output.valid, torch.bool),
    ):
        if value.shape != (B,) or value.dtype != kind:
            raise ValueError(
                f"reward {spec.name!r} returned {name} {value.dtype} {list(value.shape)} for {B} clips; it must be {kind} [{B}]"
            )
    for name, value in output.parts.items():
        if value.shape != (B,):
            raise ValueError(
                f"reward {spec.name!r} returned part {name!r} {list(value.shape)} for {B} clips; give one number per clip"
            )
    low, high = spec.bounds
    wrong = output.valid & ~((output.scores >= low) & (output.scores <= high))
    if wrong.any():
        cases = ", ".join(
            f"clip {b} = {output.scores[b].item():.6g}" for b in wrong.nonzero().flatten().tolist()
        )
        raise ValueError(
            f"reward {spec.name!r}: {cases}, outside [{low:g}, {high:g}] but marked valid; mark what cannot be measured invalid, or repair the reward"
        )
    return output


def _check_frames(frames: torch.Tensor) -> None:
    """Check that frames are uint8 [B, T, 3, H, W] with at least one clip and one frame.

    Raises ValueError where they are not.
    """
    if frames.dtype != torch.uint8:
        raise ValueError(
            f"frames are {frames.dtype}; they must be uint8 in [0, 255]: convert with (x.clamp(0, 1) * 255).round().to(torch.uint8)"
        )
    if frames.dim() != 5 or frames.shape[2] != 3:
        raise ValueError(
            f"frames have shape {list(frames.shape)}; the only layout is [B, T, C=3, H, W], RGB: permute before the call"
        )
    if 0 in frames.shape:
        raise ValueError(
            f"frames have shape {list(frames.shape)}: a batch needs at least one clip and one frame"
        )


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """RGB in [0, 1], any shape -> uint8 in [0, 255]."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
