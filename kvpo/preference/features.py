"""Frozen features of clips that a preference model is linear in.

    frames         brightness, colours, size, motion, steadiness: plain statistics of frames
    classic        the eight parts of the reward of that name, with OpenCV
    efficientnet   1280 pooled features of an ImageNet network, mean over four frames

Nothing here is trained. Each set says with its numbers how small a spread still counts: of a
feature that all recorded clips share, a tiny deviation would else outweigh everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from kvpo.common.extras import missing_modules
from kvpo.common.wording import nearest
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.classic.classic import Classic
from kvpo.rewards.pretrained import efficientnet

SHARE, STEP = 0.05, 0.002
"""Smallest spreads that count: of shares and levels in [0, 1], and of changes from frame to frame."""
FRAMES: Mapping[str, float] = {
    "brightness": SHARE,
    "contrast": SHARE,
    "saturation": SHARE,
    "warmth": SHARE,
    "green": SHARE,
    "size": SHARE / 5,
    "colourful": SHARE / 5,
    "detail": SHARE / 5,
    "motion": STEP,
    "unsteady": STEP,
    "flicker": STEP,
    "fade": SHARE,
    "still": SHARE,
}
"""Feature of frames -> the smallest spread that counts."""
STANDS_OUT = 0.2
"""Distance in RGB, of 1 a channel, from which on a pixel is not the picture's ground."""
COLOURFUL = 60 / 255
"""Difference of the largest and the smallest channel from which on a pixel has a colour."""
HARDLY = 1 / 255
"""Mean absolute difference of two frames below which nothing moves."""
NETWORK_FRAMES, NETWORK_SIZE = 4, 224


class FeatureSet(Protocol):
    """A named set of features of a clip."""

    names: tuple[str, ...]
    floors: tuple[float, ...]
    """Smallest spread of each feature that counts."""
    packages: tuple[str, ...]
    """Modules that must be importable."""
    extra: str
    """Extra of kvpo that installs them."""
    min_frames: int

    @property
    def weights(self) -> str:
        """Identity of the network's weights once it is loaded; "" = none."""
        ...

    def load(self, device: str | torch.device) -> None: ...

    def offload(self) -> None: ...

    def measure(self, batch: VideoBatch) -> torch.Tensor:
        """Features of the clips, float64 [B, F] on the CPU; NaN where one can not be measured."""
        ...


class FrameStatistics:
    """Plain statistics of frames, by torch alone."""

    names, floors = tuple(FRAMES), tuple(FRAMES.values())
    packages: tuple[str, ...] = ()
    extra, weights, min_frames = "", "", 3

    def load(self, device: str | torch.device) -> None: ...

    def offload(self) -> None: ...

    def measure(self, batch: VideoBatch) -> torch.Tensor:
        rows = [statistics(clip.float() / 255) for clip in batch.frames.cpu()]
        return torch.tensor([[row[name] for name in FRAMES] for row in rows], dtype=torch.float64)


