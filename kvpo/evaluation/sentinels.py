"""Sentinels: measures that no reward names and gamed rewards move first.

They are watched on fixed prompts and seeds while training.

A sentinel's scale is the start weights' own: the standard deviation of one prompt's video over
seeds. With the weights of now, same prompts and noise, its mean has moved by so many of these;
`warn` and `stop` are limits on that, on the side that is bad. KL to the start policy has no spread
at the start: its limits are nats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kvpo.common.extras import require_extra
from kvpo.common.metric_log import read_metrics
from kvpo.evaluation.evaluate import noise_name
from kvpo.evaluation.settings import SentinelConfig
from kvpo.generators.generate import generate
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import Sampler
from kvpo.policy.policy import Policy
from kvpo.rewards.classic.watched import watched
from kvpo.types import Script

Side = Literal["low", "high", "both"]

BAD: Mapping[str, Side] = {
    "motion": "low",
    "residual_motion": "low",
    "saturation": "both",
    "luminance": "both",
    "colour_drift": "high",
    "still_run": "high",
    "diversity": "low",
}
"""Sentinel -> the side to which it must not move."""


@dataclass(frozen=True)
class Look:
    """Sentinels of one set of weights.

    Name -> value of every watched video, [N scripts, S seeds].
    """

    values: Mapping[str, torch.Tensor]

    def mean(self, name: str) -> float:
        return self.values[name].nanmean().item()

    def spread(self, name: str) -> float:
        """Standard deviation over a prompt's seeds, pooled over prompts."""
        v_NS = self.values[name]
        return (
            (v_NS - v_NS.nanmean(1, keepdim=True))
            .square()
            .nansum(1)
            .div(v_NS.shape[1] - 1)
            .mean()
            .sqrt()
            .item()
        )


@dataclass(frozen=True)
class Verdict:
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


def look(
    pipeline: Pipeline,
    sampler: Sampler,
    scripts: Sequence[Script],
    config: SentinelConfig,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Look:
    """Watch the weights now in the pipeline on fixed prompts.

    A prompt's seeds are generated together.
    """
    rows = []
    for done, script in enumerate(scripts[: config.scripts], 1):
        names = [noise_name(script, k) for k in range(config.seeds)]
        videos = generate(pipeline, sampler, [script] * config.seeds, seed, names)
        rows.append([watched(video, pipeline.geometry.fps) for video in videos])
        apart = _apart(videos)
        for row, value in zip(rows[-1], apart):
            row["diversity"] = value
        progress(done)
    return Look(
        {
            name: torch.tensor(
                [[video[name] for video in row] for row in rows], dtype=torch.float64
            )
            for name in BAD
        }
    )


class Watch:
    """The sentinels of a run."""

    def __init__(
        self,
        pipeline: Pipeline,
        sampler: Sampler,
        policy: Policy,
        scripts: Sequence[Script],
        config: SentinelConfig,
        seed: int,
    ):
        require_extra("watching sentinels", "rewards", ("cv2",))
        self.policy, self.config = policy, config
        self._look = functools.partial(look, pipeline, sampler, scripts, config, seed)

    @functools.cached_property
    def start(self) -> Look:
        with self.policy.using(self.policy.reference):
            return self._look()

    def __call__(self, kl: float, progress: Callable[[int], None]) -> Verdict:
        """The weights of now against those of the start."""
        return judge(self.start, self._look(progress), kl, self.config)


def recent_kl(run: Path, done: int, steps: int) -> float:
    """Mean KL to the start policy over the last ``steps`` steps.

    It is read from the run's own log, which a resumed run has too.
    """
    kl = [
        r["loss/kl"]
        for r in read_metrics(run / "metrics.jsonl")
        if "loss/kl" in r and done - steps <= r["step"] < done
    ]
    return sum(kl) / len(kl) if kl else 0.0


def judge(start: Look, now: Look, kl: float, config: SentinelConfig) -> Verdict:
    """Metrics, and which sentinels are beyond which limit."""
    metrics: dict[str, float] = {}
    warnings: list[str] = []
    stops: list[str] = []
    for name, side in BAD.items():
        a, b, spread = start.mean(name), now.mean(name), start.spread(name)
        if not spread > 0:
            continue  # the start weights never vary in it: there is no scale
        moved = (b - a) / spread
        metrics |= {
            f"sentinel/{name}/start": a,
            f"sentinel/{name}/value": b,
            f"sentinel/{name}/moved": moved,
        }
        _compare(
            _badness(moved, side) if abs(b - a) >= config.least * abs(a) else 0.0,
            config.warn,
            config.stop,
            f"{name} {a:.4g} -> {b:.4g} ({moved:+.1f} spreads of the start weights' seeds)",
            warnings,
            stops,
        )
    _compare(
        kl, config.kl_warn, config.kl_stop, f"KL to the start policy {kl:.2g} nats", warnings, stops
    )
    return Verdict(metrics, tuple(warnings), tuple(stops))


def _badness(moved: float, side: Side) -> float:
    return abs(moved) if side == "both" else moved if side == "high" else -moved


def _compare(
    value: float, warn: float, stop: float, text: str, warnings: list[str], stops: list[str]
) -> None:
    if value >= warn:
        warnings.append(text)
    if 0 < stop <= value:
        stops.append(text)


def _apart(videos_STCHW: torch.Tensor) -> list[float]:
    """Mean absolute distance of every seed's video to the others, in [0, 1]."""
    x = videos_STCHW.float() / 255
    S = len(x)
    return [
        sum((x[i] - x[j]).abs().mean().item() for j in range(S) if j != i) / (S - 1)
        for i in range(S)
    ]
