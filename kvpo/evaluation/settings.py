"""Settings of evaluations and of the sentinels' looks between them.

They stand apart from the code that they steer, so that reading a recipe needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluations of a run."""

    every: int = 0
    """Steps between evaluations during training; 0 = only after the last."""
    prompts: str = ""
    """Prompt file of scripts that are not trained on.
    Empty: unseen stories where the miniature's are trained on; else the training prompts themselves
    under other noise, and the report says so."""
    scripts: int = 64
    """Scripts of an evaluation."""
    seeds: int = 1
    """Videos of every script, each with noise of its own.
    A script's number is their mean. From 2 on their diversity stands in the table too."""
    batch: int = 16
    """Videos generated together."""
    seed: int = 1000
    """Names the scripts' and the noise's streams; training never draws from them."""
    online: bool = False
    """Measure the weights that the optimizer changes, too, without averaging.
    It takes half as long again, and what is exported is the average."""
    videos: int = 4
    """Scripts whose videos are kept, before and after."""
    stop_when_gamed: bool = True
    """End the run where trained rewards rise and a held-out evaluator falls.
    It takes two successive evaluations (`kvpo.evaluation.goodhart`)."""

    def __post_init__(self):
        least = {"every": 0, "videos": 0, "batch": 1, "seeds": 1, "scripts": 2}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"evaluate.{name} = {value} must be {low} or more")


@dataclass(frozen=True)
class SentinelConfig:
    """Settings of the looks at what no reward watches."""

    every: int = 0
    """Steps between looks; 0 = none."""
    scripts: int = 4
    """Prompts that are watched, the first ones of the evaluation."""
    seeds: int = 3
    """Videos of each, with noise of its own."""
    warn: float = 1.0
    """Spreads of the start weights over seeds from which on a line is said."""
    stop: float = 3.0
    """Spread at which the run stops; 0 = never."""
    least: float = 0.05
    """Share of the start's value by which a mean must have moved at all.
    Where seeds hardly differ, a spread is nothing."""
    kl_warn: float = 0.3
    """Mean KL to the start policy since the last look from which on a line is said, nats.
    log G is the most there can be."""
    kl_stop: float = 1.0
    """Mean KL from which on the run ends; 0 = never."""

    def __post_init__(self):
        if self.every < 0 or self.scripts < 1 or self.seeds < 2:
            raise ValueError(
                f"sentinels: every = {self.every} must not be negative, scripts = {self.scripts} at least 1, seeds = {self.seeds} at least 2 (their spread is the scale)"
            )
        for warn, stop in ((self.warn, self.stop), (self.kl_warn, self.kl_stop)):
            if warn <= 0 or 0 < stop < warn:
                raise ValueError(
                    f"sentinels: a warning limit ({warn}) must be above 0 and at most its stop limit ({stop}; 0 = never)"
                )
