"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
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
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")  # whichever hosts and containers write there
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process is; ValueError where one is already.  A process that is killed leaves nothing behind."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on the run in {folder}; wait until it has ended, or choose another folder by --out") from None
        except OSError:  # a file system without locks
            pass
        yield


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
