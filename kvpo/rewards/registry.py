"""Rewards by name: the shipped ones, or ``package.module:Class`` of anyone's own."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Literal, Mapping, Sequence

import torch

from kvpo.rewards.base import Reward

SHIPPED: Mapping[str, str] = {
    "world_vq": "kvpo.rewards.world:VisualQuality",
    "world_mq": "kvpo.rewards.world:MotionQuality",
    "world_ta": "kvpo.rewards.world:TextAlignment",
    "world_facts": "kvpo.rewards.facts:WorldFacts",
    "attributes": "kvpo.rewards.heldout:AttributeAgreement",
    "identity": "kvpo.rewards.heldout:IdentityDrift",
    "flow_motion": "kvpo.rewards.opticalflow:FlowMotion",
}
"""Name -> module:class; nothing is imported before it is asked for."""


@dataclass(frozen=True)
class RewardEntry:
    """One reward of a recipe."""

    name: str
    """A shipped name, or ``package.module:Class``."""
    weight: float = 1.0
    """Of its advantages; 0 = logged, not trained on."""
    role: Literal["train", "eval", "guard"] = "train"
    """`eval`: held out, only ever used by evaluations; `guard`: likewise, but of the trained rewards' own family: it must not fall."""


def make_reward(name: str) -> Reward:
    """The reward, not yet loaded.  ValueError with the known names for an unknown one."""
    path = SHIPPED.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name, SHIPPED, n=1)
        raise ValueError(f"reward {name!r} is unknown" + (f"; did you mean {near[0]}?" if near else "") + f" Shipped are {', '.join(SHIPPED)}; your own is written package.module:Class")
    if path == name and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # as `python -m kvpo` has it: a reward in a file of the working folder need not be installed
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"reward {name!r} can not be imported from {path}: {error}") from None
    if found is None:
        raise ValueError(f"reward {name!r} can not be imported: module {module!r} has no {attribute!r}")
    return found()


def load_rewards(entries: Sequence[RewardEntry], device: torch.device | str) -> list[Reward]:
    rewards = [make_reward(entry.name) for entry in entries]
    for reward in rewards:
        reward.load(device)
    names = [r.spec.name for r in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards share a name: {names}; every one must have its own")
    return rewards
