"""Settings of the weights and of their checkpoints.

They stand apart from the code that they steer, so that reading a recipe needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the trained weights and of their copies."""

    train: Literal["lora", "full"] = "lora"
    """A low-rank adapter, or all weights of the transformer."""
    rank: int = 256
    """LoRA rank; alpha = rank, so the adapter acts at scale 1."""
    sync_interval: int = 1
    """Optimizer updates between copies of the current weights into the behaviour policy.
    A copy is made at the end of a step only."""
    behaviour_decay: float = 0.0
    """Share of the behaviour policy that stays when it is synced.
    0: it becomes the current weights. Above 0 it is their moving average, the old policy of
    DiffusionNFT (Astrolabe has 0.9), and no rollout is on policy after the first update."""
    ema: float = 0.999
    """Decay of the averaged weights; it warms up as (1 + n) / (10 + n) over n updates."""
    shard: bool = False
    """Share masters, EMA, behaviour, reference and optimizer moments out over the ranks (FSDP2).
    It takes 24 / ranks bytes a trained weight. The module's weights, the reference's and the
    gradient stay whole on each, 2 + 2 + 4 bytes in bf16: all of 1.3B fit a card, of 14B an adapter
    does."""

    merge_rollouts: bool = False
    """Roll out with the adapter merged into a second set of the network's weights.
    It saves an adapter's products, a tenth of a pass at rank 256, and takes the memory of another
    set. In bfloat16 the merged weights are rounded: changes of less than 1/512 of a weight, as those
    of the first updates, are not in what is rolled out. Replays are never merged."""

    def __post_init__(self):
        if self.merge_rollouts and self.train != "lora":
            raise ValueError(
                f"policy.merge_rollouts merges an adapter, and with policy.train = {self.train} there is none; leave it out"
            )
        if self.rank < 1 or self.sync_interval < 1:
            raise ValueError(
                f"policy.rank = {self.rank} and policy.sync_interval = {self.sync_interval} must be 1 or more"
            )
        if not 0.0 <= self.behaviour_decay < 1.0:
            raise ValueError(
                f"policy.behaviour_decay = {self.behaviour_decay} must lie in [0, 1); at 1 the behaviour policy would stay at the start weights"
            )
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"policy.ema = {self.ema} must lie in [0, 1); 0 keeps no average")


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of how often a run is saved, and how many checkpoints stay."""

    every: int = 10
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Newest checkpoints that stay, beside that of the best held-out evaluation."""

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every = {self.every} and checkpoint.keep = {self.keep} must be 1 or more"
            )
