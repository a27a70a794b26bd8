"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def write_atomic(path: Path, data: bytes | str) -> Path:
    """Write exactly ``data`` (text as UTF-8) to ``path``.

    Whoever reads it sees the old content or the new, never half.

    Makes missing parent folders. OSError where the disk refuses; nothing half-written remains then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # whichever hosts and containers write there
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
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
    """Give a file, or all of a folder, the access that new files get here.

    That is 0666 and 0777 without the umask.

    Some libraries write files that only their writer may read (safetensors 0.8: 0600), and a
    colleague who may not read them is told that they are broken.  Files with a second name
    elsewhere are left alone: their access is not ours to change.
    """
    mode = _mode_of_new_files(path if path.is_dir() else path.parent)
    for found in (path, *(path.rglob("*") if path.is_dir() else ())):
        if found.is_symlink():
            continue
        facts = found.stat()
        # who may read a folder may look into it
        wanted = mode | (mode & 0o444) >> 2 if found.is_dir() else mode
        if (found.is_dir() or facts.st_nlink == 1) and facts.st_mode & 0o777 != wanted:
            found.chmod(wanted)


def _mode_of_new_files(folder: Path) -> int:
    """Access of new files in a folder, asked of a file that is made for it.

    The umask itself can not be read without changing it for all threads.
    """
    probe = folder / f".mode.{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep all other processes out of the folder while the body runs.

    Raises ValueError where one is there already. A process that is killed leaves nothing behind.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work on the run in {folder}; wait until it has ended, or choose another folder by --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def try_folder(
    folder: Path, way_out: str = "give another place by --out, or make this one writable"
) -> None:
    """Check that a folder, which need not be there yet, can be written into.

    Raises OSError with the way out where it can not; nothing is left of the trial.
    """
    there = next(
        parent
        for parent in (folder.absolute(), *folder.absolute().parents)
        if os.path.lexists(parent)
    )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = (
            f"{there} is no folder"
            if not there.is_dir()
            else f"{there}: {error.strerror or first_line(error)}"
        )
        raise OSError(f"nothing can be written into {folder} ({reason}); {way_out}") from None


def try_file(path: Path) -> None:
    """Check that a file can be written.

    Raises OSError with the way out where not, ValueError where a folder has its name.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give a file by --out, such as {path / 'result.json'}"
        )
    try_folder(path.parent)


def unused(path: Path) -> Path:
    """``path``, or where that is taken the first of path-2, path-3, ... that is not."""
    names = (
        path.with_name(f"{path.stem}-{number}{path.suffix}") if number > 1 else path
        for number in itertools.count(1)
    )
    return next(name for name in names if not os.path.lexists(name))


def say_replaced(paths: Sequence[Path], say: Callable[[str], None]) -> None:
    """Say in one line what is there already and will be written anew.

    It says nothing where all is new.
    """
    if there := [path for path in paths if path.exists()]:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        say(
            f"replaces {there[0]}{others}, which {'were' if others else 'was'} there already; give another --out to keep {'them' if others else 'it'}"
        )


def must_be_new(path: Path) -> None:
    """Check that nothing is at ``path``; ValueError if something is."""
    if path.exists():
        raise ValueError(f"{path} is there already; give another place, nothing is overwritten")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes ``path`` when that went well.

    Nothing of it is left otherwise.

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
    """Give a path to write what is then moved to ``path``, a file or a folder, by the body.

    If it does not come to that, nothing of it is left. Raises OSError where the disk refuses.
    """
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
    """Turn a disk's refusal of ``path`` into an OSError of one line with the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({first_line(error)}); {way_out}") from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def in_words(error: BaseException) -> str:
    """Describe a system's error about a file as file and reason.

    It would be a number and no rule. Any other error is described as it is.
    """
    if (
        not isinstance(error, OSError)
        or not isinstance(error.filename, (str, bytes))
        or not str(error).startswith("[Errno")
    ):
        return str(error) or type(error).__name__
    reasons = {
        errno.ENOENT: "there is no such file or folder; correct the path",
        errno.EACCES: "Permission denied: this user may not read or write it; give another path or change its rights",
        errno.EISDIR: "it is a folder, where a file is needed; name the file",
        errno.ENOTDIR: "a part of the path is a file, where a folder is needed; correct the path",
        errno.ENOSPC: "the disk is full; free some of it, or choose another one",
        errno.EROFS: "the disk can not be written to; choose another one",
    }
    return f"{os.fsdecode(error.filename)}: {reasons.get(error.errno or 0, str(error.strerror))}"


def first_line(error: BaseException) -> str:
    """First line of the message, or the class name if it is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
