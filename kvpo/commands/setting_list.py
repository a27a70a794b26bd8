"""A recipe's settings as a list of name, value, default and explanation.

The explanation is the first sentence of the docstring under the setting where it is defined.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from kvpo.config import RunConfig, to_dict
from kvpo.method.objectives.kinds import OBJECTIVES
from kvpo.rewards.entry import RewardEntry

SET_ELSEWHERE = ("advantages.weights",)
"""Settings that no recipe can give: the rewards' own weights become them."""


@dataclass(frozen=True)
class Setting:
    """One line of the list."""

    name: str
    """Key in a recipe, with its section: optimizer.lr."""
    value: str
    default: str
    """Empty where the value is the default."""
    about: str


def settings_of(config: RunConfig, skipped: Sequence[str] = ()) -> list[Setting]:
    """All settings of a recipe in the order of their definition.

    Sections that are ``skipped`` are left out.
    """
    found = _listed(RunConfig, to_dict(config), to_dict(RunConfig()))
    return [s for s in found if s.name.partition(".")[0] not in skipped]


def unused_sections(config: RunConfig) -> list[str]:
    """Sections of the explorers and energies that the recipe does not choose."""
    hints = get_type_hints(RunConfig)
    choices = {*get_args(hints["explorer"]), *get_args(hints["surrogate"])}
    chosen = {config.explorer} | ({config.surrogate} if config.objective.uses_energy else set())
    return sorted(choices - chosen)


def sections() -> dict[str, str]:
    """Section -> the first sentence of its description."""
    hints = get_type_hints(RunConfig)
    names = [f.name for f in fields(RunConfig) if is_dataclass(hints[f.name])]
    found = {name: first_sentence(hints[name].__doc__ or "") for name in names}
    kinds = "What an update is, by its kind: " + ", ".join(OBJECTIVES) + "."
    return {
        f.name: found.get(f.name, kinds)
        for f in fields(RunConfig)
        if f.name in found or f.name == "objective"
    }


def to_default(kind: type) -> dict[str, Any]:
    """An objective's settings as they are by default."""
    return TypeAdapter(kind).dump_python(kind(), mode="json")


def _listed(
    kind: type, values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> Iterator[Setting]:
    hints, about = get_type_hints(kind), field_docs(kind)
    for name in (f.name for f in fields(kind)):
        value, default = values[name], defaults[name]
        if prefix + name == "objective":
            chosen = OBJECTIVES[value["kind"]]
            usual = {**to_default(chosen), "kind": default["kind"]}
            yield from _listed(chosen, value, usual, "objective.")
        elif is_dataclass(hints[name]):
            yield from _listed(hints[name], value, default, f"{prefix}{name}.")
        elif prefix + name == "rewards":
            yield from _rewards(value, default, first_sentence(about.get(name, "")))
        elif prefix + name not in SET_ELSEWHERE:
            other = "" if value == default else written(default)
            sentence = first_sentence(about.get(name, ""))
            yield Setting(prefix + name, written(value), other, sentence)


def _rewards(
    entries: Sequence[Mapping[str, Any]], defaults: Sequence[Mapping[str, Any]], about: str
) -> Iterator[Setting]:
    """A line a reward; the default is the reward that has its place by default."""
    for i, entry in enumerate(entries):
        default = defaults[i] if i < len(defaults) else None
        other = "" if entry == default else _reward(default) if default else "none"
        yield Setting(f"rewards.{i}", _reward(entry), other, about if i == 0 else "")


def _reward(entry: Mapping[str, Any]) -> str:
    """Name of a reward, and the settings that differ from `RewardEntry`'s defaults."""
    usual = {**vars(RewardEntry("")), "name": None}
    return ", ".join(
        written(value) if key == "name" else f"{key} {written(value)}"
        for key, value in entry.items()
        if value != usual[key]
    )


def written(value: Any) -> str:
    """A value as a recipe may have it; text without quotes, unless it is empty."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Field -> the string under it in the dataclass's source, which Python itself forgets.

    Fields that it inherits are explained where they are defined.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            found |= _own_field_docs(base)
    return found


def _own_field_docs(kind: type) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    pairs = zip(definition.body, definition.body[1:])
    return {
        field.target.id: below.value.value
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def first_sentence(text: str) -> str:
    """On one line. A full stop ends it only where another sentence begins, so `e.g.` does not."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph, maxsplit=1)[0]
