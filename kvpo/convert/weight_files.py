"""Forms of a path given for weights.

It is a file, a sharded set, a LoRA's folder, or no readable form.

    X.safetensors, X.pt                          itself
    X.safetensors.index.json, its folder         all shards that the index names
    transformer/, or a pipeline folder           the weights of its transformer
    adapter_config.json beside adapter_model.*   a LoRA of PEFT, whose scale is in the config

Forms that would have to be unpickled, or that are a run's own state, are named with the way out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kvpo.common.access import check_readable
from kvpo.common.weights import read_checkpoint

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)$"
)
ADAPTER_CONFIG = "adapter_config.json"
TRAINING_SETS = ("current.", "behaviour.", "average.", "reference.")


@dataclass(frozen=True)
class WeightFiles:
    """The files that a path stands for."""

    path: Path
    files: tuple[Path, ...]
    config: Path | None = None
    """PEFT's adapter_config.json, where the weights are a LoRA that it describes."""

    def read(self) -> dict[str, Any]:
        """All tensors of all files.  ValueError where a file is broken, or holds a run's state."""
        content: dict[str, Any] = {}
        for file in self.files:
            content |= read_checkpoint(file)
        if any(name.startswith(TRAINING_SETS) for name in content):
            raise ValueError(
                f"{self.path} is what a run of kvpo resumes from, four sets of weights in one; "
                f"{_EXPORT}"
            )
        return content

    def header(self) -> dict[str, str]:
        """The text that a safetensors file carries beside its tensors; nothing for other files."""
        if len(self.files) != 1 or self.files[0].suffix != ".safetensors":
            return {}
        with safe_open(self.files[0], "pt") as file:
            return file.metadata() or {}


_EXPORT = (
    "write its weights by `kvpo export RUN:ema --format original-merged` "
    "(or --format diffusers-lora) and give that file"
)


def find_weights(path: Path) -> WeightFiles:
    """The files behind ``path``.

    FileNotFoundError, PermissionError, or ValueError that says what it is instead and the way out.
    """
    check_readable(path)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; correct the path")
    if path.name.endswith(".index.json"):
        return WeightFiles(path, _indexed(path))
    if path.name == ADAPTER_CONFIG:
        return _in_folder(path.parent)
    if path.suffix == ".distcp":
        raise ValueError(_dcp(path.parent))
    config = path.parent / ADAPTER_CONFIG
    beside = path.stem == "adapter_model" and config.is_file()
    return WeightFiles(path, _shards(path) or (path,), config if beside else None)


def _in_folder(folder: Path) -> WeightFiles:
    names = {p.name: p for p in sorted(folder.iterdir())}
    if ADAPTER_CONFIG in names:
        found = [names[n] for n in ("adapter_model.safetensors", "adapter_model.bin") if n in names]
        if not found:
            raise FileNotFoundError(
                f"{folder} has {ADAPTER_CONFIG}, but neither adapter_model.safetensors nor "
                "adapter_model.bin; copy the weights beside it"
            )
        return WeightFiles(folder, (found[0],), names[ADAPTER_CONFIG])
    if ".metadata" in names or any(n.endswith(".distcp") for n in names):
        raise ValueError(_dcp(folder))
    if "config.resolved.yaml" in names:
        raise ValueError(f"{folder} is a run of kvpo; {_EXPORT}")
    if "state.json" in names and any(n.startswith(("tensors.", "shard-")) for n in names):
        raise ValueError(f"{folder} is a run's checkpoint, four sets of weights in one; {_EXPORT}")
    if (folder / "transformer").is_dir():
        return _in_folder(folder / "transformer")
    if indexes := [p for n, p in names.items() if n.endswith(".index.json")]:
        return WeightFiles(folder, _indexed(_only(folder, indexes, "indexes")))
    weights = [p for p in names.values() if p.suffix in WEIGHTS]
    if weights and (shards := _shards(weights[0])) and len(shards) == len(weights):
        return WeightFiles(folder, shards)
    if not weights:
        inside = [p.name for p in names.values() if p.is_dir()][:6]
        raise FileNotFoundError(
            f"{folder} holds no weights ({', '.join(WEIGHTS)})"
            + (f"; give one of its folders, {', '.join(inside)}" if inside else "")
        )
    return WeightFiles(folder, (_only(folder, weights, "weight files"),))


def _only(folder: Path, found: list[Path], what: str) -> Path:
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} {what}, {', '.join(p.name for p in found[:6])}; give the "
            "one that is meant"
        )
    return found[0]


def _indexed(index: Path) -> tuple[Path, ...]:
    """All shards of an index.  ValueError where one is missing."""
    check_readable(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} is no index of shards: it has no weight_map; copy it again"
        ) from None
    files = tuple(index.parent / name for name in names)
    if missing := [f.name for f in files if not f.is_file()]:
        raise FileNotFoundError(
            f"{index} names {len(files)} shards, and {len(missing)} of them are not there: "
            f"{', '.join(missing[:4])}; fetch them too"
        )
    return files


def _shards(path: Path) -> tuple[Path, ...]:
    """All shards of the set that a file is one of; nothing where it is none.

    FileNotFoundError where one is missing.
    """
    if (found := SHARD.match(path.name)) is None:
        return ()
    count = int(found["count"])
    files = tuple(
        path.with_name(f"{found['stem']}-{i:05d}-of-{count:05d}{found['suffix']}")
        for i in range(1, count + 1)
    )
    if missing := [f.name for f in files if not f.is_file()]:
        raise FileNotFoundError(
            f"{path.name} is one of {count} shards, and {', '.join(missing[:4])} is not beside it; "
            "fetch all of them"
        )
    return files


def _dcp(folder: Path) -> str:
    return (
        f"{folder} is a checkpoint of torch.distributed.checkpoint, whose index is a pickle and is "
        "not read here; "
        "turn it into one file by `python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {folder} generator.pt` and give that"
    )
