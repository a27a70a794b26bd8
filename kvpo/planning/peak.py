"""Cost of code in bytes alive at once and floating-point operations.

It is found by running the code on tensors without memory.

Fake tensors have shapes, dtypes and an autograd graph, and no data: what is counted is the program
itself, not a formula about it. Scratch memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop,
    sdpa_flop,
    shape_wrapper,
)

M = TypeVar("M", bound=torch.nn.Module)

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_val=None, **kwargs: (
        sdpa_flop(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, out_val=None, **kwargs: (
        sdpa_backward_flop(grad, q, k, v)
    ),
}
"""The one fused attention that the counter does not know, and that fake tensors on a CPU use."""


OPERATIONS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    **{operator: shape_wrapper(count) for operator, count in ATTENTION.items()},
}
"""Operator -> its floating-point operations, by torch's own formulas."""


class Ledger(TorchDispatchMode):
    """Bytes of all storages that were made under it and are alive, and operations so far.

    Operations are counted here, and not by torch's counter beside it, which keeps a backward pass's
    activations alive and takes longer than the rest of a plan.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (count := OPERATIONS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        given = {
            id(x.untyped_storage())
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if (
                isinstance(x, torch.Tensor) and id(storage := x.untyped_storage()) not in given
            ):  # views, also of what was there before
                self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def leave() -> None:
            self._alive.discard(key)
            self.now -= size

        self._alive.add(key)
        weakref.finalize(storage, leave)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Pass:
    """Cost of running one part of the step once."""

    bytes: int
    flops: int


@dataclass
class Cost:
    bytes: int = 0
    """Most memory alive at once, above what there was before."""
    kept: int = 0
    """Bytes of the peak that are still alive afterwards."""
    flops: int = 0
    """Floating-point operations."""


@contextmanager
def fake() -> Iterator[Ledger]:
    """Give all tensors in the body shapes, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        yield ledger


@contextmanager
def cost(ledger: Ledger) -> Iterator[Cost]:
    """Peak memory and operations of the body; filled in on exit."""
    found, before, done, ledger.peak = Cost(), ledger.now, ledger.flops, ledger.now
    yield found
    found.bytes, found.kept = ledger.peak - before, ledger.now - before
    found.flops = ledger.flops - done


@contextmanager
def flops() -> Iterator[FlopCounterMode]:
    """Count multiplications and additions of the body.

    Not to be used around a backward pass, whose activations it would keep alive.
    """
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        yield counter


def on_meta(build: Callable[[], M], dtype: torch.dtype) -> M:
    """Build a module in ``dtype`` and without memory."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(torch.float32)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(t.nbytes for t in tensors)


def materialise(module: torch.nn.Module) -> None:
    """Replace tensors on meta by ones that operations can be run on.

    peft can not be run on fake ones.
    """
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(
                    torch.zeros_like(p, device="cpu"), requires_grad=p.requires_grad
                )
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.zeros_like(b, device="cpu")
