"""One backbone, three parameter sets: current (trained), behaviour (rolls out), reference (holds the KL); and the EMA.

The current weights are float32 masters; the module computes with them, or with their copies in its own dtype.  The
other sets are lists of tensors that are swapped in for passes without gradient.  With LoRA a set is the adapter's
tensors; the backbone exists once.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, Literal

import torch
from peft import LoraConfig

from kvpo.generators.causal_wan import CausalWan
from kvpo.rng import stream

ADAPTER_TARGETS = r".*blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
"""Every linear map inside the blocks, 10 a block."""


@dataclass(frozen=True)
class PolicyConfig:
    """What is trained, and how its copies follow."""

    train: Literal["lora", "full"] = "lora"
    rank: int = 256
    """LoRA rank; alpha = rank, so the adapter acts at scale 1."""
    sync_interval: int = 1
    """Optimizer updates between copies of the current weights into the behaviour policy."""
    ema: float = 0.999
    """Decay of the averaged weights; it warms up as (1 + n) / (10 + n) over n updates."""

    def __post_init__(self):
        if self.rank < 1 or self.sync_interval < 1:
            raise ValueError(f"policy.rank = {self.rank} and policy.sync_interval = {self.sync_interval} must be 1 or more")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"policy.ema = {self.ema} must lie in [0, 1); 0 keeps no average")


class Policy:
    """The trainable part of a generator."""

    def __init__(self, model: CausalWan, config: PolicyConfig, seed: int):
        self.model, self.config = model, config
        transformer = model.transformer.requires_grad_(False)
        if config.train == "lora":
            _add_adapter(transformer, config.rank, seed)
        else:
            transformer.requires_grad_(True)
        self.names, self._computing = zip(*((n, p) for n, p in transformer.named_parameters() if p.requires_grad))
        self.parameters = tuple(master_of(p) for p in self._computing)
        """float32: at lr 1e-5 a bf16 weight can not move."""
        self.reference, self.behaviour, self.average = self.snapshot(), self.snapshot(), self.snapshot()
        self.updates = self.lag = 0
        """Optimizer updates in all, and since the last sync."""

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def on_policy(self) -> bool:
        """Current and behaviour weights are the same numbers."""
        return self.lag == 0

    def snapshot(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @contextmanager
    def using(self, weights: list[torch.Tensor]) -> Iterator[None]:
        """The module computes with ``weights`` inside; no gradient may be taken there."""
        current = [p.data for p in self._computing]
        try:
            for p, w in zip(self._computing, weights):
                p.data = w.to(p.dtype)
            with torch.no_grad():
                yield
        finally:
            for p, w in zip(self._computing, current):
                p.data = w

    @torch.no_grad()
    def refresh(self) -> None:
        """After the masters have changed: the module computes with what they are now."""
        for p, master in zip(self._computing, self.parameters):
            if p is not master:
                p.copy_(master)

    @torch.no_grad()
    def updated(self) -> None:
        """After an optimizer update: refresh the module, move the EMA, and sync the behaviour policy when it is time."""
        self.refresh()
        self.updates, self.lag = self.updates + 1, self.lag + 1
        decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)
        if self.lag >= self.config.sync_interval:
            torch._foreach_copy_(self.behaviour, [p.detach() for p in self.parameters])
            self.lag = 0

    def drift(self) -> float:
        """Distance of the current weights from the reference, relative to the reference's norm (for LoRA: absolute)."""
        moved = math.sqrt(sum(float((p.detach() - r).square().sum()) for p, r in zip(self.parameters, self.reference)))
        base = math.sqrt(sum(float(r.square().sum()) for r in self.reference))
        return moved if self.config.train == "lora" else moved / base


def master_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The float32 weight that is trained: the parameter itself, or one beside it that collects its gradients."""
    if parameter.dtype == torch.float32:
        return parameter
    master = torch.nn.Parameter(parameter.detach().float())

    def carry(p: torch.nn.Parameter) -> None:  # gradients of several passes and groups add up in float32
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(carry)
    return master


def _add_adapter(transformer, rank: int, seed: int) -> None:
    """A LoRA on every linear map of the blocks.  It starts at zero effect (B = 0); A comes from a named stream."""
    if not any(re.fullmatch(ADAPTER_TARGETS, name) for name, _ in transformer.named_modules()):
        raise ValueError(f"{type(transformer).__name__} has no module that matches {ADAPTER_TARGETS}; set policy.train to full")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "lora").initial_seed())
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTER_TARGETS, lora_dropout=0.0))
    for name, p in transformer.named_parameters():  # peft may make it float32, and then multiply by it in float32
        if ".lora_" in name:
            p.data = p.data.to(transformer.patch_embedding.weight.dtype)
