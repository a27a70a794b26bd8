"""Forms of a path given for weights.

It is a file, a sharded set, a LoRA's folder, or no readable form.

    X.safetensors, X.pt                          itself
    X.safetensors.index.json, its folder         all shards that the index names
    transformer/, or a pipeline folder           the weights of its transformer
    adapter_config.json beside adapter_model.*   a LoRA of PEFT, whose scale is in the config
    .metadata beside *.distcp                    a checkpoint of torch.distributed.checkpoint

A run's own state is named with the way out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kvpo.common.access import check_readable
from kvpo.common.text_files import read_text
from kvpo.common.weights import read_checkpoint
from kvpo.convert.distributed_files import INDEX, PIECES, is_distributed, read_distributed

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)$"
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINING_SETS = ("current.", "behaviour.", "average.", "reference.")


@dataclass(frozen=True)
class WeightFiles:
    """The files that a path stands for."""

    path: Path
    files: tuple[Path, ...]
    config: Path | None = None
    """PEFT's adapter_config.json, where the weights are a LoRA that it describes."""
    distributed: bool = False
    """Whether the files are pieces of a checkpoint of torch.distributed.checkpoint."""

    def read(self) -> dict[str, Any]:
        """All tensors of all files.  ValueError where a file is broken, or holds a run's state."""
        content: dict[str, Any] = {}
        if self.distributed:
            content = dict(read_distributed(self.path))
        else:
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
        if len(self.files) != 1 or self.files[0].suffix != ".safetensors" or self.distributed:
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
    if path.suffix == PIECES or path.name == INDEX:
        return _distributed(path.parent)
    return WeightFiles(path, _shards(path) or (path,), _config_of(path))


def _config_of(path: Path) -> Path | None:
    """PEFT's config beside a file that it describes.

    It describes adapter_model.* where that is there, and otherwise whatever weights lie beside it:
    people rename the file, and without its config it would be merged at 1.
    """
    config = path.parent / ADAPTER_CONFIG
    if not config.is_file():
        return None
    others = any((path.parent / name).is_file() for name in ADAPTER_WEIGHTS)
    return config if path.name in ADAPTER_WEIGHTS or not others else None


def _in_folder(folder: Path) -> WeightFiles:
    names = {p.name: p for p in sorted(folder.iterdir())}
    if ADAPTER_CONFIG in names:
        found = [names[n] for n in ADAPTER_WEIGHTS if n in names] or [
            p for p in names.values() if p.suffix in WEIGHTS
        ]
        if found:
            if found[0].name not in ADAPTER_WEIGHTS:
                _only(folder, found, "weight files")
            return WeightFiles(folder, (found[0],), names[ADAPTER_CONFIG])
        if not is_distributed(folder):
            raise FileNotFoundError(
                f"{folder} has {ADAPTER_CONFIG}, but neither adapter_model.safetensors nor "
                "adapter_model.bin; copy the weights beside it"
            )
    if is_distributed(folder):
        return _distributed(folder)
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
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
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


def _distributed(folder: Path) -> WeightFiles:
    config = folder / ADAPTER_CONFIG
    pieces = tuple(sorted(folder.glob(f"*{PIECES}")))
    return WeightFiles(
        folder, (folder / INDEX, *pieces), config if config.is_file() else None, distributed=True
    )
