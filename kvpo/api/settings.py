"""The settings of a library call: a recipe, and what is changed in it, as a `RunConfig`.

    settle("mini", {"steps": 30, "optimizer": {"lr": 1e-4}})
    settle("mini", {"steps": 30, "optimizer.lr": 1e-4})              the same

Precedence is the command line's: defaults < recipe < what the call says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from kvpo.config import RunConfig, from_dict, load_config, recipe_path, to_dict
from kvpo.rewards.registry import GIVEN, RewardEntry, give


def settle(recipe: str | Path | RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A recipe with some settings changed, each under its dotted name or in its section's mapping.

    FileNotFoundError for a recipe that is not there; ValueError for an unknown key, with the
    nearest known one, for a setting that is given twice, and for a value that does not fit.
    """
    config = recipe if isinstance(recipe, RunConfig) else load_config(recipe_path(str(recipe)))
    content = to_dict(config)
    leaves = list(_leaves(RunConfig, settings, ()))
    kind = dict(leaves).get(("objective", "kind"), config.objective.kind)
    if kind != config.objective.kind:  # another objective has other settings
        content["objective"] = {"kind": kind}
    given: set[tuple[str, ...]] = set()
    for path, value in leaves:
        if path in given:
            raise ValueError(f"{'.'.join(path)} is given twice; give it once")
        given.add(path)
        _put(content, path, _rewards(value) if path == ("rewards",) else value)
    return from_dict(content)


def _leaves(
    kind: Any, settings: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every setting; mappings are followed into sections, and only there."""
    for key, value in settings.items():
        path, inner = (*above, *str(key).split(".")), kind
        for part in str(key).split("."):
            inner = get_type_hints(inner).get(part) if dataclasses.is_dataclass(inner) else None
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            yield from _leaves(inner, value, path)
        elif path == ("objective",) and isinstance(value, Mapping):
            yield from (((*path, str(name)), one) for name, one in value.items())
        elif (
            path == ("objective",)
            and dataclasses.is_dataclass(value)
            and not isinstance(value, type)
        ):
            yield from (((*path, name), one) for name, one in dataclasses.asdict(value).items())
        else:
            yield path, str(value) if isinstance(value, Path) else value


def _put(content: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set one value.  Unknown keys are put there too: `from_dict` refuses them with the nearest."""
    if len(path) == 1 and path[0] not in content:
        sections = [name for name, held in content.items() if isinstance(held, dict)]
        if homes := [f"{name}.{path[0]}" for name in sections if path[0] in content[name]]:
            raise ValueError(f"unknown key {path[0]}; did you mean {' or '.join(homes)}?")
    for depth, part in enumerate(path[:-1], start=1):
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            section, name = ".".join(path[:depth]), ".".join(path)
            raise ValueError(
                f"unknown key {name}: {section} is one value and has no keys; set {section} itself"
            )
    content[path[-1]] = value


def _rewards(given: Any) -> list[Any]:
    """The entries of a recipe for a list of names, mappings, `RewardEntry`s and Python objects."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"rewards = {given!r} must be a list of rewards: names, objects, mappings")
    return [_entry(reward) for reward in given]


def _entry(reward: Any) -> dict[str, Any]:
    if isinstance(reward, RewardEntry):
        return dataclasses.asdict(reward)
    entry = dict(reward) if isinstance(reward, Mapping) else {"name": reward}
    if "name" not in entry or isinstance(entry["name"], str):
        return entry  # a missing name is refused with all other faults of a recipe
    name = give(entry["name"])
    if name.startswith(GIVEN) and entry.get("isolation", RewardEntry.isolation) != "inline":
        raise ValueError(
            f"reward {name!r} is an object of this process and can not be isolated in another one; "
            "write it into a file and name it module:name"
        )
    return entry | {"name": name}
