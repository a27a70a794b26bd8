"""Checkpoints beside the training: all that goes into one is copied to main memory, and a thread writes the copy.

The step after a checkpoint runs while it is written; the next checkpoint, and the end of a run, wait for it.  Ranks that
write shards speak on a channel of their own, so what the thread says never stands between two messages of the step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Mapping

import torch

from kvpo.checkpoint import Snapshot, save_checkpoint
from kvpo.distributed import Ranks
from kvpo.policy import Policy


class Saver:
    """Of one run: of its checkpoints one at a time is being written.  A context: at its end all are written, or the error is raised."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks, patience: float):
        self.folder, self.keep, self.ranks = folder, keep, ranks.apart("checkpoint", patience)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def begin(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], best: int) -> None:
        """Take a copy after ``step`` steps and return; all ranks enter.  OSError if the checkpoint before it could not be written."""
        self.wait()
        snapshot = Snapshot.of(step, policy, optimizer, config)
        self._writing = self._thread.submit(save_checkpoint, self.folder, snapshot, self.keep, best, self.ranks)

    def check(self) -> None:
        """OSError if the write under way has already failed."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """For the write under way; OSError if it fails."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._thread.shutdown(wait=True)
        if error is None:  # else that is what counts
            self.wait()
