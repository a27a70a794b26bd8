"""Long work of the studio in processes of its own: one at a time, known again after a restart.

work/KIND.json     the latest process of each kind: its command line, its number, what it makes
work/KIND.log      what it said

A process leads a session of its own, so ctrl-C at the studio's terminal does not reach it, and has
a lower priority than the generator, so the block that a tab waits for comes first. It ends when its
work is done or when somebody asks for it, and not with the studio.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvpo.common.files import refusals, write_atomic
from kvpo.studio.library import check_name, no_link

KINDS = ("fit", "align", "compare")
NICENESS = 10
"""Niceness that is added to a process; the generator keeps its own."""
TAIL = 2**14
"""Bytes of a log's end that are looked at."""
LARGEST = 2**16
"""Bytes of a record beyond which it is not read."""
REFUSAL = re.compile(r"kvpo [a-z-]+: (.+)")
"""Line by which a command says why it did not do what was asked."""
FAR = re.compile(r"\d\d:\d\d:\d\d ([a-z][^,/]{0,80}) (\d{1,9})/(\d{1,9})(?:[ ,].*)?")
"""Line by which `kvpo.common.progress` says now and then how far a piece of work is."""


@dataclass(frozen=True)
class Child:
    """A process that the studio started, now or before it was started again."""

    kind: str
    name: str
    """Name of what it makes: a preference, a run, a comparison."""
    pid: int
    argv: tuple[str, ...]
    begun: str
    about: Mapping[str, Any] = field(default_factory=dict)
    """Facts that belong to it, such as the preference that a run is aligned to."""


class Children:
    """The processes of one studio's folder."""

    def __init__(self, folder: Path):
        self.folder = folder / "work"
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(
        self, kind: str, name: str, argv: Sequence[str], about: Mapping[str, Any] | None = None
    ) -> Child:
        """Start a process.

        Raises ValueError where another one is at work, OSError where the disk refuses; nothing runs
        then.
        """
        with self._lock:
            if (busy := self.running()) is not None:
                raise ValueError(
                    f"{busy.name} is being made ({busy.kind}), and two at once would wait for each other's processors; let it end, or stop it"
                )
            log = no_link(self.folder / f"{kind}.log")
            with refusals(log, "nothing was started; free disk space and ask again"):
                self.folder.mkdir(parents=True, exist_ok=True)
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        list(argv),
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                begun = datetime.now(UTC).isoformat(timespec="seconds")
                child = Child(kind, name, process.pid, tuple(argv), begun, dict(about or {}))
                try:
                    write_atomic(self._record(kind), json.dumps(asdict(child), indent=1) + "\n")
                except OSError:  # nobody would know it again
                    process.kill()
                    process.wait()
                    raise
            with contextlib.suppress(OSError):  # gone already, or the system does not let us
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
            self._started[kind] = process
            return child

    def latest(self, kind: str) -> Child | None:
        """The latest process of a kind; None where there was none or its record can not be read."""
        path = self._record(kind)
        try:
            if path.is_symlink() or path.stat().st_size > LARGEST:
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
            child = Child(**found | {"argv": tuple(found["argv"])})
            check_name(child.name)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        whole = child.kind == kind and type(child.pid) is int and isinstance(child.about, dict)
        named = bool(child.argv) and all(isinstance(part, str) for part in child.argv)
        return child if whole and named and 1 < child.pid < 2**31 else None

    def running(self) -> Child | None:
        """The process that is at work now, of whichever kind."""
        found = filter(None, map(self.latest, KINDS))
        return next((child for child in found if self.is_alive(child)), None)

    def is_alive(self, child: Child) -> bool:
        """Whether a process still runs.

        Its number may have been given to another program since, which its command line tells.
        """
        own = self._started.get(child.kind)
        if own is not None and own.pid == child.pid:
            return own.poll() is None
        return command_of(child.pid) == _shown(child.argv)

    def stop(self, kind: str) -> None:
        """Ask a process to end as ctrl-C does; a run saves first.  ValueError where none is at work."""
        child = self.latest(kind)
        if child is None or not self.is_alive(child):
            raise ValueError(
                f"nothing of the kind {kind} is at work, it has ended already; reload the page"
            )
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)

    def refusal(self, kind: str) -> str:
        """Reason that the latest process of a kind gave for not doing its work; "" if none."""
        refused = [match[1] for line in self._tail(kind) if (match := REFUSAL.fullmatch(line))]
        return (refused or [""])[-1]

    def last_line(self, kind: str) -> str:
        """Last line of what the latest process of a kind said."""
        return ([line.strip() for line in self._tail(kind) if line.strip()] or [""])[-1]

    def how_far(self, kind: str) -> str:
        """Last place that the latest process of a kind named, "evaluate mini: 16 of 64"; "" if none."""
        found = [match for line in self._tail(kind) if (match := FAR.fullmatch(line.strip()))]
        return f"{found[-1][1]}: {found[-1][2]} of {found[-1][3]}" if found else ""

    def _tail(self, kind: str) -> list[str]:
        path = self.folder / f"{kind}.log"
        if path.is_symlink() or not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", "replace").splitlines()

    def _record(self, kind: str) -> Path:
        return self.folder / f"{kind}.json"


def _shown(argv: Sequence[str]) -> str:
    return " ".join(argv)


def command_of(pid: int) -> str:
    """Command line of a process, arguments with a space between; "" where there is none."""
    path = Path("/proc") / str(pid) / "cmdline"
    try:
        if path.parent.parent.joinpath("self").exists():
            return path.read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
        asked = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
