"""Permission to read, asked before a file is called missing or broken."""

from __future__ import annotations

import os
import pwd
from pathlib import Path


def check_readable(path: Path) -> None:
    """Check that ``path`` may be opened, if it is there.

    Raises PermissionError with owner, mode and way out where it may not.

    Readers of other libraries say of a file that they may not open that it is broken, and a
    user who believes it deletes or downloads again what was whole.
    """
    try:
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        raise PermissionError(denied(path)) from None
    except OSError:
        return  # missing, or odd in another way: whoever reads it says so


def denied(path: Path) -> str:
    """The sentence for a path that may not be read: what refuses, whose it is, and what to do."""
    closed = [
        folder
        for folder in reversed(path.absolute().parents)
        if not os.access(folder, os.X_OK, effective_ids=True)
    ]
    refusing = closed[0] if closed else path
    where = f"{path}: permission denied" + (f" by the folder {refusing}" if closed else "")
    try:
        facts = refusing.stat()
    except OSError:
        return f"{where}; ask its owner for read access"
    right = "rx" if refusing.is_dir() else "r"
    return (
        f"{where}; it belongs to {_user(facts.st_uid)} (mode {facts.st_mode & 0o777:04o}) and this "
        f"is {_user(os.geteuid())}. "
        f"Ask for read access, `chmod a+{right} {refusing}`; what is in it has not been looked at"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a container's user often has no name
        return f"user {number}"
