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
from kvpo.generators.sequence_split import Whole


@dataclass(frozen=True)
class LayerView:
    """Input of one self-attention layer beyond the stock block's arguments.

    It goes where the block expects ``rotary_emb``. It holds tensors and sizes only (no layer
    number, no cache object), so one compiled graph serves every layer and an activation checkpoint
    recomputes from exactly what it saw.
    """

    batch: int
    angles: Angles
    past: tuple[Source, ...]
    num_past: int
    """Past frames each row reads."""
    activated: tuple[int, int] | None
    """(candidates, kept): each head reads ``kept`` of the first ``candidates`` past frames.

    A head chooses them by its queries. None: it reads all.
    """
    own: int
    """Newest tokens of the pass itself that serve as keys.

    They are all of its tokens, except in a re-encoding pass.
    """
    write: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Destination of the pass's clean frames; None: read only.

    It holds key pages, value pages, cache rows [B, 1] and slots [F].
    """


def _project(attn: WanAttention, x: torch.Tensor, encoder: torch.Tensor | None):
    q, k, v = _get_qkv_projections(attn, x, encoder)
    return tuple(
        part.type_as(v).unflatten(2, (attn.heads, -1))
        for part in (attn.norm_q(q), attn.norm_k(k), v)
    )


def _output(attn: WanAttention, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](x.reshape(like.shape).type_as(like)))


class PagedSelfAttention:
    """Attention of a pass's queries to gathered past pages and the pass's own keys.

    There is no mask: what may not be seen is not gathered.
    """

    _attention_backend = _parallel_config = None

    def __init__(self):
        self.split = Whole()

    def __call__(
        self, attn: WanAttention, hidden: torch.Tensor, _encoder, _mask, view: LayerView
    ) -> torch.Tensor:
        frames = hidden.shape[0] // view.batch
        own = _project(attn, hidden.reshape(view.batch, -1, hidden.shape[-1]), None)
        q, k, v = self.split.to_heads(own, frames)
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
        return _output(attn, self.split.to_tokens(x, frames), hidden)


class FoldedCrossAttention:
    """Cross-attention that projects the text [P, L, D] once per prompt.

    The queries of all rows and frames that share a prompt fold onto it.
    """

    _attention_backend = _parallel_config = None

    def __call__(
        self, attn: WanAttention, hidden: torch.Tensor, text_PLD: torch.Tensor, _mask, _rotary
    ) -> torch.Tensor:
        q, k, v = _project(attn, hidden.reshape(text_PLD.shape[0], -1, hidden.shape[-1]), text_PLD)
        return _output(
            attn, dispatch_attention_fn(q, k, v, backend=self._attention_backend), hidden
        )
