"""SIGTERM (pre-emption) and ctrl-C: the step at work is given up, what was trained is saved, the
program ends well.

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
    """A signal asked for it; its name. Like KeyboardInterrupt nothing that a library catches in
    passing."""


_asked: list[str] = []
"""Of the process, as signals are."""


def heed(name: str) -> None:
    """As if the signal had come here: another rank has it."""
    _asked.append(name)


def _note(number: int, frame) -> None:
    heed(signal.Signals(number).name)


_finishing = False
"""What is half done now must first be whole."""


def in_main_thread() -> bool:
    """Whether signals are this thread's affair: Python lets no other one install handlers, and
    runs them nowhere else."""
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
    """Inside, the first signal raises `Stopped` wherever the program is; further ones change
    nothing. Nothing but the body in another thread than the main one."""
    with _handled_by(_stop):
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, signals leave a mark. Further ones change nothing here either: ctrl-C reaches a
    rank twice, from the terminal and from torchrun. A run in another thread (of a notebook, of a
    server) leaves signals to its program."""
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
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def not_now() -> Iterator[None]:
    """Inside, a signal's mark waits: the weights are between two updates of one step, and could
    not be saved."""
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
    """Inside, any module's call raises `Stopped` once a signal has come. Only in the main
    thread, whose affair signals are: the one that writes is let finish."""
    if not in_main_thread():
        yield
        return
    hook = register_module_forward_pre_hook(_raise_if_asked)
    try:
        yield
    finally:
        hook.remove()
