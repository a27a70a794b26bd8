"""SIGTERM (pre-emption) and ctrl-C: save what was trained and end well.

The step at work is given up.

While a run is made ready there is nothing to save, and it ends at once. Later a signal only leaves
a mark. The next module that computes inside `giving_way` raises `Stopped`: in a rollout, a
decoding, a reward, a replay, but never in an update, in a message between ranks, or while a file is
written. So nothing is half done, and it takes no longer than one module's pass.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.nn.modules.module import register_module_forward_pre_hook

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Exception that a signal asked for; its text is the signal's name.

    Like KeyboardInterrupt it is nothing that a library catches in passing.
    """


_asked: list[str] = []
"""Names of the signals that came to this process."""


def heed(name: str) -> None:
    """Record a stop request received by another rank."""
    _asked.append(name)


def _note(number: int, frame) -> None:
    heed(signal.Signals(number).name)


_finishing = False
"""True while something is half done that must first be whole."""


def in_main_thread() -> bool:
    """Whether this is the main thread, the only one that signals concern.

    Python lets no other one install handlers, and runs them nowhere else.
    """
    return threading.current_thread() is threading.main_thread()


def _raise_if_asked(*_) -> None:
    if _asked and not _finishing:
        raise Stopped(_asked[0])


def _stop(number: int, frame) -> None:
    for further in SIGNALS:
        signal.signal(further, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let the first signal raise `Stopped` wherever the program is; further ones change nothing.

    Only the main thread installs handlers; in any other the body just runs.
    """
    with _handled_by(_stop):
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Let signals leave a mark in the body; further ones change nothing.

    ctrl-C reaches a rank twice, from the terminal and from torchrun. A run in another thread (of a
    notebook, of a server) leaves signals to its program.
    """
    if not in_main_thread():
        yield
        return
    try:
        with _handled_by(_note):
            yield
    finally:
        _asked.clear()


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    if not in_main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextmanager
def not_now() -> Iterator[None]:
    """Let a signal's mark wait until the body is done.

    The weights are between two updates of one step there, and could not be saved.
    """
    if not in_main_thread():
        yield
        return
    global _finishing
    _finishing = True
    try:
        yield
    finally:
        _finishing = False


@contextmanager
def giving_way() -> Iterator[None]:
    """Let any module's call in the body raise `Stopped` once a signal has come.

    It acts in the main thread only, whose affair signals are: the one that writes is let finish.
    """
    if not in_main_thread():
        yield
        return
    hook = register_module_forward_pre_hook(_raise_if_asked)
    try:
        yield
    finally:
        hook.remove()
