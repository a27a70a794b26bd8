"""The two ways to a reward outside this process: a worker on pipes, or a server over HTTP.

The worker is started here.

    link.ask(header, frames, timeout) -> the reply's header
    link.open                            whether it can be asked; a worker that broke is closed, and `ask` starts a new one

Both raise `Broken` where the other side ends, is late, or does not talk as
`kvpo.rewards.isolated.wire` says.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import threading
import urllib.parse
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from subprocess import PIPE
from typing import Any, BinaryIO

import numpy as np

from kvpo.rewards.isolated import wire

LINES = 12
"""Number of lines of a dead worker's stderr that are shown."""
PATIENCE = 2.0
"""Seconds for a worker to end by itself."""


class Broken(OSError):
    """Error of a link: the other side ended, was late, or talked something else.

    Its text is one line, then what the other side had last written to stderr.
    """


class Worker:
    """A process of its own, whose stderr is kept.

    It ends with all that it has started when this object goes, or this process does.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]):
        self.command, self.environ = command, environ
        self.process: subprocess.Popen | None = None

    @property
    def open(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        try:
            # A session of its own: it is ended as a group, and Ctrl-C is for this process to
            # handle.
            self.process = subprocess.Popen(
                self.command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=self.environ,
                start_new_session=True,
            )
        except OSError as error:
            raise Broken(
                f"its worker could not be started with {self.command[0]}: {error}; give the path of its environment's Python"
            ) from None
        self.lines: deque[str] = deque(maxlen=LINES)
        self._listener = threading.Thread(
            target=_listen, args=(self.process.stderr, self.lines), daemon=True
        )
        self._listener.start()
        self._end = weakref.finalize(self, _end, self.process)

    def ask(
        self, header: Mapping[str, Any], frames: np.ndarray | None, timeout: float
    ) -> dict[str, Any]:
        if not self.open:
            self.start()
        late, process = threading.Event(), self.process
        assert process is not None, "it was started"

        def give_up() -> None:
            late.set()
            _kill(process)

        # Killing it ends whatever waits for it here: a read of its reply, or a write that it does
        # not read.
        timer = threading.Timer(timeout, give_up)
        timer.start()
        try:
            wire.write(process.stdin, header, frames)
            return wire.read(process.stdout)[0]
        except (OSError, EOFError) as error:
            raise self._broken(
                f"did not answer within {timeout:g} s" if late.is_set() else None
            ) from error
        except ValueError as error:
            raise self._broken(f"sent {error}") from None
        except KeyboardInterrupt:
            self.close()  # else the next request would find the rest of this one's reply
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        if self.open:
            self._end()
            self._listener.join(PATIENCE)
            self.process = None

    def _broken(self, reason: str | None) -> Broken:
        """Close the worker, and say why it broke, as far as that can be known."""
        process = self.process
        assert process is not None, "it was asked"
        self.close()
        reason = reason or (
            f"was ended by {signal.Signals(-process.returncode).name}"
            if process.returncode < 0
            else f"ended with exit code {process.returncode}"
        )
        return Broken(
            "\n    ".join(
                [
                    f"its worker {reason}" + ("; its last lines:" if self.lines else ""),
                    *map(str.rstrip, self.lines),
                ]
            )
        )


def _listen(stderr: BinaryIO, lines: deque[str]) -> None:
    """Collect lines of stderr until the worker and all that it has started have ended."""
    with TextIOWrapper(stderr, errors="replace") as text:
        lines.extend(text)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen) -> None:
    """Closes its pipe, which asks it to end; kills what is left of it."""
    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    with suppress(OSError):  # what was not yet written can not be
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    _kill(process)
    process.wait()
    process.stdout.close()


class Server:
    """A worker that serves HTTP, here or elsewhere.

    Raises ValueError for an address that can not be one.
    """

    def __init__(self, url: str):
        address = urllib.parse.urlsplit(url)
        host, port = address.hostname, address.port
        if address.scheme != "http" or not host or not port or address.path not in ("", "/"):
            raise ValueError(
                f"url = {url!r} must be http://host:port; through a tunnel where the way to it is not yours alone (ssh -L)"
            )
        self.url, self.host, self.port, self.open = url, host, port, False

    def ask(
        self, header: Mapping[str, Any], frames: np.ndarray | None, timeout: float
    ) -> dict[str, Any]:
        """Send a request; the reply to a handshake is the server's /spec, whatever the device.

        A server's model stays where it is.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            if header["do"] == "load":
                connection.request("GET", "/spec")
            else:
                body = wire.pack(header, frames)
                length = sum(map(len, body))
                connection.request(
                    "POST",
                    "/score",
                    body,
                    {"Content-Type": wire.CONTENT_TYPE, "Content-Length": str(length)},
                )
            response = connection.getresponse()
            if response.status != 200:
                raise Broken(
                    f"its server at {self.url} refused: {response.status} {response.reason}; look at what it says there"
                )
            reply = wire.read(response)[0]
        except (EOFError, ValueError, http.client.HTTPException) as error:
            raise Broken(
                f"its server at {self.url} did not answer as a worker: {error}; give the address of a reward's worker"
            ) from None
        except TimeoutError:
            raise Broken(
                f"its server at {self.url} did not answer within {timeout:g} s; raise the reward's timeout, or look at what it says there"
            ) from None
        except Broken:
            raise
        except OSError as error:
            raise Broken(
                f"its server at {self.url} can not be reached: {error}; start it there, or correct the address"
            ) from None
        finally:
            connection.close()
        self.open = True
        return reply

    def close(self) -> None:
        self.open = False
