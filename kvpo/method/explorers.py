"""Explorers say where branches may fork, and what each of them does differently.

A plan never touches the generator: it is data (`kvpo.types.BranchPlan`) that the rollout carries
out, so an explorer can be tested, replayed and shown without a network (method.md section 2).

Here are the two whose branches differ in their noise, not in what they read; routing has a file of
its own. `StartNoise` is the classical baseline for the comparison with routing, `RenoiseExplorer`
draws the noise behind denoise steps. Branches of both are what the unperturbed policy itself makes
of another noise, so an energy of velocities, which asks how the policy would explain them, is zero
(method.md section 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from kvpo.common.wording import count_of
from kvpo.types import BranchPlan, Script, Window

if TYPE_CHECKING:
    import torch


class Geometry(Protocol):
    """The part of a generator's geometry that planning needs; all numbers are frames."""

    @property
    def block(self) -> int:
        """Latent frames generated together."""
        ...

    @property
    def sink(self) -> int:
        """Oldest frames, always read."""
        ...

    @property
    def window(self) -> int:
        """Frames a block reads in all: sink, rolling past and the block itself."""
        ...

    @property
    def sigmas(self) -> Sequence[float]:
        """Noise levels of the denoise steps."""
        ...


class Explorer(Protocol):
    """Interface of a source of branch diversity."""

    deterministic_replay: ClassVar[bool]
    """True: the unperturbed policy, given the branch's own inputs, produces that very branch.

    Its energy is then identically 0 with zero gradient, so an energy objective on such branches is
    refused (method.md section 7).
    """
    own_noise: ClassVar[Literal["", "renoise", "sde"]]
    """Kind of denoise step whose noise is each branch's own draw: `renoise`, `sde`; "" = none.

    Its likelihood then says something of that branch alone.
    """
    independent: ClassVar[bool]
    """True: branches share neither a past nor noise, they are videos of their own."""
    at_switches: ClassVar[bool]
    """True: windows start at prompt switches only."""

    @property
    def window_blocks(self) -> int:
        """P, blocks explored after the fork."""
        ...

    @property
    def nearest(self) -> int:
        """Latest past frames that every branch reads as they are; 0 = none is set apart."""
        ...

    def of(self, blocks: int) -> Explorer:
        """The explorer with every number that follows from a video's ``blocks`` blocks."""
        ...

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Blocks of a video of ``blocks`` blocks at which a window may start.

        Raises ValueError if there is none.
        """
        ...

    def plan(
        self,
        window: Window,
        geometry: Geometry,
        num_branches: int,
        generator: torch.Generator,
        resident: Sequence[int] | None = None,
    ) -> tuple[BranchPlan, ...]:
        """Plan every branch of a group; the anchor is not included.

        ``resident``: absolute frames in the cache at the fork; None = all frames before it.
        """
        ...


class Exploration:
    """Answers that most explorers give about themselves; one that differs says so."""

    own_noise: ClassVar[Literal["", "renoise", "sde"]] = ""
    independent: ClassVar[bool] = False
    at_switches: ClassVar[bool] = False

    def of(self, blocks: int) -> Self:
        """Return the explorer as it is: its numbers do not depend on the video's length."""
        return self


class OwnNoise(Exploration):
    """Explorers whose branches differ in their noise and in nothing that they are told to read.

    All branches have equal plans; the fresh noise itself comes from streams named after the
    branch, in the rollout.
    """

    nearest: ClassVar[int] = 0
    deterministic_replay: ClassVar[bool] = True

    def of_each(self, geometry: Geometry) -> BranchPlan:
        """Plan of every branch."""
        raise NotImplementedError

    def plan(
        self,
        window: Window,
        geometry: Geometry,
        num_branches: int,
        generator: torch.Generator,
        resident: Sequence[int] | None = None,
    ) -> tuple[BranchPlan, ...]:
        """Give all G branches equal plans."""
        check_branches(num_branches)
        return (self.of_each(geometry),) * num_branches


def forks_of(explorer: Explorer, script: Script, geometry: Geometry) -> list[int]:
    """Blocks of a story at which a window may start: all that fit, or prompt switches alone.

    Raises ValueError if there is none.
    """
    fitting = explorer.eligible_forks(script.blocks, geometry)
    if not explorer.at_switches:
        return fitting
    found = [fork for fork in fitting if fork in script.starts[1:]]
    if not found:
        raise ValueError(
            f"script {script.id!r}: its prompts begin at blocks {list(script.starts)}, and a window of {explorer.window_blocks} blocks that begins with another prompt "
            f"can be forked at {fitting[0]} to {fitting[-1]} only; give every story a second prompt there, or another explorer"
        )
    return found


