"""Rewards by name: shipped, of an installed package, or anyone's own class or function.

An installed package offers them by the entry point ``kvpo.rewards``.

Nothing of a reward is imported before it is asked for, and nothing is loaded before
`kvpo.rewards.scorer` does.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch

from kvpo.common.wording import nearest
from kvpo.rewards.base import UNBOUNDED, Reward, RewardSpec, VideoBatch
from kvpo.rewards.entry import RewardEntry
from kvpo.rewards.measured import Measured

GROUP = "kvpo.rewards"
"""The entry points by which other packages offer rewards."""

SHIPPED: Mapping[str, str] = {
    "world_vq": "kvpo.mini.rewards.world:VisualQuality",
    "world_mq": "kvpo.mini.rewards.world:MotionQuality",
    "world_ta": "kvpo.mini.rewards.world:TextAlignment",
    "world_facts": "kvpo.mini.rewards.facts:WorldFacts",
    "attributes": "kvpo.mini.rewards.heldout:AttributeAgreement",
    "identity": "kvpo.mini.rewards.heldout:IdentityDrift",
    "flow_motion": "kvpo.mini.rewards.flow_motion:FlowMotion",
    "classic": "kvpo.rewards.classic.classic:Classic",
    "niqe": "kvpo.rewards.classic.niqe:Niqe",
    "hpsv3": "kvpo.rewards.pretrained.hpsv3:HPSv3",
    "videoreward": "kvpo.rewards.pretrained.videoreward:VideoReward",
    "pickscore": "kvpo.rewards.pretrained.image_text:PickScore",
    "clip": "kvpo.rewards.pretrained.image_text:ClipAlignment",
    "siglip": "kvpo.rewards.pretrained.image_text:SiglipAlignment",
    "aesthetic": "kvpo.rewards.pretrained.aesthetic:Aesthetic",
    "hpsv2": "kvpo.rewards.pretrained.hpsv2:HPSv2",
    "dinov2": "kvpo.rewards.pretrained.dinov2:DinoConsistency",
    "efficientnet": "kvpo.rewards.pretrained.efficientnet:EfficientNetConsistency",
    "conse": "kvpo.rewards.pretrained.conse:Conse",
    "ocr": "kvpo.rewards.pretrained.ocr:TextReward",
}
"""Name -> module:class."""

PREFERENCE = "preference:"
"""Beginning of names of fitted preferences; the folder that `kvpo preference fit` wrote follows."""
GIVEN = "python:"
"""Beginning of names that only this process knows: rewards that were given as objects."""
_given: dict[str, Any] = {}
"""Name of a given reward -> the object that was given last under it."""


class Function(Measured):
    """A bare function of a `VideoBatch` as a reward: one number a clip, without bounds."""

    def __init__(self, function: Callable[..., Any], name: str, params: Mapping[str, Any]):
        try:
            inspect.signature(function).bind(None, **params)
        except TypeError as error:
            raise ValueError(
                f"reward {name!r} can not be called with a VideoBatch and params {dict(params)} ({error}); write it as def f(batch, ...) -> one number per clip"
            ) from None
        self.function = partial(function, **params)
        short = name.rpartition(":")[2]
        self.spec = RewardSpec(short, f"function {name}", UNBOUNDED, licence="its author's")

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        return torch.as_tensor(self.function(batch)), {}


def give(reward: Any) -> str:
    """A name by which a recipe can list a function, a class or a `Reward` object.

    It is ``module:name`` where another process can import it by that, and so resume and evaluate
    what was trained on it.  Else it is one that only this process knows, such as ``python:redness``
    for a function of a notebook, or ``python:NAME:FAMILY`` for an object with a ``spec``; a later
    object under the same name takes its place.  ValueError for what can be no reward.
    """
    if not callable(reward) and not _is_reward(reward):
        raise ValueError(
            f"reward {reward!r} is a {type(reward).__name__}; give a name, a function of a VideoBatch, or an object with {', '.join(INTERFACE)}"
        )
    module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", "")
    if (
        name
        and module != "__main__"
        and getattr(sys.modules.get(module or ""), name, None) is reward
    ):
        return f"{module}:{name}"
    if inspect.isclass(reward):
        raise ValueError(
            f"reward {name} is a class that can not be imported by its name; give an object of it, {reward.__name__}(...), or write it into a file"
        )
    plain = getattr(reward, "__name__", type(reward).__name__).strip("<>")  # <lambda>
    name = (
        f"{GIVEN}{reward.spec.name}:{reward.spec.family}"
        if _is_reward(reward)
        else f"{GIVEN}{plain}"
    )
    _given[name] = reward
    return name


def given_family(name: str) -> str:
    """Family of a reward that was given as an object, also in another process.

    "" for one with a name of its own.
    """
    if not name.startswith(GIVEN):
        return ""
    _, _, *family = name.split(":", 2)
    return family[0] if family else f"function {name}"


INTERFACE = ("spec", "load", "score", "offload")
"""Attributes that a `Reward` has."""


def _is_reward(found: Any) -> bool:
    return not inspect.isclass(found) and all(hasattr(found, attribute) for attribute in INTERFACE)


def find(name: str) -> Any:
    """Find the class, function or object of that name.

    Raises ValueError with the known names for an unknown one.
    """
    if name.startswith(GIVEN):
        if name not in _given:
            raise ValueError(
                f"reward {name!r} was given as a Python object to another process, and only that one has it; give it again, or write it into a file and name it module:name"
            )
        return _given[name]
    path = SHIPPED.get(name) or _offered().get(name) or name
    if name.startswith(PREFERENCE):
        path = "kvpo.preference.reward:Preference"
    module, _, attribute = path.partition(":")
    if not attribute:
        known = [*SHIPPED, *_offered()]
        near = nearest(name, known)
        raise ValueError(
            f"reward {name!r} is unknown"
            + (f"; did you mean {near}? Known" if near else "; known")
            + f" are {', '.join(known)}; your own is written package.module:Class"
        )
    if path == name and (here := os.getcwd()) not in sys.path:
        sys.path.append(
            here
            # as `python -m kvpo` has it: a reward in a file of the working folder need not be installed
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"reward {name!r} can not be imported from {path} ({error}); correct its name, or install what it needs"
        ) from None
    if found is None:
        raise ValueError(
            f"reward {name!r} can not be imported: module {module!r} has no {attribute!r}; correct the name"
        )
    return found


def make_reward(name: str, params: Mapping[str, Any] = {}) -> Reward:
    """The reward, not yet loaded. ValueError for a name, parameter or class that can not be one."""
    found = find(name)
    if name.startswith(PREFERENCE):
        params = {**params, "path": name.removeprefix(PREFERENCE)}
    if _is_reward(found):
        if params:
            raise ValueError(
                f"reward {name!r} is an object, which is made already: params = {dict(params)} come too late; give them to its class"
            )
        return found
    if not callable(found):
        raise ValueError(
            f"reward {name!r} is a {type(found).__name__}; it must be a class, a function, or an object with {', '.join(INTERFACE)}"
        )
    if not inspect.isclass(found):
        return Function(found, name, params)
    _refuse_unknown_params(name, found, params)
    reward: Any = found(**params)
    missing = [attribute for attribute in INTERFACE if not hasattr(reward, attribute)]
    if missing:
        raise ValueError(
            f"reward {name!r} has no {', '.join(missing)}; derive it from kvpo.rewards.measured.Measured, or write a plain function of a VideoBatch"
        )
    return reward


def check_held_out(entries: Sequence[RewardEntry], specs: Sequence[RewardSpec]) -> None:
    """Check that no evaluator is of a trained reward's family.

    Raises ValueError where one is: its gain would be the training's own, not a second opinion.
    """
    trained = {
        spec.family: spec.name for entry, spec in zip(entries, specs) if entry.role == "train"
    }
    for entry, spec in zip(entries, specs):
        if entry.role == "eval" and spec.family in trained:
            raise ValueError(
                f"reward {spec.name!r} (role eval) is of family {spec.family!r} like {trained[spec.family]!r}, which is trained on: it is not held out; "
                "make it a guard, or choose an evaluator of another family (`kvpo rewards list`)"
            )


def _offered() -> dict[str, str]:
    """Entry points of installed packages, name -> module:attribute."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def known() -> dict[str, str]:
    """Every name that needs no path, with its module:attribute."""
    return {**SHIPPED, **_offered()}


def _refuse_unknown_params(name: str, kind: type, params: Mapping[str, Any]) -> None:
    takes = (
        [f.name for f in dataclasses.fields(kind) if f.init and f.name != "spec"]
        if dataclasses.is_dataclass(kind)
        else list(inspect.signature(kind).parameters)
    )
    for key in params:
        if key not in takes:
            near = nearest(key, takes)
            raise ValueError(
                f"reward {name!r} has no parameter {key!r}"
                + (
                    f"; did you mean {near}?"
                    if near
                    else f"; it takes {', '.join(takes) or 'none'}"
                )
            )
