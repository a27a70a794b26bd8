"""A reward as a recipe names it; `kvpo.rewards.registry` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RewardEntry:
    """One reward of a recipe."""

    name: str
    """Name of the reward: a shipped one, an entry point's, or one's own.

    Shipped names are listed by `kvpo rewards list`; one's own is ``package.module:Class`` or
    ``package.module:function``; ``preference:FOLDER`` is what `kvpo preference fit`
    wrote (docs/preference.md); isolated also a scorer file or that of a shipped environment
    (docs/isolated_rewards.md).
    """
    weight: float = 1.0
    """Weight of its advantages; 0 = logged, not trained on."""
    role: Literal["train", "eval", "guard"] = "train"
    """Role of the reward: `train`, `eval` or `guard`.

    `eval`: held out, only ever used by evaluations, and of another family than the trained ones;
    `guard`: likewise used, but it may see as the trained ones do: it must not fall.
    """
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its class or function."""
    offload: bool = False
    """Leave the device's memory between two uses; evaluators always do."""
    isolation: Literal["inline", "process", "http"] = "inline"
    """Place where it runs: this process, a worker with its own environment, or a server."""
    environment: str = ""
    """Environment (`kvpo reward-env create`) or Python whose worker runs it; empty = this Python.

    For isolation `process`.
    """
    devices: str = ""
    """`process`: cards of its own, as in CUDA_VISIBLE_DEVICES; empty = the run's."""
    url: str = ""
    """`http`: where its server answers, http://host:port."""
    timeout: float = 600.0
    """`process`, `http`: seconds without an answer after which it counts as hung."""

    def __post_init__(self):
        if (self.isolation == "http") != bool(self.url):
            raise ValueError(
                f"reward {self.name!r}: isolation = {self.isolation!r} and url = {self.url!r}, but isolation http and url belong together; set both, or neither"
            )
        if (self.environment or self.devices) and self.isolation != "process":
            raise ValueError(
                f"reward {self.name!r}: environment = {self.environment!r} and devices = {self.devices!r} are for isolation: process; set that, or leave them out"
            )
        if self.timeout <= 0:
            raise ValueError(
                f"reward {self.name!r}: timeout = {self.timeout} must be above 0 seconds"
            )
