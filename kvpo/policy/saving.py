"""Checkpoints that are written beside the training.

All that goes into one is copied to main memory, and a thread writes the copy.

The step after a checkpoint runs while it is written; the next checkpoint, and the end of a run,
wait for it. Ranks that write shards speak on a channel of their own, so what the thread says never
stands between two messages of the step; where weights are whole the first rank writes alone, and
says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from kvpo.distributed.ranks import Ranks
from kvpo.policy.checkpoint import Snapshot, save_checkpoint
from kvpo.policy.policy import Policy


class Saver:
    """Writes a run's checkpoints beside the training, one at a time.

    A context manager: at its end all are written, or the error is raised.
    """

    def __init__(
        self, folder: Path, keep: int, policy: Policy, patience: float, elsewhere: bool = True
    ):
        """``elsewhere``: the averaged weights, in a file of their own, mean something elsewhere."""
        self.folder, self.keep, self.policy, self.ranks = folder, keep, policy, policy.layout.ranks
        self.writers = self.ranks.apart("checkpoint", patience) if policy.sharded else Ranks()
        self.elsewhere = elsewhere
        self._writing: Future[Path] | None = None

    def begin(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        best: int,
        beside: Mapping[str, torch.Tensor] = {},
    ) -> None:
        """Copy what goes into the checkpoint after ``step`` steps, and begin to write it.

        All ranks enter. ``beside``: what else the run has to know when it goes on. OSError if the
        checkpoint before it could not be written.
        """
        self.wait()
        if self.policy.sharded or self.ranks.first:
            snapshot = Snapshot.of(step, self.policy, optimizer, config, beside, self.elsewhere)
            self._writing = _beside(
                lambda: save_checkpoint(self.folder, snapshot, self.keep, best, self.writers)
            )

    def check(self) -> None:
        """Raise the OSError of the write under way if it has already failed here."""
        if self._writing is not None and self._writing.done():
            self._join()

    def wait(self) -> None:
        """Wait for the write under way; all ranks enter, and share its OSError."""
        with self.ranks.together():
            self._join()

    def _join(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.wait()
        elif self._writing is not None and not (
            self.policy.sharded and isinstance(error, ConnectionError)
        ):
            # let it finish; the error here is what counts.  Shards are not waited for once a rank
            # is lost: they wait for each other
            self._writing.exception()
            self._writing = None


def _beside(work: Callable[[], Path]) -> Future[Path]:
    """Done in a thread that does not keep the program from ending."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
