"""Compiled transformer blocks: `torch.compile` of each, with static shapes.

A block's inputs hold tensors and sizes only, and no layer's number, so one graph serves all layers.
There is one for each kind of call and shape: denoise passes, the clean pass that writes the cache,
and replays with gradient; of each a few more while the window fills. Names of weights stay as they
are, since the blocks are compiled in place.
"""

from __future__ import annotations

import warnings

import torch

from kvpo.common.files import first_line
from kvpo.generators.causal_wan import CausalWan

MOST_GRAPHS = 256
"""Graphs of a block that torch may compile, where its own limit is 8.

Beyond the limit a call that may not fall back would end the run.
"""


def compile_blocks(model: CausalWan, backend: str = "inductor") -> None:
    """Let the generator's blocks be compiled at the first call of each shape.

    ``backend``: a name that `torch.compile` knows. ValueError where it can compile nothing here.
    """
    _try(model.device, backend)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    limit = torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.config.accumulated_recompile_limit = max(limit, 4 * MOST_GRAPHS)
    # while it traces a block, torch asks its inputs for a gradient that only leaves have
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    for block in model.transformer.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)


def _try(device: torch.device, backend: str) -> None:
    """Compile a sum, so that a missing compiler is said before anything is generated."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        # the compiler imports parts of torch of which torch itself says that they are deprecated
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            torch.compile(doubled, backend=backend, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # each part of the compiler has its own way of saying what it lacks
        raise ValueError(
            f"compile = true can not be used on {device} ({type(error).__name__}: {first_line(error)}); "
            "install what torch.compile needs there, triton on a GPU and a C++ compiler on a CPU, or leave the setting out"
        ) from None
