"""Base classes of rewards, so that each reward is only its own measure.

    Measured      a reward that is one function, with nothing to load
    Pretrained    one with a network: made once, moved to the device by ``load``, to main memory by ``offload``
    FrameScorer   a Pretrained that judges single frames: stride, and how frames become one number

Which frames a scorer looks at is decided here, from the clip's true rate and the scorer's ``spec``,
and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from kvpo.common.extras import require_extra
from kvpo.rewards.base import RewardOutput, RewardSpec, VideoBatch


def sampled(length: int, fps: float, spec: RewardSpec) -> list[int]:
    """Numbers of the frames that a scorer looks at, of a clip of ``length`` frames at ``fps``.

    They are evenly spread from the first on, at ``spec.fps``, within [min_frames, max_frames]. 36
    frames at 16 a second and a scorer of 2 a second give 4 frames, or 8 where it needs at least 8.
    """
    count = max(round(length * spec.fps / fps), spec.min_frames) if spec.fps else length
    if spec.max_frames:
        count = min(count, spec.max_frames)
    count = max(1, min(count, length))
    return [i * length // count for i in range(count)]


class Measured:
    """A reward that is one function, ``measure``.

    A reward that has nothing to load needs no more than that and its ``spec``.
    """

    spec: RewardSpec

    def load(self, device: str | torch.device = "cpu") -> None:
        require(self.spec)

    def offload(self) -> None: ...

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Scores [B], NaN where a clip can not be measured, and named parts [B]."""
        raise NotImplementedError(f"{type(self).__name__} has no measure(batch)")

    def score(self, batch: VideoBatch) -> RewardOutput:
        return scored(self.spec, batch, self.measure)


class Pretrained(Measured):
    """A reward with a network.

    A subclass is a dataclass of its parameters with ``model: Any = field(init=False, default=None,
    repr=False)``; it writes ``build`` and ``measure``.
    """

    model: Any

    @property
    def network(self) -> Hashable:
        """Rewards for which this is equal share what they hold of a device."""
        return id(self)

    def build(self) -> torch.nn.Module:
        """Make the network in main memory.

        It may set ``self.spec = replace(self.spec, weights=...)``, now that they are known.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build()")

    def load(self, device: str | torch.device = "cpu") -> None:
        if self.model is None:
            require(self.spec)
            self.model = self.build().eval().requires_grad_(False)
        self.model.to(device)

    def offload(self) -> None:
        if self.model is not None:
            self.model.to("cpu")

    @property
    def device(self) -> torch.device:
        """Device that the network is on; RuntimeError before ``load``."""
        if self.model is None:
            raise RuntimeError(
                f"{self.spec.name} is not loaded; call load(device) before score(batch)"
            )
        return next(self.model.parameters()).device


REDUCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda s_BT: s_BT.mean(dim=1),
    "top": lambda s_BT: s_BT.topk(max(1, round(0.3 * s_BT.shape[1])), dim=1).values.mean(dim=1),
    "worst": lambda s_BT: s_BT.topk(
        max(1, round(0.3 * s_BT.shape[1])), dim=1, largest=False
    ).values.mean(dim=1),
}
"""Ways to make one score of those of a clip's frames: mean, or mean of the best or worst 30 %."""


class FrameScorer(Pretrained):
    """A reward that judges single frames.

    A subclass is a dataclass that also has the parameters ``stride`` (every how many frames one is
    judged) and ``reduce``.
    """

    stride: int
    reduce: str

    def score_frames(self, frames_NCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[N] for uint8 frames and the prompt of each."""
        raise NotImplementedError(f"{type(self).__name__} has no score_frames(frames, prompts)")

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        frames = batch.frames[:, :: self.stride]
        B, T = frames.shape[:2]
        s_BT = (
            self.score_frames(
                frames.flatten(0, 1), [prompt for prompt in batch.prompts for _ in range(T)]
            )
            .float()
            .view(B, T)
        )
        return REDUCTIONS[self.reduce](s_BT), {"first": s_BT[:, 0], "last": s_BT[:, -1]}


def check_frame_options(stride: int, reduce: str) -> None:
    """Check a FrameScorer's options; its ``__post_init__`` calls it.

    Raises ValueError for a stride or a reduction that does not exist.
    """
    if stride < 1:
        raise ValueError(
            f"stride = {stride} must be 1 or more: every how many frames one is judged"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce = {reduce!r} is unknown; choose one of {', '.join(REDUCTIONS)}")


def require(spec: RewardSpec) -> None:
    """Check that the reward's packages are installed; ValueError with the way out if not."""
    require_extra(f"reward {spec.name!r}", spec.extra, spec.packages)


def scored(
    spec: RewardSpec,
    batch: VideoBatch,
    measure: Callable[[VideoBatch], tuple[torch.Tensor, Mapping[str, torch.Tensor]]],
) -> RewardOutput:
    """Score a batch with ``measure(batch) -> (scores [B], parts)``, and add what every reward owes.

    That is its frames, no gradient, the clock, invalid clips, float32 on the CPU.
    """
    begin = time.perf_counter()
    if batch.length < spec.min_frames:
        nothing = torch.full((len(batch),), float("nan"))
        reason = f"{spec.name} needs {spec.min_frames} frames, the clips have {batch.length}"
        return RewardOutput(
            nothing,
            torch.zeros(len(batch), dtype=torch.bool),
            {},
            {"seconds": 0.0, "invalid": reason},
        )
    looked_at = sampled(batch.length, batch.fps, spec)
    if len(looked_at) < batch.length:
        batch = batch.take(looked_at)
    with torch.inference_mode():
        scores, parts = measure(batch)
    scores = scores.float().cpu()
    seconds = time.perf_counter() - begin
    return RewardOutput(
        scores,
        scores.isfinite(),
        {k: v.float().cpu() for k, v in parts.items()},
        {"seconds": seconds, "frames": len(looked_at)},
    )
