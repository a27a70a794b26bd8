"""Attention processors for the stock `WanAttention` modules.

Hidden states arrive with frames folded into the batch, [B * F, T, D]: the stock block's per-sample
modulation is then a per-frame one at no cost. Only the processors unfold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections

from kvpo.generators.cache import Source, gather, store
from kvpo.generators.memory import activated
from kvpo.generators.rope import Angles, rotate


@dataclass(frozen=True)
class LayerView:
    """What one self-attention layer needs beyond the stock block's arguments; goes where the block
    expects ``rotary_emb``.

    It holds tensors and sizes only (no layer number, no cache object), so one compiled graph serves
    every layer and an activation checkpoint recomputes from exactly what it saw.
    """

    batch: int
    angles: Angles
    past: tuple[Source, ...]
    num_past: int
    """Past frames each row reads."""
    activated: tuple[int, int] | None
    """(candidates, kept): of the first past frames, how many each head reads, chosen by its
    queries; None: all."""
    own: int
    """Newest tokens of the pass itself that serve as keys; all of them but in a re-encoding
    pass."""
    write: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Key pages, value pages, cache rows [B, 1] and slots [F] to write the pass's clean frames
    to; None: read only."""


def _project(attn: WanAttention, x: torch.Tensor, encoder: torch.Tensor | None):
    q, k, v = _get_qkv_projections(attn, x, encoder)
    return tuple(
        part.type_as(v).unflatten(2, (attn.heads, -1))
        for part in (attn.norm_q(q), attn.norm_k(k), v)
    )


def _output(attn: WanAttention, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](x.reshape(like.shape).type_as(like)))


class PagedSelfAttention:
    """Queries of a pass over gathered past pages and the pass's own keys. No mask: what may not
    be seen is not gathered."""

    _attention_backend = _parallel_config = None

    def __call__(
        self, attn: WanAttention, hidden: torch.Tensor, _encoder, _mask, view: LayerView
    ) -> torch.Tensor:
        q, k, v = _project(attn, hidden.reshape(view.batch, -1, hidden.shape[-1]), None)
        q, k = rotate(q, view.angles), rotate(k, view.angles)
        keys, values = k[:, -view.own :], v[:, -view.own :]
        if view.past:
            past_k, past_v = gather(view.past, view.batch, view.num_past)
            if view.activated is not None:
                past_k, past_v = activated(q, past_k, past_v, view.num_past, *view.activated)
            keys, values = torch.cat((past_k, keys), dim=1), torch.cat((past_v, values), dim=1)
        x = dispatch_attention_fn(q, keys, values, backend=self._attention_backend)
        if view.write is not None:
            k_pages, v_pages, row, slots = view.write
            store(k_pages, row, slots, k)
            store(v_pages, row, slots, v)
        return _output(attn, x, hidden)


class FoldedCrossAttention:
    """Text [P, L, D] is projected once per prompt; the queries of all rows and frames that share
    it fold onto it."""

    _attention_backend = _parallel_config = None

    def __call__(
        self, attn: WanAttention, hidden: torch.Tensor, text_PLD: torch.Tensor, _mask, _rotary
    ) -> torch.Tensor:
        q, k, v = _project(attn, hidden.reshape(text_PLD.shape[0], -1, hidden.shape[-1]), text_PLD)
        return _output(
            attn, dispatch_attention_fn(q, k, v, backend=self._attention_backend), hidden
        )
