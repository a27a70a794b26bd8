"""Costs of a recipe's network, found at two small depths.

All layers of a network have one shape, so each of its costs is a straight line in their number: a
pass's operations, its weights, a page of its cache, and the activations that a backward pass finds.
Two shallow networks at the recipe's own width, grid, window and rows say which line it is, and a
plan of 30 or 40 layers takes the time of five.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from diffusers import WanTransformer3DModel

from kvpo.config import RunConfig
from kvpo.generators.cache import FrameCache
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.memory import Bank
from kvpo.planning.amounts import replay_rows, side_by_side
from kvpo.planning.peak import Ledger, Pass, bytes_of, cost, fake, materialise, on_meta
from kvpo.policy.adapters import Adapters
from kvpo.policy.policy import Policy
from kvpo.policy.sharding import master_of

if TYPE_CHECKING:
    from kvpo.planning.costs import Sizes

DEPTHS = (2, 3)
"""Numbers of layers that are run: from two on a layer more costs what every further one does."""


@dataclass(frozen=True)
class Network:
    """Bytes and operations of a network of some depth, trained as a recipe says."""

    weights: int
    trainable: int
    """Trained numbers."""
    sets: int
    """Bytes of masters, copies in the module, behaviour, reference and averaged weights."""
    frame: int
    """Bytes of a latent frame in the cache, all layers."""
    prefix: Pass
    branches: Pass
    replay: Pass
    gradient: Pass
    """Cost of a pass with gradient, beside the gradients that earlier passes have left."""
    left_out: int
    """Operations of a prefix's pass without the adapter."""
    maps: int
    """Bytes of the maps that have an adapter."""


def network_costs(config: RunConfig, sizes: Sizes) -> Network:
    """Costs of the whole network."""
    layers = sizes.transformer["num_layers"]
    if layers <= max(DEPTHS):
        return at_full_depth(config, sizes)
    few, more = (at_full_depth(config, _of_depth(sizes, depth)) for depth in DEPTHS)
    return on_their_line(few, more, layers)


def on_their_line(few: Network, more: Network, layers: int) -> Network:
    """Costs of a network of ``layers``, from those of the two `DEPTHS`."""
    first, second = DEPTHS

    def line(a: int, b: int) -> int:
        return a + (b - a) * (layers - first) // (second - first)

    def of(a: Pass, b: Pass) -> Pass:
        return Pass(line(a.bytes, b.bytes), line(a.flops, b.flops))

    return Network(
        line(few.weights, more.weights),
        line(few.trainable, more.trainable),
        line(few.sets, more.sets),
        line(few.frame, more.frame),
        of(few.prefix, more.prefix),
        of(few.branches, more.branches),
        of(few.replay, more.replay),
        of(few.gradient, more.gradient),
        line(few.left_out, more.left_out),
        line(few.maps, more.maps),
    )


def _of_depth(sizes: Sizes, layers: int) -> Sizes:
    return replace(sizes, transformer={**sizes.transformer, "num_layers": layers})


def at_full_depth(config: RunConfig, sizes: Sizes) -> Network:
    """Costs of a network, all of whose layers are run once for every part of a step."""
    g, dtype = sizes.geometry, getattr(torch, config.dtype)
    model = on_meta(lambda: CausalWan(WanTransformer3DModel(**sizes.transformer)), dtype)
    weights = bytes_of(model.parameters())
    policy = on_meta(lambda: Policy(model, config.policy, config.seed), dtype)
    sets = _sets(config, model, policy, weights)
    if config.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    B, R = side_by_side(config), replay_rows(config, g)
    with fake() as ledger:
        materialise(model)
        cache = model.new_cache(
            2 * g.block + max(g.window, g.sink), g.latent_height, g.latent_width, sink=g.sink
        )
        cache.bank = Bank.empty(cache.k, g.bank_keep) if g.bank else None

        def forward(rows: int) -> Pass:
            return _forward(ledger, lambda: _velocity(model, cache, sizes, rows))

        row, branches, replay = map(forward, (1, B, R))
        gradient = _with_gradient(ledger, model, lambda: _velocity(model, cache, sizes, R))
        left_out, maps = _without_adapter(policy, row, lambda: forward(1))
    frame = cache.nbytes // cache.capacity
    return Network(
        weights, policy.num_trainable, sets, frame, row, branches, replay, gradient, left_out, maps
    )


def _sets(config: RunConfig, model: CausalWan, policy: Policy, weights: int) -> int:
    """Bytes of the trained weights' sets, and of the adapter in the module."""
    kept = (*policy.parameters, *policy.reference, *policy.behaviour, *policy.average)
    found = bytes_of(kept) + bytes_of(model.parameters()) - weights
    if config.policy.train == "full" and config.dtype == "float32":
        found -= bytes_of(policy.parameters)  # they are the module's own
    return found


def _without_adapter(policy: Policy, whole: Pass, forward: Callable[[], Pass]) -> tuple[int, int]:
    """Operations of a pass without the adapter, and the bytes of the maps that have one."""
    if policy.config.train != "lora":
        return whole.flops, 0
    adapters = Adapters(policy.model.transformer, policy.names)
    with adapters.left_out():
        return forward().flops, bytes_of(adapters.bases)


def _velocity(model: CausalWan, cache: FrameCache, sizes: Sizes, rows: int) -> torch.Tensor:
    """Velocity of ``rows`` blocks that read a whole window."""
    g = sizes.geometry
    start = max(sizes.geometry.window, sizes.geometry.sink + sizes.geometry.block)
    cache.slots = {f: i % cache.capacity for i, f in enumerate(range(start))}
    x = torch.zeros(
        rows, g.block, sizes.transformer["in_channels"], g.latent_height, g.latent_width
    )
    text = torch.zeros(1, g.text_length, sizes.transformer["text_dim"], dtype=model.dtype)
    past = tuple(f for f in g.history.past(start, g.block) if f >= 0)
    past = (*past, *past[: g.bank])  # the bank's pages are as large as any
    return model.velocity(
        x,
        torch.full((rows,), 0.5),
        text,
        [list(range(start, start + g.block))] * rows,
        cache,
        [past] * rows,
        [0] * rows,
    )


@torch.no_grad()
def _forward(ledger: Ledger, velocity: Callable[[], torch.Tensor]) -> Pass:
    with cost(ledger) as found:
        velocity()
    return Pass(found.bytes, found.flops)


def _with_gradient(ledger: Ledger, model: CausalWan, velocity: Callable[[], torch.Tensor]) -> Pass:
    """Cost of a pass with gradient whose gradients are added to those of an earlier one.

    A group takes several passes; from the second on, activations stand beside whole gradients.
    """
    for p in model.parameters():
        if p.requires_grad:
            master = master_of(p)
            master.grad = torch.zeros_like(master)
    with cost(ledger) as found:
        velocity().square().mean().backward()
    return Pass(found.bytes, found.flops)
