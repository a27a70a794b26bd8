"""A stage's training in a process of its own, beside another's.

On a CPU the decoder's small convolutions gain next to nothing from a second thread (0.38 s a step
on one, 0.32 s on two), the transformer's products nearly all of it (0.99 s and 0.59 s). So one
thread goes to each until the decoder is done.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context, parent_process

import torch

from kvpo.common.progress import Progress
from kvpo.mini.pretraining.training import Stage


@contextmanager
def trained_beside(
    build: Callable[..., Stage], args: tuple, progress: Progress, finished: bool = False
) -> Iterator[None]:
    """Run the body while another process trains the stage ``build(*args)`` on one thread.

    It ends no earlier than that process. ``finished``: the stage is done already, so no process is
    started; the body has no more threads for it, because on more it would round otherwise.

    The other process only writes the stage's state file. Whoever runs the stage afterwards finds it
    finished; or, where that process failed, goes on from its last state and meets the fault
    himself. With one thread: the body alone.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(threads - 1)
    try:
        with nullcontext() if finished else _process(build, args, progress):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _process(build: Callable[..., Stage], args: tuple, progress: Progress) -> Iterator[None]:
    """The process, begun before the body and waited for after it."""
    process = get_context("spawn").Process(target=train, args=(build, args), daemon=True)
    process.start()
    try:
        yield
        progress.phase("waits for the training beside")
        process.join()
        progress.phase("")
    finally:
        process.terminate()
        process.join()


def train(build: Callable[..., Stage], args: tuple) -> None:
    """Run the stage to its end, quietly; it ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process hears it, and ends this one
    torch.set_num_threads(1)
    stage = build(*args)
    alone, starter = stage.loss, parent_process()

    def loss(step: int):
        if starter is None or not starter.is_alive():
            sys.exit("the training that started this one is gone")
        return alone(step)

    stage.loss = loss
    stage.run(Progress(quiet=True))
