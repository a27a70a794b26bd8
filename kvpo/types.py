"""The frozen records that flow between the stages, and the letters that name tensor axes.

Axis letters (suffixes of tensor names, ``z_GSFCHW``):

    B  rows of a batch          G  branches of a group (the anchor is not among them)
    N  latent frames            F  latent frames of one block
    S  denoise steps            C  latent channels
    H, W  latent height, width  T  pixel frames
    L  text tokens              D  width of a text token
    K  reward components

A frame is named by its absolute latent index, a block by its absolute index; block b holds frames
``b * F ... b * F + F - 1``.  Sigma is the noise level in [0, 1], 1 = pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Script:
    """A story: its prompts in order, and the block from which each of them holds.

    ValueError where prompts and starts do not belong together, or do not fit into the video.

    >>> script = kvpo.Script("story", ("a red circle rises", "it turns blue"), (0, 4), blocks=9)
    >>> script.text(3), script.span(1)
    ('a red circle rises', (4, 9))
    """

    id: str
    texts: tuple[str, ...]
    starts: tuple[int, ...]
    """First block of every segment; ``starts[0] == 0``, strictly increasing."""
    blocks: int
    """Length of the video in blocks."""
    source: str = field(default="", repr=False, compare=False)
    """Place where a person can find it, such as file and line; not a part of the script itself."""

    def __post_init__(self):
        if not self.texts or len(self.texts) != len(self.starts):
            raise ValueError(
                f"script {self.id!r}: {len(self.texts)} prompts but {len(self.starts)} start blocks; give one start per prompt"
            )
        if self.starts[0] != 0 or any(a >= b for a, b in zip(self.starts, self.starts[1:])):
            raise ValueError(
                f"script {self.id!r}: start blocks {self.starts} must begin at 0 and increase"
            )
        if self.starts[-1] >= self.blocks:
            raise ValueError(
                f"script {self.id!r}: its {len(self.texts)} segments start at blocks {self.starts} but the video has {self.blocks} blocks; "
                "lengthen the video or drop segments"
            )

    def segment(self, block: int) -> int:
        """Index of the segment that holds at ``block``."""
        if not 0 <= block < self.blocks:
            raise ValueError(
                f"script {self.id!r} has no block {block}; give one from 0 to {self.blocks - 1}"
            )
        return max(i for i, start in enumerate(self.starts) if start <= block)

    def place(self, segment: int) -> str:
        """Place where a person finds one of its prompts."""
        return (self.source or f"script {self.id!r}") + (
            f", prompt {segment + 1}" if len(self.texts) > 1 else ""
        )

    def text(self, block: int) -> str:
        return self.texts[self.segment(block)]

    def span(self, segment: int) -> tuple[int, int]:
        """Blocks [first, last + 1) of a segment."""
        stop = self.starts[segment + 1] if segment + 1 < len(self.starts) else self.blocks
        return self.starts[segment], stop


@dataclass(frozen=True)
class Window:
    """The explored stretch of a rollout: ``blocks`` blocks from ``fork`` on."""

    fork: int
    blocks: int

    @property
    def stop(self) -> int:
        return self.fork + self.blocks

    def __contains__(self, block: int) -> bool:
        return self.fork <= block < self.stop


@dataclass(frozen=True)
class BranchPlan:
    """Difference of one branch from the anchor inside the window; the anchor's plan is empty."""

    frames: tuple[int, ...] = ()
    """Routed past frames, absolute ids, in place of the rolling window's.

    () = the rolling window itself.
    """
    noise_mix: float = 0.0
    """Share of fresh start noise (only the start-noise explorer sets it)."""
    renoise_from: int | None = None
    """Denoise step from which on the noise behind a step is the branch's own; None = shared."""
    step_noise: tuple[float, ...] = ()
    """Standard deviation of the own noise in each step of the `ode` sampler, 0 = none.

    () = the sampler's own, deterministic steps.
    """
    prompt_shift: float = 0.0
    """w: the fork's prompt is read as e + w (e - the one before), as far as it holds."""

    @property
    def differ(self) -> str:
        """Words for what sets the branch apart from the anchor."""
        if self.prompt_shift:
            return "how far their prompt is moved away from the one before"
        if self.step_noise:
            return "the noise in their denoise steps"
        if self.noise_mix and self.renoise_from is not None:
            return "all of their noise"
        if self.noise_mix:
            return "the noise they start from"
        if self.renoise_from is not None:
            return "the noise behind their denoise steps"
        return "which past frames they read from there on"

    def draws(self, step: int) -> bool:
        """Whether the noise in or behind denoise step ``step`` is the branch's own."""
        later = self.renoise_from is not None and step >= self.renoise_from
        return later or (bool(self.step_noise) and self.step_noise[step] > 0.0)


@dataclass(frozen=True)
class Trajectory:
    """Record of a rollout's window, branch by branch; the anchor is the last row."""

    inputs: torch.Tensor | None
    """z_BPSFCHW: network inputs; None where nobody asked for them.

    Rows = G branches then the anchor, P window blocks, S denoise steps.
    """
    velocities: torch.Tensor | None
    """u_BPSFCHW: the network's velocities at those inputs, the energies' targets; likewise."""
    clean: torch.Tensor
    """x0_BPFCHW: each block's clean latents, as committed to the cache."""


@dataclass(frozen=True)
class Rollout:
    """A group: one prefix, G branches and their anchor, under one script."""

    script: Script
    window: Window
    plans: tuple[BranchPlan, ...]
    """G plans, then the anchor's empty one."""
    trajectory: Trajectory
    prefix: torch.Tensor
    """x0_NCHW: clean latents before the fork, shared by all rows."""
    latents: torch.Tensor
    """x0_BNCHW: clean latents from the fork to the end of the video (window, then tail)."""
    cache: Any
    """The prefix's FrameCache as it stood at the fork, read only."""
    held: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Blocks of the prefix that the velocity penalty holds -> z_SFCHW, their network inputs."""
    decoder: Callable[..., Any] | None = None
    """Gives the `StreamingDecoder` as the prefix has left it, see `PrefixDecoders.take`.

    None: the prefix is decoded for it.
    """

    @property
    def num_branches(self) -> int:
        return len(self.plans) - 1


@dataclass(frozen=True)
class RewardTable:
    """Rewards of one group: one number per component, signal, and row.

    Rows are the G branches, then the anchor.
    """

    components: tuple[str, ...]
    local: torch.Tensor
    """r_KB float64: rewards of the window's clip."""
    global_: torch.Tensor
    """r_KB float64: mean of the rewards of the clips cut per prompt segment; NaN-free.

    Clips lie from the fork on.
    """
    valid: torch.Tensor
    """bool_B: rows all of whose rewards could be measured."""
