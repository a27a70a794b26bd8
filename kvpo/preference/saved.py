"""The folder of a fitted preference, which a reward is made of: tensors and JSON, nothing to run.

preference.safetensors    weights, mean, spread, reach: float64 [F]
preference.json           features and their order, strength, where it comes from, what it is worth
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kvpo.common.access import check_readable
from kvpo.common.files import whole_folder, write_atomic
from kvpo.common.weights import identity
from kvpo.preference.bradley_terry import Scale
from kvpo.preference.fit import Fitted
from kvpo.preference.validation import LIFE

TENSORS, ABOUT = "preference.safetensors", "preference.json"
SCALE = tuple(field.name for field in fields(Scale))
KIND, VERSION = "kvpo preference", 2


@dataclass(frozen=True)
class Saved:
    """A preference as its folder has it."""

    sets: tuple[str, ...]
    names: tuple[str, ...]
    weights: np.ndarray
    scale: Scale
    limits: Mapping[str, float]
    networks: Mapping[str, str]
    about: Mapping[str, Any]
    """All of preference.json."""
    identity: str
    """Name and hash of the tensors."""


def save(folder: Path, fitted: Fitted, provenance: Mapping[str, Any]) -> None:
    """Write the folder, whole or not at all.

    Raises ValueError where it is there already, OSError where the disk refuses.
    """
    model = fitted.model
    about = {
        "kind": KIND,
        "version": VERSION,
        "sets": list(model.option.sets),
        "names": list(fitted.names),
        "strength": model.option.strength,
        "limits": dict(model.limits),
        "networks": dict(fitted.networks),
        "numbers": dict(fitted.numbers),
        "provenance": dict(provenance),
    }
    scale = model.scale
    tensors = {"weights": model.weights} | {name: getattr(scale, name) for name in SCALE}
    with whole_folder(folder) as part:
        save_file(
            {k: np.ascontiguousarray(v, np.float64) for k, v in tensors.items()}, part / TENSORS
        )
        write_atomic(part / ABOUT, json.dumps(about, indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> Saved:
    """Read a folder.  FileNotFoundError or ValueError, with the way out, where it is no preference."""
    about = _about(folder)
    path = folder / TENSORS
    try:
        check_readable(path)
        tensors = load_file(path)
        w, scale = tensors["weights"], Scale(**{name: tensors[name] for name in SCALE})
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} can not be read ({error}); {AGAIN}") from None
    whole = all(
        x.shape == (len(about["names"]),) and np.isfinite(x).all()
        for x in (w, *(tensors[name] for name in SCALE))
    )
    if not whole or not (scale.spread > 0).all() or not (scale.reach > 0).all():
        raise ValueError(
            f"{path} does not fit {ABOUT}: of {len(about['names'])} features each must have a weight, a mean, a spread and a reach above 0; {AGAIN}"
        )
    return Saved(
        tuple(about["sets"]),
        tuple(about["names"]),
        w,
        scale,
        about["limits"],
        about["networks"],
        about,
        identity("preference", [path]),
    )


AGAIN = "give a folder that `kvpo preference fit` wrote, or fit it again"


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no preference: {path} is not there; {AGAIN}")
    check_readable(path)
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {AGAIN}") from None
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise ValueError(f"{path} is of something else than a preference; {AGAIN}")
    if about.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {about.get('version')!r}, and this kvpo reads version {VERSION}; {AGAIN}"
        )
    kinds = {"sets": list, "names": list, "networks": dict, "numbers": dict, "provenance": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]:
        raise ValueError(f"{path} has no {wrong[0]} that can be read; {AGAIN}")
    if not all(isinstance(text, str) for text in about["sets"] + about["names"]):
        raise ValueError(f"{path}: its sets and names must be texts; {AGAIN}")
    limits = about.get("limits")
    if (
        not isinstance(limits, dict)
        or set(limits) != set(LIFE)
        or not all(map(_above_0, limits.values()))
    ):
        raise ValueError(
            f"{path}: its limits must be numbers above 0 for {', '.join(LIFE)}; {AGAIN}"
        )
    return about


def _above_0(value: object) -> bool:
    return isinstance(value, float) and value > 0
