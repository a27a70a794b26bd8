"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError


def write_atomic(path: Path, data: bytes | str) -> Path:
    """``path`` with exactly ``data`` (text as UTF-8); whoever reads it sees the old content or the new, never half.

    Makes missing parent folders.  OSError where the disk refuses; nothing half-written remains then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def must_be_new(path: Path) -> None:
    """ValueError if something is there."""
    if path.exists():
        raise ValueError(f"{path} is there already; give another place, nothing is overwritten")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when that went well; nothing of it is left otherwise.

    ValueError if ``path`` is there already; OSError with the way out where the disk refuses.
    """
    must_be_new(path)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}); nothing of it is left. Free disk space, or choose another disk") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