def check_branches(num_branches: int) -> None:
    """A group needs two branches: pi is a softmax over them, and of one branch it is constant."""
    if num_branches < 2:
        raise ValueError(
            f"num_branches = {num_branches}, but a group compares at least 2 branches; raise num_branches to 2 or more"
        )


def forks_from(first: int, blocks: int, window_blocks: int, why_first: str) -> list[int]:
    """Blocks first .. blocks - window_blocks.  ValueError naming all numbers if that is empty."""
    if window_blocks > blocks:
        raise ValueError(
            f"window longer than the video: window_blocks = {window_blocks}, the video has {blocks} blocks; lengthen the video or shorten the window"
        )
    if first + window_blocks > blocks:
        raise ValueError(
            f"no block can be a fork: {why_first} puts the first fork at block {first}, and a window of {count_of(window_blocks, 'block')} from there "
            f"ends at block {first + window_blocks}, but the video has {blocks} blocks; lengthen the video or shorten the window"
        )
    return list(range(first, blocks - window_blocks + 1))


def check_window(window_blocks: int) -> None:
    """A window is what is explored, so it has a block.  ValueError where it has none."""
    if window_blocks < 1:
        raise ValueError(
            f"window_blocks = {window_blocks}, but a window has at least 1 block; set 1 or more"
        )


@dataclass(frozen=True)
class StartNoise(OwnNoise):
    """Exploration by fresh noise, mixed into the start noise of the window's blocks.

    Re-noising stays shared.
    """

    mix: float = 0.5
    """m in (0, 1]: the start noise is sqrt(1 - m^2) shared + m fresh, see `mix_noise`."""
    window_blocks: int = 3
    """P, blocks explored after the fork."""

    def __post_init__(self):
        if not 0.0 < self.mix <= 1.0:
            raise ValueError(
                f"mix = {self.mix} must lie in (0, 1]: at 0 every branch would be the anchor"
            )
        check_window(self.window_blocks)

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Every block after the first whose P blocks fit.

        Block 0 is none of them: a group shares a prefix, so it needs one.
        """
        return forks_from(1, blocks, self.window_blocks, "a shared prefix of 1 block")

    def of_each(self, geometry: Geometry) -> BranchPlan:
        return BranchPlan(noise_mix=self.mix)


@dataclass(frozen=True)
class RenoiseExplorer(OwnNoise):
    """Exploration by fresh noise behind the denoise steps, from a chosen step on.

    The start noise stays shared. Only the `renoise` sampler draws noise there.
    """

    from_step: int = 0
    """First denoise step behind which the noise is the branch's own, counted from 0.
    The last step has no noise behind it. Late steps change details, early ones the layout."""
    window_blocks: int = 1
    """P, blocks explored after the fork."""

    own_noise: ClassVar[Literal["", "renoise", "sde"]] = "renoise"

    def __post_init__(self):
        if self.from_step < 0:
            raise ValueError(f"from_step = {self.from_step} must be a denoise step, counted from 0")
        check_window(self.window_blocks)

    def eligible_forks(self, blocks: int, geometry: Geometry) -> list[int]:
        """Every block after the first whose P blocks fit.

        ValueError also where the generator has no noise behind step ``from_step``.
        """
        if self.from_step > (last := len(geometry.sigmas) - 2):
            raise ValueError(
                f"renoise.from_step = {self.from_step}, but of this generator's {last + 2} denoise steps the last one with noise behind it is {last}; set {last} or less"
            )
        return forks_from(1, blocks, self.window_blocks, "a shared prefix of 1 block")

    def of_each(self, geometry: Geometry) -> BranchPlan:
        return BranchPlan(renoise_from=self.from_step)


def mix_noise(shared: torch.Tensor, fresh: torch.Tensor, mix: float) -> torch.Tensor:
    """Compute sqrt(1 - mix^2) shared + mix fresh.

    It has unit variance if both have, and correlation sqrt(1 - mix^2) with ``shared``.

    mix = 0 gives ``shared`` and mix = 1 gives ``fresh``, bit for bit.
    """
    if shared.shape != fresh.shape:
        raise ValueError(
            f"shared noise {tuple(shared.shape)} and fresh noise {tuple(fresh.shape)} must have one shape"
        )
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix = {mix} must lie in [0, 1]")
    if mix in (0.0, 1.0):
        return fresh if mix else shared
    return math.sqrt(1.0 - mix * mix) * shared + mix * fresh
