"""Agreement of the rewards of a preview decoder with those of the generator's own decoder.

What a group's gradient follows is the order of its branches. So what counts is Spearman's rank
correlation within a group, by reward and signal; how alike the pixels are says little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kvpo.common.timing import Phases
from kvpo.generators.pipeline import Pipeline
from kvpo.method.advantages import spearman
from kvpo.method.score import score
from kvpo.runs.parts import Parts
from kvpo.types import RewardTable, Rollout


@dataclass(frozen=True)
class Agreement:
    """Both decoders on one group."""

    ranks: dict[tuple[str, str], float]
    """(signal, reward) -> rank correlation over branches and anchor; NaN where one is constant."""
    pixels: float
    """Mean difference of the pixels, of 255."""


def preview_agreement(run: Parts, rollout: Rollout) -> Agreement:
    """Score a group once by the preview decoder and once by the VAE.

    ValueError where the recipe has no preview decoder.
    """
    if run.pipeline.preview is None:
        raise ValueError(
            "there is nothing to compare: the recipe has no preview decoder; set score.preview"
        )
    a, small = _scored(run, rollout, run.pipeline)
    b, full = _scored(run, rollout, replace(run.pipeline, preview=None))
    apart = (small.int() - full.int()).abs().double().mean()
    return Agreement({(s, name): rank for s, name, rank in _ranks(a, b)}, float(apart))


def _scored(run: Parts, rollout: Rollout, pipeline: Pipeline) -> tuple[RewardTable, torch.Tensor]:
    """Rewards and pixels of a group, decoded by the pipeline's own decoder."""
    # without the decoder that has seen the prefix already: each begins with its own
    mine = replace(rollout, decoder=None)
    return score(pipeline, mine, run.rewards, run.config.score, Phases())


def _ranks(a: RewardTable, b: RewardTable) -> Iterator[tuple[str, str, float]]:
    """(signal, reward, rank correlation of the rows that both tables have)."""
    for signal in ("local", "global"):
        x_KB, y_KB = (t.local if signal == "local" else t.global_ for t in (a, b))
        for name, x_B, y_B in zip(a.components, x_KB, y_KB):
            both = x_B.isfinite() & y_B.isfinite()
            yield signal, name, spearman(x_B[both], y_B[both])
