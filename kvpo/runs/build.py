"""Parts that a recipe names: rewards and their weights, scripts of training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.config import RunConfig
from kvpo.method.advantages import Advantages
from kvpo.method.prompts import PromptSet, ScriptSource, read_scripts
from kvpo.mini.source import StorySource, story_clips
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.clips import folder_clips
from kvpo.rewards.registry import given_family
from kvpo.rewards.scorer import Scorer, load_rewards, make_scorers
from kvpo.runs.loading import is_run, named, origin_of_run, run_config
from kvpo.types import Script


def judges(config: RunConfig, device: torch.device) -> tuple[list[Scorer], Advantages]:
    """Load all rewards of a recipe, and make the advantage rule.

    The rule has the weights of the rewards that are trained on. Raises ValueError if there are
    none.
    """
    if not config.rewards_of("train"):
        raise ValueError(
            "no reward has role `train`: there is nothing to align to; list one under `rewards`, a shipped one (`kvpo rewards list`) or your own (package.module:Class)"
        )
    scorers = load_rewards(config.rewards, device)
    return scorers, replace(
        config.advantages, weights={s.spec.name: s.entry.weight for s in trained(scorers)}
    )


def trained(scorers: Sequence[Scorer]) -> list[Scorer]:
    """Rewards among ``scorers`` that are trained on."""
    return [s for s in scorers if s.entry.role == "train"]


def calibration_clips(config: RunConfig, count: int = 16) -> list[VideoBatch]:
    """Good clips to try the recipe's rewards on.

    They are its folder's, the miniature's true ones, or none.
    """
    if config.calibration_clips:
        return folder_clips(Path(config.calibration_clips))
    return story_clips(count) if config.data.prompts == "mini" else []


def trained_families(generator: str) -> set[str]:
    """Families of the rewards that made these weights, in all rounds of a run that started from one.

    Empty for a pipeline folder, whose past is not known here.
    """
    run, which = named(generator)
    if not generator or not is_run(run):
        return set()
    before = set(origin.families) if (origin := origin_of_run(run)) else set()
    if which == "start":
        return before
    entries = run_config(run).rewards_of("train")
    # An object that was given to the process of the run is not there to be asked: its name says it.
    return before | {given_family(e.name) or make_scorers([e])[0].spec.family for e in entries}


def script_source(config: RunConfig) -> ScriptSource:
    """The scripts to train on."""
    if config.data.prompts == "mini":
        return _stories(config, config.seed, "train", config.data.open_forks)
    return PromptSet(_scripts(config.data.prompts, config), config.stories, config.seed)


def evaluation_scripts(config: RunConfig) -> list[Script]:
    """Scripts that a recipe evaluates on: those of `evaluate.prompts`, where it is set.

    Else unseen stories of the miniature, or the training prompts (see `unseen`).
    """
    prompts = config.evaluate.prompts or config.data.prompts
    if prompts == "mini":
        source = _stories(config, config.evaluate.seed, "evaluate")
        return [source.script(0, i) for i in range(config.evaluate.scripts)]
    return list(_scripts(prompts, config))[: config.evaluate.scripts]


def _stories(config: RunConfig, seed: int, split: str, open_forks: bool = False) -> StorySource:
    data = config.data
    return StorySource(seed, split, data.blocks, data.memory, data.segments, open_forks)


def _scripts(path: str, config: RunConfig) -> tuple[Script, ...]:
    data = config.data
    return read_scripts(
        path, data.blocks, switches=data.switches or None, max_segments=data.segments
    )


def unseen(config: RunConfig) -> bool:
    """The evaluation's scripts are not those that are trained on; its noise never is."""
    return config.data.prompts == "mini" or config.evaluate.prompts not in ("", config.data.prompts)
