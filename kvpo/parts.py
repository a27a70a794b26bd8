"""What a recipe names: rewards and their weights, the scripts that are trained on, those of evaluations."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvpo.advantages import Advantages
from kvpo.config import RunConfig
from kvpo.mini.source import StorySource
from kvpo.prompts import PromptSet, ScriptSource, read_scripts
from kvpo.rewards.base import Reward
from kvpo.rewards.registry import load_rewards
from kvpo.types import Script


def judges(config: RunConfig, device: torch.device) -> tuple[list[Reward], Advantages]:
    """The rewards that are trained on, loaded, and the advantage rule with their weights."""
    if not (entries := config.rewards_of("train")):
        raise ValueError("no reward has role `train`: there is nothing to align to; list one under `rewards`, a shipped one or your own (package.module:Class)")
    rewards = load_rewards(entries, device)
    return rewards, replace(config.advantages, weights={r.spec.name: e.weight for r, e in zip(rewards, entries)})


def script_source(config: RunConfig) -> ScriptSource:
    """The scripts to train on."""
    if config.data.prompts == "mini":
        return StorySource(config.seed, "train", config.data.blocks, config.data.memory, config.data.segments)
    return PromptSet(_scripts(config.data.prompts, config), config.groups, config.seed)


def evaluation_scripts(config: RunConfig) -> list[Script]:
    """Those of `evaluate.prompts`; else unseen stories of the miniature, or the training prompts (see `unseen`)."""
    prompts = config.evaluate.prompts or config.data.prompts
    if prompts == "mini":
        source = StorySource(config.evaluate.seed, "evaluate", config.data.blocks, config.data.memory)
        return [source.script(0, i) for i in range(config.evaluate.scripts)]
    return list(_scripts(prompts, config))[: config.evaluate.scripts]


def _scripts(path: str, config: RunConfig) -> tuple[Script, ...]:
    data = config.data
    return read_scripts(path, data.blocks, switches=data.switches or None, max_segments=data.segments)


def unseen(config: RunConfig) -> bool:
    """The evaluation's scripts are not those that are trained on; its noise never is."""
    return config.data.prompts == "mini" or config.evaluate.prompts not in ("", config.data.prompts)
