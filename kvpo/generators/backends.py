"""Attention kernels by name, behind diffusers' own dispatcher.

Each computes the same function; they differ in speed, in rounding, and in where they run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from kvpo.common.files import first_line
from kvpo.generators.causal_wan import CausalWan

BACKENDS: Mapping[str, AttentionBackendName | None] = {
    "sdpa": None,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "math": AttentionBackendName._NATIVE_MATH,
    "flash": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
}
"""`sdpa`: torch chooses the kernel."""


def use_backend(model: CausalWan, name: str) -> None:
    """Let all attention of the generator run on the backend of that name.

    It is tried once at the generator's head size, with a gradient. ValueError where it can not be
    used on this machine, or in the generator's precision.
    """
    backend = BACKENDS[name]
    if backend is not None:
        _try(model, name, backend)
    for block in model.transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.processor._attention_backend = backend


def _try(model: CausalWan, name: str, backend: AttentionBackendName) -> None:
    config = model.transformer.config
    shape = (1, 8, config.num_attention_heads, config.attention_head_dim)
    q = torch.ones(shape, dtype=model.dtype, device=model.device, requires_grad=True)
    k = torch.ones(shape, dtype=model.dtype, device=model.device)
    try:
        dispatch_attention_fn(q, k, k, backend=backend).sum().backward()
    except Exception as error:  # every package has its own way of saying that it is not there
        raise ValueError(
            f"attention = {name} can not be used on {model.device} in {model.dtype} ({type(error).__name__}: {first_line(error)}); install its package, or choose sdpa"
        ) from None
