"""One backbone with three parameter sets and an EMA.

The sets are current (trained), behaviour (rolls out) and reference (holds the KL).

The current weights are float32 masters; the module computes with them, or with their copies in its
own dtype. The other sets are lists of tensors that are swapped in for passes without gradient. With
LoRA a set is the adapter's tensors; the backbone exists once. Where several ranks share the weights
out (`kvpo.policy.sharding`), a set is this rank's part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import LoraConfig

from kvpo.common.rng import stream
from kvpo.distributed.ranks import Ranks
from kvpo.generators.causal_wan import CausalWan
from kvpo.policy.adapters import Adapters, Entering, Merged, Swapped, WithoutZeros
from kvpo.policy.settings import PolicyConfig
from kvpo.policy.sharding import Shards, Whole

ADAPTER_TARGETS = r".*blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
"""Every linear map inside the blocks, 10 a block."""


class Policy:
    """The trainable part of a generator."""

    def __init__(self, model: CausalWan, config: PolicyConfig, seed: int, ranks: Ranks = Ranks()):
        self.model, self.config = model, config
        transformer = model.transformer.requires_grad_(False)
        if config.train == "lora":
            _add_adapter(transformer, config.rank, seed)
        else:
            transformer.requires_grad_(True)
        self.names, computing = zip(
            *((n, p) for n, p in transformer.named_parameters() if p.requires_grad)
        )
        self.sharded = config.shard and ranks.world > 1
        self.layout = (
            Shards(transformer, self.names, ranks) if self.sharded else Whole(computing, ranks)
        )
        self.parameters = self.layout.masters
        """float32: at lr 1e-5 a bf16 weight can not move."""
        self.reference = self.snapshot()
        self.behaviour = self.snapshot()
        self.average = self.snapshot()
        self._at_hand: dict[int, Sequence[torch.Tensor]] = {}
        self._exact: Entering = Swapped(self.layout.computing)
        self._rolling: Entering = self._exact
        if config.train == "lora":
            adapters = Adapters(transformer, self.names)
            self._exact = WithoutZeros(self._exact, adapters)
            self._rolling = Merged(adapters) if config.merge_rollouts else self._exact
        self.updates = self.lag = 0
        """Optimizer updates in all, and since the last sync."""
        self.broken = False
        """True once an update has made the weights or the optimizer's moments not finite.

        They may not be saved then.
        """

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.layout.computing)

    @property
    def on_policy(self) -> bool:
        """Current and behaviour weights are the same numbers."""
        return self.lag == 0 and (self.updates == 0 or self.config.behaviour_decay == 0.0)

    def snapshot(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def using(self, weights: list[torch.Tensor]) -> AbstractContextManager[None]:
        """Let the module compute with ``weights`` in the body; no gradient may be taken there.

        If sharded, all ranks must enter, unless the set is `at_hand`.
        """
        return self._entered(self._exact, weights)

    def rolling_out(self) -> AbstractContextManager[None]:
        """Let the module compute with the behaviour weights, as `policy.merge_rollouts` asks."""
        return self._entered(self._rolling, self.behaviour)

    @contextmanager
    def _entered(self, entering: Entering, weights: list[torch.Tensor]) -> Iterator[None]:
        whole = self._at_hand.get(id(weights)) or self.layout.whole(weights)
        # a tensor counts the writes to it
        version = (id(weights), tuple(w._version for w in weights))
        with entering(whole, version), torch.no_grad():
            yield

    @contextmanager
    def at_hand(self, *sets: list[torch.Tensor]) -> Iterator[None]:
        """Keep these sets at hand, so that each rank may be `using` them without the others.

        All ranks must enter.
        """
        self._at_hand = {id(weights): self.layout.whole(weights) for weights in sets}
        if self.on_policy:
            self._at_hand[id(self.behaviour)] = [p.data for p in self.layout.computing]
        try:
            yield
        finally:
            self._at_hand = {}

    def for_groups(self) -> AbstractContextManager[None]:
        """`at_hand` with the sets that groups may ask for."""
        return self.at_hand(
            *([] if self.on_policy else [self.behaviour]),
            *([self.reference] if self.updates else []),
        )

    @torch.no_grad()
    def updated(self, last: bool = True) -> None:
        """Follow an optimizer update: refresh the module, move the EMA, sync the behaviour policy.

        The sync is made when it is time. ``last``: the update is the last of its step.
        """
        self.layout.refresh()
        self.updates, self.lag = self.updates + 1, self.lag + 1
        decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)
        if last and self.lag >= self.config.sync_interval:
            self._sync()
            self.lag = 0

    def _sync(self) -> None:
        """Copy the current weights into the behaviour policy, or average them into it."""
        current, stays = [p.detach() for p in self.parameters], self.config.behaviour_decay
        if stays:
            torch._foreach_lerp_(self.behaviour, current, 1.0 - stays)
        else:
            torch._foreach_copy_(self.behaviour, current)

    def drift(self) -> float:
        """Distance of the current weights from the reference, relative to the reference's norm.

        For LoRA it is absolute.
        """
        moved = self._norm(p.detach() - r for p, r in zip(self.parameters, self.reference))
        base = self._norm(self.reference)
        return moved if self.config.train == "lora" else moved / base

    def _norm(self, weights: Iterable[torch.Tensor]) -> float:
        squares = torch.tensor(
            sum(float(w.square().sum()) for w in weights),
            dtype=torch.float64,
            device=self.model.device,
        )
        return math.sqrt(self.layout.total(squares))


def _add_adapter(transformer, rank: int, seed: int) -> None:
    """Add a LoRA to every linear map of the blocks.

    It starts at zero effect (B = 0); A comes from a named stream. Raises ValueError for a
    transformer without such maps.
    """
    if not any(re.fullmatch(ADAPTER_TARGETS, name) for name, _ in transformer.named_modules()):
        raise ValueError(
            f"{type(transformer).__name__} has no module that matches {ADAPTER_TARGETS}; set policy.train to full"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "lora").initial_seed())
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTER_TARGETS, lora_dropout=0.0)
        )
    for (
        name,
        p,
    ) in (
        transformer.named_parameters()
    ):  # peft may make it float32, and then multiply by it in float32
        if ".lora_" in name:
            p.data = p.data.to(transformer.patch_embedding.weight.dtype)
