"""NIQE: distance of a frame from natural photographs, by the statistics of local contrasts.

The photographs are undistorted.

    Y -> (Y - local mean) / (local deviation + 1) = contrasts, at full and at half size, in patches
         of 96 (48) pixels
    18 numbers a patch and size: asymmetric generalised Gaussians fitted to the contrasts and to the
         products of neighbours
    NIQE = sqrt((m - m0)' ((C + C0) / 2)^-1 (m - m0))        m, C: mean and covariance over patches; m0, C0: of the photographs
    score = -NIQE, a clip's frames reduced as asked

Source: Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", IEEE
Signal Processing Letters 2013. m0 and C0 are those of their release (University of Texas at
Austin), whose notice is in the file of the weights.

What it cannot see: motion, meaning, colour. Won by anything with natural contrasts: a frozen frame,
a shuffle, too much colour; animation may well beat camera footage (docs/classic.md). Frames below
192 pixels a side have too few patches: not measurable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kvpo.rewards.base import RewardSpec
from kvpo.rewards.measured import FrameScorer, check_frame_options

WEIGHTS = Path(__file__).parent / "weights" / "niqe.safetensors"
PATCH = 96
FEWEST = 4
"""Patches below which a frame has no statistics."""
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Rows and columns by which contrasts are moved before they are multiplied with themselves."""
LUMA = (65.481, 128.553, 24.966)
"""Weights of red, green and blue in [0, 1] in the Y of BT.601, which begins at 16."""


class Photographs(torch.nn.Module):
    """Statistics of natural photographs, and a frame's distance to them.

    ``mean`` [36] and ``covariance`` [36, 36] are float64.
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        super().__init__()
        self.mean, self.covariance = (
            torch.nn.Parameter(x, requires_grad=False) for x in (mean, covariance)
        )
        alpha = torch.arange(0.2, 10.0, 0.001, dtype=torch.float64)
        self.register_buffer("alpha", alpha)
        self.register_buffer(
            "peakedness",
            (2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)).exp(),
        )

    def forward(self, frame_CHW: torch.Tensor) -> torch.Tensor:
        """NIQE of a uint8 frame, a scalar.

        NaN where it has fewer than FEWEST patches with any contrast.
        """
        features = self.features(frame_CHW)
        features = features[features.isfinite().all(1)]
        if len(features) < FEWEST:
            return features.new_tensor(float("nan"))
        away = features.mean(0) - self.mean
        return (
            away
            @ torch.linalg.pinv((features.T.cov() + self.covariance) / 2, hermitian=True)
            @ away
        ).sqrt()

    def features(self, frame_CHW: torch.Tensor) -> torch.Tensor:
        """[P, 36] of the P whole patches; not finite where a patch has no contrast."""
        height, width = (side // PATCH * PATCH for side in frame_CHW.shape[-2:])
        if not height * width:
            return self.mean.new_zeros(0, 36)
        rgb = frame_CHW[:, :height, :width].double() / 255
        image = (16 + torch.einsum("c,chw->hw", rgb.new_tensor(LUMA), rgb)).round()[None, None]
        half = F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True)
        return torch.cat(
            [self.of_patches(contrasts(x), PATCH // scale) for x, scale in ((image, 1), (half, 2))],
            1,
        )

    def of_patches(self, contrasts_11HW: torch.Tensor, side: int) -> torch.Tensor:
        """Statistics of patches, [P, 18].

        Shape and mean width of the contrasts, then shape, mean and both widths of each product of
        neighbours.
        """
        x = F.unfold(contrasts_11HW, side, stride=side)[0].T.reshape(-1, side, side)
        alpha, _, left, right = self.fit(x)
        products = [torch.stack(self.fit(x * x.roll(by, (1, 2))), 1) for by in NEIGHBOURS]
        return torch.cat((torch.stack((alpha, (left + right) / 2), 1), *products), 1)

    def fit(
        self, x_PHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fit the asymmetric generalised Gaussian with these patches' moments.

        Returns its shape, mean, left and right width, [P] each.
        """
        x = x_PHW.flatten(1)
        left, right = (
            (x.square() * side).sum(1).div(side.sum(1)).sqrt() for side in (x < 0, x > 0)
        )
        ratio = left / right
        peak = (
            x.abs().mean(1) ** 2
            / x.square().mean(1)
            * (ratio**3 + 1)
            * (ratio + 1)
            / (ratio**2 + 1) ** 2
        )
        nearest = torch.searchsorted((self.peakedness[1:] + self.peakedness[:-1]) / 2, peak)
        alpha = self.alpha[nearest]
        g1, g2, g3 = (torch.lgamma(k / alpha) for k in (1, 2, 3))
        left, right = (width * ((g1 - g3) / 2).exp() for width in (left, right))
        return alpha, (right - left) * (g2 - g1).exp(), left, right


def contrasts(image_11HW: torch.Tensor) -> torch.Tensor:
    """Each pixel less its surroundings' mean, over their deviation.

    The window is a Gaussian of 7 pixels, deviation 7/6; levels of 255.
    """
    at = torch.arange(-3.0, 4.0, dtype=image_11HW.dtype, device=image_11HW.device)
    window = (-(at**2) / (2 * (7 / 6) ** 2)).exp()
    window = torch.outer(window, window)[None, None] / window.sum() ** 2

    def around(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), window)

    mean = around(image_11HW)
    return (image_11HW - mean) / ((around(image_11HW**2) - mean**2).abs().sqrt() + 1)


@dataclass
class Niqe(FrameScorer):
    """-NIQE of a clip: -3 to -6 for clean ones, -8 and below for noise or blur."""

    stride: int = 4
    reduce: str = "mean"
    spec: RewardSpec = RewardSpec(
        "niqe",
        "natural-statistics",
        (float("-inf"), 0.0),
        looks_at="how natural single frames look, by their statistics",
        needs_prompt=False,
        licence="of LIVE, UT Austin: any purpose, with notice",
        weights=WEIGHTS.name,
    )
    model: Any = field(init=False, default=None, repr=False)

    def __post_init__(self):
        check_frame_options(self.stride, self.reduce)

    def build(self) -> torch.nn.Module:
        return Photographs(**load_file(WEIGHTS))

    def score_frames(self, frames_NCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return -torch.stack([self.model(frame) for frame in frames_NCHW.to(self.device)])
