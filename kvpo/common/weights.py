"""Files of weights, read without unpickling anything.

Every tensor is accounted for, and files are named by their hash.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvpo.common.access import check_readable
from kvpo.common.files import first_line

State = dict[str, torch.Tensor]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors of a .pt or .safetensors file, memory-mapped where the format allows.

    FileNotFoundError; PermissionError; ValueError for a broken file, and for one that holds more
    than plain data: unpickling it could run any code.
    """
    check_readable(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; correct the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(
            action="ignore"
        ):  # of a foreign pickle protocol: what matters is refused below
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported [^\n]*?(?= was not|\n|$)", str(error))
        raise ValueError(
            f"{path} holds more than tensors ({reason[0] if reason else first_line(error)}); reading it would run code from the file, so it is refused. "
            "Save its weights alone, as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint ({first_line(error)}); copy it again"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not named tensors; give a checkpoint"
        )
    return dict(content)


def account(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Size],
    source: str,
    target: str,
    way_out: str = "give the checkpoint and the base folder of one model",
) -> None:
    """Check that exactly the ``wanted`` tensors were found.

    Raises ValueError with the ``way_out`` that lists every tensor missing from ``found``, more than asked for, or of
    another shape.
    """
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "surplus": sorted(found.keys() - wanted.keys()),
        "misshapen": [
            f"{n} {list(found[n].shape)} for {list(wanted[n])}"
            for n in sorted(found.keys() & wanted.keys())
            if found[n].shape != wanted[n]
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for what, names in faults.items()
            if names
        )
        raise ValueError(f"{source} does not fit {target}: {listed}; {way_out}")


def identity(name: str, files: Sequence[Path]) -> str:
    """Name of these weights in a report: ``name file sha256:...``.

    It tells whether two runs have used the same weights.
    """
    return " ".join((name, *(f"{file.name} sha256:{sha256_of(file)}" for file in files)))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
