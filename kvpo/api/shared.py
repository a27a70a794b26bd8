"""Code that the library's functions and the commands share.

It loads, measures, and judges a group that is only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvpo.common.progress import Progress
from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.evaluation.evaluate import Scored, evaluate
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.pipeline_folder import check_folder
from kvpo.generators.readable import check_prompts, check_prompts_of
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.advantages import Advantage, Advantages
from kvpo.method.explorers import Explorer
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.score import score
from kvpo.rewards.scorer import Scorer
from kvpo.runs.loading import load_generator, pipeline_folder
from kvpo.types import RewardTable, Rollout, Script


def loaded(
    generator: str | Path | Pipeline, device: torch.device, config: RunConfig
) -> tuple[Pipeline, str]:
    """A generator in the recipe's precision, or as it is where it is loaded already; its label."""
    if isinstance(generator, Pipeline):
        return generator, generator.spec or generator.folder
    return load_generator(str(generator), device, config.vae_dtype, config.dtype)


def check_scripts(
    generator: str | Path | Pipeline, scripts: Sequence[Script], warn: Callable[[str], None]
) -> None:
    """Check that a generator, named or loaded, can read all prompts of some scripts.

    Raises ValueError with the prompt's place, as `check_prompts`, before weights are loaded.
    """
    if isinstance(generator, Pipeline):
        check_prompts_of(generator, scripts, warn)
    else:
        check_prompts(pipeline_folder(str(generator)), scripts, warn)


def geometry_of(generator: str | Path | Pipeline) -> Geometry:
    """A generator's geometry, by its name without loading it."""
    if isinstance(generator, Pipeline):
        return generator.geometry
    return check_folder(pipeline_folder(str(generator)))


def measured(
    generator: str | Path | Pipeline,
    config: RunConfig,
    stories: Sequence[Script],
    rewards: Sequence[Scorer],
    device: torch.device,
    progress: Progress,
) -> tuple[Scored, str]:
    """Evaluate one generator as a recipe says, with a bar; returns its numbers and its label."""
    with progress.timed("loading the generator"):
        pipeline, label = loaded(generator, device, config)
    sampler = SAMPLERS[config.sampler]
    with progress.bar(f"evaluate {label}", len(stories)) as bar:
        found = evaluate(
            pipeline, sampler, stories, rewards, config.score, config.evaluate, bar.move_to
        )
        return found, label


def shown_explorer(config: RunConfig, by: str) -> Explorer:
    """The explorer that is looked at, in the window of the recipe's own, whichever it is.

    Groups that are compared must explore the same blocks. ValueError where the recipe's sampler
    would leave its branches alike.
    """
    name = config.explorer if by == "recipe" else by
    config.refuse_without_noise(name)
    chosen: Any = getattr(config, name)
    return replace(chosen, window_blocks=config.exploring.window_blocks)


def score_group(
    pipeline: Pipeline,
    rollout: Rollout,
    embeddings: Mapping[str, torch.Tensor],
    config: RunConfig,
    rewards: Sequence[Scorer],
    rule: Advantages,
    phases: Phases,
) -> tuple[RewardTable, torch.Tensor, Advantage, torch.Tensor]:
    """Rewards, pixels, advantages and energies of a group that is looked at and not learnt from."""
    table, pixels = score(pipeline, rollout, rewards, config.score, phases)
    advantage = rule(table)
    members, context = range(len(advantage.values)), CONTEXTS[config.context]
    energies = Replay(pipeline, rollout, embeddings, context, config.energy, members).energies()
    return table, pixels, advantage, energies
