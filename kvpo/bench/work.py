"""Passes of the network that a piece of code makes, and the operations they take.

Which passes are made is seen by a hook on the first block; what a pass of that shape takes is
counted by torch's own counter on the same network on tensors without memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel

from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.generators.causal_wan import CausalWan
from kvpo.planning.costs import Sizes, fake_decoding
from kvpo.planning.peak import fake, flops, materialise, on_meta
from kvpo.policy.policy import Policy


@dataclass(frozen=True)
class PassShape:
    """All that the operations of a pass depend on."""

    rows: int
    frames: int
    past: int
    """Past frames each row reads."""
    prompts: int
    gradient: bool


@dataclass
class PassLog:
    """Passes by phase; a pass with gradient counts once, whether it is recomputed or not."""

    found: Counter[tuple[str, PassShape]]
    checkpointing: bool

    def by_phase(self, cost: dict[PassShape, int]) -> dict[str, int]:
        """Operations of every phase, given those of each shape."""
        total: Counter[str] = Counter()
        for (phase, shape), times in self.found.items():
            twice = shape.gradient and self.checkpointing  # the hook saw the recomputing, too
            total[phase] += times * cost[shape] // (2 if twice else 1)
        return dict(total)


@contextmanager
def watched(model: CausalWan, phases: Phases) -> Iterator[PassLog]:
    """Log the passes of the body by the phase they fall in."""
    log = PassLog(Counter(), bool(model.transformer.gradient_checkpointing))

    def note(_block, args) -> None:
        x_NTD, text_PLD, _modulation, view = args
        shape = PassShape(
            view.batch,
            len(x_NTD) // view.batch,
            view.num_past,
            len(text_PLD),
            torch.is_grad_enabled(),
        )
        log.found[phases.now, shape] += 1

    hook = model.transformer.blocks[0].register_forward_pre_hook(note)
    try:
        yield log
    finally:
        hook.remove()


def operations(config: RunConfig, sizes: Sizes, log: PassLog) -> dict[PassShape, int]:
    """Floating-point operations of every shape in the log, the backward pass included."""
    dtype = getattr(torch, config.dtype)
    model = on_meta(lambda: CausalWan(WanTransformer3DModel(**sizes.transformer)), dtype)
    on_meta(lambda: Policy(model, config.policy, config.seed), dtype)
    with fake():
        materialise(model)
        if config.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        return {shape: _counted(model, sizes, shape) for shape in {s for _, s in log.found}}


def _counted(model: CausalWan, sizes: Sizes, shape: PassShape) -> int:
    g = sizes.geometry
    cache = model.new_cache(max(shape.past, 1), g.latent_height, g.latent_width)
    cache.reserve(range(shape.past))
    x = torch.zeros(
        shape.rows, shape.frames, sizes.transformer["in_channels"], g.latent_height, g.latent_width
    )
    text = torch.zeros(
        shape.prompts, g.text_length, sizes.transformer["text_dim"], dtype=model.dtype
    )
    frames = list(range(shape.past, shape.past + shape.frames))
    with torch.set_grad_enabled(shape.gradient), flops() as counter:
        v = model.velocity(x, 0.5, text, frames, cache, tuple(range(shape.past)), [0] * shape.rows)
        if shape.gradient:
            v.square().mean().backward()
    return counter.get_total_flops()


def decoding(config: RunConfig, sizes: Sizes, rows: int) -> int:
    """Operations of decoding a latent frame in so many rows."""
    return fake_decoding(sizes, getattr(torch, config.vae_dtype), rows).flops


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations a second of one large product on this device: what utilisation is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in "ab")
    phases, times = Phases(), 0
    (a @ b).sum().item()
    with phases("product"):
        while times < 4:
            a @ b
            times += 1
    repeats = max(1, min(200, int(seconds / max(phases.seconds["product"] / times, 1e-9))))
    phases = Phases()
    with phases("product"):
        for _ in range(repeats):
            a @ b
    return 2 * n**3 * repeats / phases.seconds["product"]
