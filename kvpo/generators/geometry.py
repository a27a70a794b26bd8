"""Geometry of a generator's streaming, and the places of its blocks in frames and seconds.

The numbers are the content of a pipeline folder's `streaming.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path

from kvpo.common.access import check_readable
from kvpo.common.text_files import read_text
from kvpo.generators.flow import warped_sigmas
from kvpo.generators.history import Deployed, MemoryBank, SinkWindow


@dataclass(frozen=True)
class Geometry:
    """Geometry of the generator's streaming: the content of `streaming.json`."""

    block: int
    """Latent frames generated together."""
    sink: int
    """Oldest latent frames, always read."""
    window: int
    """Latent frames a block reads in all; -1: everything.

    They are sink, rolling past and the block itself.
    """
    latent_height: int
    latent_width: int
    fps: int
    """Pixel frames a second."""
    text_length: int
    """Tokens of an embedded prompt, zeros after its end included."""
    steps: int = 4
    """Denoise steps of a block."""
    shift: float = 5.0
    """Warp of the step schedule, see `kvpo.generators.flow.warp`."""
    bank: int = 0
    """Latent frames of MemFlow's memory bank, read beside the window; 0: none."""
    bank_every: int = 3
    """Blocks between frames recorded to the bank."""
    bank_keep: int = 0
    """Latent frames of sink and bank that each head reads, chosen by its queries (SMA); 0: all."""
    first_steps: int = 0
    """Denoise steps of a video's first block, which has no past to lean on; 0: as all others."""

    def __post_init__(self):
        least = {
            "block": 1,
            "sink": 0,
            "window": -1,
            "latent_height": 1,
            "latent_width": 1,
            "fps": 1,
            "text_length": 1,
            "steps": 1,
            "bank": 0,
            "bank_every": 1,
            "bank_keep": 0,
            "first_steps": 0,
        }
        for name, low in least.items():
            if type(value := getattr(self, name)) is not int or value < low:
                raise ValueError(f"{name} = {value!r} must be a whole number, {low} or more")
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift = {self.shift!r} must be a number above 0 and finite")
        if 0 <= self.window < self.sink + self.block:
            raise ValueError(
                f"window = {self.window} has no room for the sink ({self.sink}) and a block ({self.block}); widen it, or -1 for everything"
            )

        if self.bank and self.window < 0:
            raise ValueError(
                f"bank = {self.bank} beside a window of everything (-1) would only repeat frames; give a window, or no bank"
            )
        if self.bank_keep and not self.bank:
            raise ValueError(
                f"bank_keep = {self.bank_keep} chooses among sink and bank, and there is no bank; set bank, or bank_keep = 0"
            )

    def check_grid(self, patch_size: Sequence[int], source: str) -> None:
        """Check that the transformer's patches (frames, rows, columns) tile the latents.

        Raises ValueError where they do not.
        """
        for name, value, step in (
            ("latent_height", self.latent_height, patch_size[1]),
            ("latent_width", self.latent_width, patch_size[2]),
        ):
            if value % step:
                raise ValueError(
                    f"{source}: {name} = {value} is not a multiple of the transformer's patch, {step}; correct it there"
                )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of every block that may be explored: all but a video's first."""
        return warped_sigmas(self.steps, self.shift)

    def sigmas_of(self, block: int) -> tuple[float, ...]:
        """Noise levels of a block, by its number."""
        return (
            warped_sigmas(self.first_steps, self.shift)
            if block == 0 and self.first_steps
            else self.sigmas
        )

    @property
    def history(self) -> Deployed:
        window = SinkWindow(self.sink, self.window)
        return MemoryBank(window, self.bank, self.bank_every, self.block) if self.bank else window

    def resident(self, blocks: int) -> int:
        """Latent frames a cache must hold to stream so many blocks.

        A prompt switch re-encodes the latest ``window`` frames beside the sink.
        """
        return min(
            blocks * self.block, blocks * self.block if self.window < 0 else self.sink + self.window
        )

    def reencoded(self, block: int) -> range:
        """Frames that a prompt switch before ``block`` encodes once more.

        They are the window's past without the sink.
        """
        stop = block * self.block
        return range(self.sink if self.window < 0 else max(self.sink, stop - self.window), stop)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of a video of so many latent frames.

        The first gives 1, each after it gives 4.
        """
        return max(0, 4 * latent_frames - 3)

    @classmethod
    def read(cls, path: Path) -> Geometry:
        check_readable(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a pipeline folder needs it to know its block, sink and window; `kvpo pretrain` writes one, `kvpo.generators.geometry.Geometry` says what belongs in it"
            )
        try:
            found = json.loads(read_text(path))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
        known = {f.name: f.default is MISSING for f in fields(cls)}
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold the keys {list(known)}, not {found!r}")
        if unknown := sorted(set(found) - set(known)):
            raise ValueError(f"{path}: unknown keys {unknown}; known are {list(known)}")
        if missing := sorted(
            name for name, needed in known.items() if needed and name not in found
        ):
            raise ValueError(
                f"{path}: missing keys {missing}; add them, `kvpo.generators.geometry.Geometry` says what they mean"
            )
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def pixel_span(blocks: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Pixel frames [first, stop) of blocks [first, stop)."""
    first, stop = (geometry.pixel_frames(b * geometry.block) for b in blocks)
    return first, stop


def block_at(second: float, geometry: Geometry, up: bool = False) -> int:
    """Number of the block whose first pixel frame is nearest to a time of the video, s.

    ``up``: number of blocks that reach the time. Raises ValueError unless it is above 0 and finite.
    """
    if not 0.0 < second < math.inf:
        raise ValueError(
            f"{second} s is no time of a video that a block could begin or end at; give more than 0"
        )
    # the first latent frame gives one pixel frame, every later one four
    blocks = (second * geometry.fps + 3) / (4 * geometry.block)
    return int(-(-blocks // 1)) if up else max(1, round(blocks))


def blocks_at(seconds: Sequence[float], geometry: Geometry) -> list[int]:
    """`block_at` of times at which prompts change, in their order.

    Raises ValueError where a time does not come after the one before it, or is nearest to the same
    block: a prompt between them would never be shown.
    """
    blocks = [block_at(second, geometry) for second in seconds]
    for (a, first), (b, second) in pairwise(zip(seconds, blocks)):
        if first >= second:
            raise ValueError(
                f"prompts can not change at {a:g} s and then at {b:g} s: a prompt is shown for a block of {4 * geometry.block / geometry.fps:g} s at least; give times that rise by that much"
            )
    return blocks
