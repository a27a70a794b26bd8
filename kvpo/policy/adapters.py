"""Ways in which the module comes to compute with a set of weights, in passes without gradient.

    Swapped        its tensors in place of the module's own
    WithoutZeros   the same; but an adapter whose B is 0 is left out: the sum with 0 is what it was
    Merged         W + B A in place of W, rounded to the module's dtype, and the adapter left out

An adapter takes two products beside each of the network's: at 1.3B and rank 256 a tenth of a pass's
operations, and 600 small kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

Weights = Sequence[torch.Tensor]


class Entering(Protocol):
    """A way for a set of weights, whole and in the order of the trained ones, to be computed with."""

    def __call__(self, weights: Weights, version: object) -> AbstractContextManager[None]:
        """Let the module compute with ``weights`` in the body.

        ``version`` is equal as long as the set's numbers are.
        """
        ...


class Swapped:
    """Entering by giving the module's parameters the set's memory."""

    def __init__(self, computing: Sequence[nn.Parameter]):
        self.computing = computing

    @contextmanager
    def __call__(self, weights: Weights, version: object = None) -> Iterator[None]:
        current = [p.data for p in self.computing]
        try:
            for p, w in zip(self.computing, weights):
                p.data = w.to(p.dtype)
            yield
        finally:
            for p, w in zip(self.computing, current):
                p.data = w


class Adapters:
    """The adapter's layers in a transformer, and where their A and B stand among the weights."""

    def __init__(self, transformer: nn.Module, names: Sequence[str]):
        at = {name: i for i, name in enumerate(names)}
        self.layers: list[tuple[LoraLayer, int, int]] = []
        for name, module in transformer.named_modules():
            if isinstance(module, LoraLayer):
                (adapter,) = module.active_adapters
                a, b = (at[f"{name}.{part}.{adapter}.weight"] for part in ("lora_A", "lora_B"))
                self.layers.append((module, a, b))

    def is_zero(self, weights: Weights) -> bool:
        """Every B is 0, as at the start: the adapter adds nothing."""
        return not any(bool(weights[b].any()) for _layer, _a, b in self.layers)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Let the layers compute their own map alone in the body."""
        for layer, *_ in self.layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer, *_ in self.layers:
                layer.enable_adapters(True)

    @torch.no_grad()
    def merged(self, weights: Weights) -> list[torch.Tensor]:
        """W + scale B A of every layer, added in float32 and rounded once, to W's dtype."""
        return [
            torch.addmm(
                layer.base_layer.weight.float(),
                weights[b].float(),
                weights[a].float(),
                alpha=layer.scaling[layer.active_adapters[0]],
            ).to(layer.base_layer.weight.dtype)
            for layer, a, b in self.layers
        ]

    @torch.no_grad()
    def added(self, weights: Weights) -> list[torch.Tensor]:
        """The part that `merged` adds to every layer's W: scale B A, in float32."""
        return [
            weights[b].float() @ weights[a].float() * layer.scaling[layer.active_adapters[0]]
            for layer, a, b in self.layers
        ]

    @property
    def bases(self) -> list[nn.Parameter]:
        return [layer.base_layer.weight for layer, *_ in self.layers]


class WithoutZeros:
    """Entering that leaves an adapter of no effect out; its passes give the same numbers."""

    def __init__(self, swapped: Swapped, adapters: Adapters):
        self.swapped, self.adapters = swapped, adapters
        self._zero: dict[object, bool] = {}

    @contextmanager
    def __call__(self, weights: Weights, version: object) -> Iterator[None]:
        if version not in self._zero:  # a question to the device, asked once a version
            self._zero = dict([*self._zero.items(), (version, self.adapters.is_zero(weights))][-4:])
        if self._zero[version]:
            with self.adapters.left_out():
                yield
        else:
            with self.swapped(weights, version):
                yield


class Merged:
    """Entering with the adapter merged into a second set of the network's weights.

    The second set takes as much memory as the maps that have an adapter; it is made anew when the
    set's numbers have changed. In float32 the pass is that of the adapter to rounding. In bfloat16
    what moves a weight by less than half of its last place, 1/512 of it, is lost: the rollouts of
    a young adapter are those of the start weights.
    """

    def __init__(self, adapters: Adapters):
        self.adapters = adapters
        self._made: tuple[object, list[torch.Tensor]] | None = None

    @contextmanager
    def __call__(self, weights: Weights, version: object) -> Iterator[None]:
        if self._made is None or self._made[0] != version:
            self._made = None  # its memory is free before the next is made
            self._made = (version, self.adapters.merged(weights))
        with Swapped(self.adapters.bases)(self._made[1]), self.adapters.left_out():
            yield
