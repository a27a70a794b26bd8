"""Tensors of a checkpoint folder of torch.distributed.checkpoint, without running code from it.

    .metadata        a pickle: names, shapes and where each piece of each tensor lies
    __0_0.distcp     the pieces, each of them a file of `torch.save` of its own

torch reads the index by `pickle.load`, which runs whatever a stranger wrote into it.  Here it is
unpickled with no more than the record classes that torch itself writes there, and everything else
is refused by name.  Of the contents only tensors are read, which torch does without unpickling;
step counters and learning rates, which it would unpickle, and optimizers' moments stay unread.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from kvpo.common.access import check_readable
from kvpo.common.files import first_line
from kvpo.common.weights import State

INDEX, PIECES = ".metadata", ".distcp"
OF_OPTIMIZERS = re.compile(r"(^|[._])optim", re.IGNORECASE)
_RECORDS = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *(
        (_RECORDS, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath")
    ),
}
"""(module, name) of everything that an index written by torch names; none of it does anything."""


class _Foreign(pickle.UnpicklingError):
    """A name that torch's own indices do not have; its message is that name."""


class _Index(pickle.Unpickler):
    """Unpickler that knows torch's own records and dtypes, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _Foreign(f"{module}.{name}")


class _Reader(dcp.FileSystemReader):
    """torch's reader, with the index read as above."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


def is_distributed(folder: Path) -> bool:
    """Whether a folder is, or was meant to be, such a checkpoint."""
    return (folder / INDEX).is_file() or any(folder.glob(f"*{PIECES}"))


def read_distributed(folder: Path) -> State:
    """Every tensor of the checkpoint that is no optimizer's, by its name there.

    FileNotFoundError, PermissionError; ValueError where the index holds more than names and places,
    or a piece is missing or broken.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_index(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not OF_OPTIMIZERS.search(name)
    }
    try:
        # that no process group is there, which torch warns of, is meant
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except (dcp.api.CheckpointException, RuntimeError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a whole checkpoint ({_reason(error)}); copy it again"
        ) from None
    return tensors


def read_index(folder: Path) -> Metadata:
    """The index: which tensors there are, and where their pieces lie.

    Raises FileNotFoundError, PermissionError or ValueError.
    """
    path = folder / INDEX
    check_readable(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has pieces of a checkpoint of torch.distributed.checkpoint, but not its "
            f"index {INDEX}; copy that too (names that begin with a dot are easily left behind)"
        )
    try:
        with path.open("rb") as file:
            index = _Index(file).load()
    except _Foreign as error:
        raise ValueError(
            f"{path} holds more than names and places ({first_line(error)}); reading it would run "
            "code from the file, so it is refused. Save the weights alone, as safetensors, where "
            "they were trained"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(
            f"{path} is not a whole index ({first_line(error)}); copy it again"
        ) from None
    _check_places(path, index)
    return index


def _check_places(path: Path, index: Any) -> None:
    """Check that the index has tensors, and that their pieces lie beside it and nowhere else."""
    entries = getattr(index, "state_dict_metadata", None)
    if not isinstance(index, Metadata) or not isinstance(entries, dict):
        raise ValueError(f"{path} is no index of tensors; give another checkpoint")
    places = {info.relative_path for info in (index.storage_data or {}).values()}
    if outside := sorted(place for place in places if Path(place).name != place):
        raise ValueError(
            f"{path} points out of its folder ({outside[0]}), as no checkpoint does; give another one"
        )
    if missing := sorted(place for place in places if not (path.parent / place).is_file()):
        raise FileNotFoundError(
            f"{path} names {len(places)} files of pieces, and {len(missing)} of them are not "
            f"there: {', '.join(missing[:4])}; copy them too"
        )


def _reason(error: BaseException) -> str:
    """First line of the failure that torch has wrapped, the first rank's."""
    failures = getattr(error, "failures", None)
    return first_line(next(iter(failures.values()))[0] if failures else error)
