"""`kvpo pretrain`: the miniature's start weights, from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpo.commands.options import Positional
from kvpo.common.environment import pick_device


@dataclass(frozen=True)
class Pretrain:
    """Make the miniature's start weights, from nothing; resumable."""

    out: Positional[Path]
    """The pipeline folder to write."""
    work: Path = Path("runs/pretrain")
    """Checkpoints and log; a second call goes on from there."""
    seed: int = 0
    device: str = "auto"

    def __call__(self) -> None:
        from kvpo.mini.pretraining.pretrain import pretrain

        pretrain(self.out, self.work, seed=self.seed, device=str(pick_device(self.device)))
