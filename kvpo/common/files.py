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


def open_to_readers(path: Path) -> None:
    """Give a file, or all of a folder, the access that new files get here: 0666 and 0777 without the umask.

    Some libraries write files that only their writer may read (safetensors 0.8: 0600), and a
    colleague who may not read them is told that they are broken.  Files with a second name
    elsewhere are left alone: their access is not ours to change.
    """
    mode = _mode_of_new_files(path if path.is_dir() else path.parent)
    for found in (path, *(path.rglob("*") if path.is_dir() else ())):
        if found.is_symlink():
            continue
        facts = found.stat()
        wanted = mode | (mode & 0o444) >> 2 if found.is_dir() else mode  # who may read a folder may look into it
        if (found.is_dir() or facts.st_nlink == 1) and facts.st_mode & 0o777 != wanted:
            found.chmod(wanted)


def _mode_of_new_files(folder: Path) -> int:
    """Asked of a file that is made for it: the umask itself can not be read without changing it for all threads."""
    probe = folder / f".mode.{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


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
    with beside(path, "nothing of it is left. Free disk space, or choose another disk") as part:
        part.mkdir()
        yield part
        open_to_readers(part)
        os.replace(part, path)


@contextmanager
def beside(path: Path, way_out: str) -> Iterator[Path]:
    """Where to write what the body then moves to ``path``, a file or a folder; if it does not come to that, nothing of it is left.  OSError where the disk refuses."""
    part = path.with_name(f".{path.name}.part")
    try:
        with refusals(path, way_out):
            _remove(part)  # of a program that was killed
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
    finally:
        _remove(part)


@contextmanager
def refusals(path: Path, way_out: str) -> Iterator[None]:
    """What a disk that refuses ``path`` raises, as one line with the way out: OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({first_line(error)}); {way_out}") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """Of its text; of one that says nothing, its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
