"""Consistency of a clip: DINOv2's embedding of every frame against others of the clip.

The others are the frame before and the first one.

    c(t) = ( max(0, cos(f_t, f_t-1)) + max(0, cos(f_t, f_0)) ) / 2        score = reduce over t >= 1

the formula of VBench's subject consistency (there on DINO ViT-B/16, every frame, mean), so in [0,
1] but not VBench's number. A frozen clip is perfect: a guard or evaluator to read beside a measure
of motion, never a training reward on its own. A wanted change counts as a loss: give it clips of
one prompt. It sees the middle square of the picture only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from kvpo.common.weights import identity
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.measured import REDUCTIONS, Pretrained, check_frame_options
from kvpo.rewards.pretrained.pixels import Pixels
from kvpo.rewards.pretrained.released import STOCK_FILES, find, load_stock, weight_files


@dataclass
class DinoConsistency(Pretrained):
    """Consistency of a clip by DINOv2.

    Parts: ``adjacent`` and ``first``, the means of the two cosines. Adjacent means ``stride``
    frames apart: compare at one stride only.
    """

    weights: str = "facebook/dinov2-base"
    """A local folder, or a hub id, of a Dinov2Model."""
    stride: int = 4
    reduce: str = "mean"
    model: Any = field(default=None, init=False, repr=False)
    pixels: Pixels = field(init=False, repr=False, compare=False)
    """Preparation of pictures that the files ask for; set when the network is built."""
    spec: RewardSpec = RewardSpec(
        "dinov2",
        "dino",
        looks_at="whether a clip stays itself",
        needs_prompt=False,
        licence="Apache-2.0",
        memory_gb=0.7,
    )

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)
        self.spec = replace(self.spec, min_frames=self.stride + 1)  # two that are looked at

    def build(self) -> torch.nn.Module:
        from transformers import Dinov2Model

        folder = find(self.spec.name, self.weights, STOCK_FILES)
        model = load_stock(self.spec.name, Dinov2Model, folder)
        self.pixels = Pixels.released(self.spec.name, folder)
        self.spec = replace(
            self.spec, weights=identity(self.weights, weight_files(self.spec.name, folder))
        )
        return model

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        frames = batch.frames[:, :: self.stride]
        embeddings = [
            self.model(pixel_values=x).pooler_output
            for x in self.pixels.batches(frames.flatten(0, 1), self.device)
        ]
        adjacent_BT, first_BT = similarities(torch.cat(embeddings).unflatten(0, frames.shape[:2]))
        return REDUCTIONS[self.reduce]((adjacent_BT + first_BT) / 2), {
            "adjacent": adjacent_BT.mean(1),
            "first": first_BT.mean(1),
        }


def similarities(f_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine of every later frame's embedding with the one before, and with the first.

    [B, T-1] each, in [0, 1].
    """
    f = F.normalize(f_BTD, dim=-1)
    adjacent, first = (f[:, 1:] * f[:, :-1]).sum(-1), (f[:, 1:] * f[:, :1]).sum(-1)
    return adjacent.clamp(0, 1), first.clamp(0, 1)