def statistics(x_TCHW: torch.Tensor) -> dict[str, float]:
    """Statistics of one clip of RGB in [0, 1], three frames or more.

    What stands out are pixels that differ from the frame's median colour; ``unsteady`` is the mean
    second difference of their centre, in diagonals a frame squared.
    """
    light = torch.einsum("tchw,c->thw", x_TCHW, torch.tensor([0.299, 0.587, 0.114]))
    chroma = x_TCHW.amax(1) - x_TCHW.amin(1)
    red, green, blue = x_TCHW.mean((0, 2, 3)).tolist()
    ground = x_TCHW.flatten(2).median(-1).values[:, :, None, None]
    far = (x_TCHW - ground).square().sum(1).sqrt()
    steps, frames = (x_TCHW[1:] - x_TCHW[:-1]).abs().mean((1, 2, 3)), light.mean((1, 2))
    fifth = max(1, len(frames) // 5)
    slopes = [light.diff(dim=axis).abs().mean() for axis in (1, 2)]
    found = {
        "brightness": light.mean(),
        "contrast": light.std((1, 2)).mean(),
        "saturation": chroma.mean(),
        "size": (far > STANDS_OUT).float().mean(),
        "colourful": (chroma > COLOURFUL).float().mean(),
        "detail": sum(slopes),
        "motion": steps.mean(),
        "unsteady": _unsteady(far),
        "flicker": frames.diff(n=2).abs().mean(),
        "fade": (frames[-fifth:].mean() - frames[:fifth].mean()).abs(),
        "still": (steps < HARDLY).float().mean(),
    }
    numbers = {name: float(value) for name, value in found.items()}
    return numbers | {"warmth": red - blue, "green": green - (red + blue) / 2}


def _unsteady(far_THW: torch.Tensor) -> torch.Tensor:
    height, width = far_THW.shape[1:]
    mass = torch.where(far_THW > STANDS_OUT, far_THW, 0.0)
    total = mass.sum((1, 2))
    y = (mass.sum(2) * torch.arange(height)).sum(1) / total
    x = (mass.sum(1) * torch.arange(width)).sum(1) / total
    centre = torch.stack((x, y), dim=1)[total > 0]  # a frame of one colour has none
    if len(centre) < 3:
        return torch.tensor(0.0)
    return centre.diff(n=2, dim=0).norm(dim=1).mean() / (height**2 + width**2) ** 0.5


class ClassicParts:
    """The eight parts of the reward ``classic``, each in [0, 1]."""

    names = ("motion", "warp", "whole", "steady", "flicker", "novelty", "sharp", "colour")
    floors = (SHARE,) * 8
    packages: tuple[str, ...] = Classic.spec.packages
    extra, weights, min_frames = Classic.spec.extra, "", Classic.spec.min_frames

    def load(self, device: str | torch.device) -> None: ...

    def offload(self) -> None: ...

    def measure(self, batch: VideoBatch) -> torch.Tensor:
        _, parts = Classic().measure(batch)
        return torch.stack([parts[name] for name in self.names], dim=1).double()


class NetworkFeatures:
    """Pooled features of EfficientNet-Lite0, mean over four frames at even times."""

    names = tuple(f"f{i}" for i in range(1280))
    floors = (0.02,) * 1280
    packages: tuple[str, ...] = efficientnet.PACKAGES
    extra, min_frames = "offline", 1

    def __init__(self) -> None:
        self.model: Any = None

    @property
    def weights(self) -> str:
        return self.model.identity if self.model is not None else ""

    def load(self, device: str | torch.device) -> None:
        if self.model is None:
            self.model = efficientnet.EfficientNetLite0().eval().requires_grad_(False)
        self.model.to(device)

    def offload(self) -> None:
        if self.model is not None:
            self.model.to("cpu")

    def measure(self, batch: VideoBatch) -> torch.Tensor:
        if self.model is None:
            raise RuntimeError("the network is not loaded; call load(device) before measure(batch)")
        count = min(NETWORK_FRAMES, batch.length)
        at = [i * batch.length // count for i in range(count)]
        frames = batch.frames[:, at]
        with torch.inference_mode():
            found = self.model(frames.flatten(0, 1), NETWORK_SIZE)
        return found.unflatten(0, frames.shape[:2]).mean(1).double().cpu()


SETS: Mapping[str, type[Any]] = {
    "frames": FrameStatistics,
    "classic": ClassicParts,
    "efficientnet": NetworkFeatures,
}
"""Name -> class of a `FeatureSet`."""


def make_sets(names: Sequence[str]) -> dict[str, FeatureSet]:
    """Make feature sets by name, not loaded.

    Raises ValueError for an unknown name, and where a set's packages are missing.
    """
    for name in names:
        if name not in SETS:
            near = nearest(name, SETS)
            raise ValueError(
                f"there are no features {name!r}"
                + (f"; did you mean {near}?" if near else f"; known are {', '.join(SETS)}")
            )
        if missing := missing_modules(SETS[name].packages):
            raise ValueError(
                f"the features {name!r} need {', '.join(missing)}: pip install 'kvpo[{SETS[name].extra}]'"
            )
    return {name: SETS[name]() for name in names}


def at_hand() -> list[str]:
    """Names of the sets whose packages are installed."""
    return [name for name, kind in SETS.items() if not missing_modules(kind.packages)]
