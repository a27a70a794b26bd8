"""Preparation of frames for a network: resized, cut or padded to its size, normalised.

It runs in torch, on the network's device.

Same numbers as the image processors of transformers on Pillow: resized across, then down, each
rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from kvpo.rewards.pretrained.released import read_json

CHUNK = 32
"""Frames in one forward pass."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = 0.5001
"""Pillow rounds halves up; in float32 a half may come out a little smaller."""
MODES = {2: "bilinear", 3: "bicubic"}
"""``resample`` of a preprocessor_config.json -> mode of `interpolate`."""


@dataclass(frozen=True)
class Pixels:
    """uint8 frames of any size -> float32 [N, 3, *size]."""

    size: tuple[int, int]
    """Height and width that the network gets."""
    fit: Literal["crop", "stretch", "pad"]
    """Way to bring frames to the size: ``crop``, ``stretch`` or ``pad``.

    ``crop``: the shorter side to ``shorter``, then the middle; ``stretch``: both sides to ``size``;
    ``pad``: the longer side to fit, black around.
    """
    shorter: int = 0
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    @classmethod
    def released(cls, reward: str, folder: Path) -> Pixels:
        """Read the preprocessor_config.json of a CLIP, SigLIP or DINOv2 folder.

        Raises ValueError for one that asks for something else.
        """
        path = folder / "preprocessor_config.json"
        config = read_json(reward, path)
        try:
            size = config["size"]
            crop = _pair(config["crop_size"]) if config.get("do_center_crop") else None
            # old files hold one number
            shorter = size if isinstance(size, int) else size.get("shortest_edge", 0)
            resized = (shorter, shorter) if shorter else _pair(size)
            pixels = cls(
                crop or resized,
                "crop" if shorter else "stretch",
                shorter,
                tuple(config["image_mean"]),
                tuple(config["image_std"]),
                MODES[config["resample"]],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"reward {reward!r}: {path} describes no preprocessing that is known here ({type(error).__name__}: {error}); give the folder as released on the hub"
            ) from None
        fits = crop and max(crop) <= shorter if shorter else crop in (None, resized)
        if not fits:
            raise ValueError(
                f"reward {reward!r}: {path} resizes to {config['size']} and crops to {crop}, which gives no fixed size without padding; give the folder as released on the hub"
            )
        return pixels

    def batches(self, frames_NCHW: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
        """The frames, at most CHUNK at a time, ready for the network on ``device``."""
        for part in frames_NCHW.split(CHUNK):
            yield self(part.to(device))

    def __call__(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        height, width = self.resized(*frames_NCHW.shape[-2:])
        x = frames_NCHW.float()
        for size in ((x.shape[-2], width), (height, width)):
            x = (
                F.interpolate(x, size, mode=self.mode, antialias=True)
                .add(HALF)
                .floor()
                .clamp(0, 255)
            )
        x = _centred(x, *self.size)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x / 255 - mean) / std

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, before cutting or padding.

        They are rounded as the released preprocessing does.
        """
        if self.fit == "stretch":
            return self.size
        if self.fit == "crop":
            return self.shorter * height // min(height, width), self.shorter * width // min(
                height, width
            )
        scale = self.size[0] / max(height, width)
        return round(height * scale), round(width * scale)


def _centred(x_NCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut, or pad with black, to height and width about the middle."""
    # an odd row or column goes to the end, cut as padded
    top = int((height - x_NCHW.shape[-2]) / 2)
    left = int((width - x_NCHW.shape[-1]) / 2)
    return F.pad(
        x_NCHW, (left, width - x_NCHW.shape[-1] - left, top, height - x_NCHW.shape[-2] - top)
    )


def _pair(size: int | dict[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
