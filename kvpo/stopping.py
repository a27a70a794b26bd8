"""SIGTERM (pre-emption) and ctrl-C: the step at work is given up, what was trained is saved, the program ends well.

A signal only leaves a mark.  The next module that computes inside `giving_way` raises `Stopped`: in a rollout, a
decoding, a reward, a replay, but never in an update, in a message between ranks, or while a file is written.  So
nothing is half done, and it takes no longer than one module's pass.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import Iterator

from torch.nn.modules.module import register_module_forward_pre_hook

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal asked for it; its name."""


_asked: list[str] = []
"""Of the process, as signals are."""


def _note(number: int, frame) -> None:
    _asked.append(signal.Signals(number).name)


def _raise_if_asked(*_) -> None:
    if _asked:
        raise Stopped(_asked[0])


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, signals leave a mark.  Further ones change nothing: ctrl-C reaches a rank twice, from the terminal and from torchrun."""
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


@contextmanager
def giving_way() -> Iterator[None]:
    """Inside, any module's call raises `Stopped` once a signal has come."""
    hook = register_module_forward_pre_hook(_raise_if_asked)
    try:
        yield
    finally:
        hook.remove()
