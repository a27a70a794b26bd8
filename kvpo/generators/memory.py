"""MemFlow's memory bank: single frames that outlive the rolling window.

They are kept because they answer the prompt.

A prototype is one frame's keys and values in one layer; every layer and row makes its own choice. A
full bank gives up the prototype whose keys agree least with the text's keys in that layer's
cross-attention,

    score(n) = mean_{text tokens, heads, tokens} <k_text, k_n> = mean_heads <mean k_text, mean k_n>,

and takes the new one in. A bank never changes, an update is a new bank: forks share it, a replay or
an activation checkpoint that runs again reads what it read before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

Page = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one frame in one layer, 2 x [R, T, H, D]."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Prototypes, addressed like frames: slot i answers to the frame id -1 - i."""

    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    """Pages of every layer, [R, N, T, H, D]; R = 1: the same for all rows of the cache."""
    frames: torch.Tensor
    """Frame that fills each slot, [layers, R, N]."""
    keep: int = 0
    """Frames of sink and bank that each head reads, chosen by its queries; 0 = all.

    This is sparse memory activation (SMA).
    """

    @classmethod
    def empty(cls, pages_k: Sequence[torch.Tensor], keep: int) -> Bank:
        """Make an empty bank for a cache whose pages are ``pages_k``, [R, N, T, H, D] a layer."""
        none = tuple(k[:1, :0] for k in pages_k)
        return cls(none, none, torch.zeros(len(none), 1, 0, dtype=torch.long), keep)

    @property
    def rows(self) -> int:
        return self.frames.shape[1]

    @property
    def slots(self) -> Mapping[int, int]:
        return {-1 - slot: slot for slot in range(self.frames.shape[2])}

    def part(self, first: int, count: int) -> Bank:
        """Give the bank of ``count`` of the rows."""
        if self.rows == 1:
            return self
        k, v = (
            tuple(pages[first : first + count] for pages in layers) for layers in (self.k, self.v)
        )
        return replace(self, k=k, v=v, frames=self.frames[:, first : first + count])

    def recorded(
        self,
        frame: int,
        page: Callable[[int], Page],
        text_keys: Sequence[torch.Tensor],
        slot: int,
        size: int,
    ) -> Bank:
        """Return the bank with ``frame`` recorded in it.

        It fills its ``slot`` if that is below ``size``, else it replaces the prototype that agrees
        least with the text.

        ``page(layer)``: the frame's keys and values. ``text_keys``: mean text keys of every layer,
        [P, H, D]; rows of a prompt stand together.
        """
        pages = [page(layer) for layer in range(len(self.k))]
        R = max(self.rows, len(pages[0][0]))
        kept = [
            torch.arange(slot).expand(R, -1)
            if slot < size
            else _best(_rows(k, R), text_PHD, size - 1)
            for k, text_PHD in zip(self.k, text_keys)
        ]
        k, v = (
            tuple(_appended(old, new[half], R, slots) for old, new, slots in zip(olds, pages, kept))
            for half, olds in enumerate((self.k, self.v))
        )
        frames = torch.stack(
            [
                torch.cat((_rows(old, R).gather(1, slots.cpu()), torch.full((R, 1), frame)), dim=1)
                for old, slots in zip(self.frames, kept)
            ]
        )
        return replace(self, k=k, v=v, frames=frames)


def _rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.expand(rows, *x.shape[1:])


def _appended(
    old_RNTHD: torch.Tensor, new_RTHD: torch.Tensor, rows: int, kept_RN: torch.Tensor
) -> torch.Tensor:
    index = torch.arange(rows, device=kept_RN.device)[:, None]
    return torch.cat(
        (_rows(old_RNTHD, rows)[index, kept_RN], _rows(new_RTHD, rows)[:, None]), dim=1
    )


def _best(k_RNTHD: torch.Tensor, text_PHD: torch.Tensor, count: int) -> torch.Tensor:
    """Slots of the ``count`` highest scores, best first, [R, count]."""
    text_RHD = text_PHD.repeat_interleave(k_RNTHD.shape[0] // text_PHD.shape[0], dim=0)
    score_RN = torch.einsum("rnhd,rhd->rn", k_RNTHD.float().mean(dim=2), text_RHD.float())
    return score_RN.topk(count, dim=1).indices


def activated(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    frames: int,
    candidates: int,
    keep: int,
) -> Page:
    """Select past frames by SMA: ``keep`` of the first ``candidates`` of the ``frames`` frames.

    Each head keeps those whose mean key agrees best with its mean query. All later frames stay.
    """
    T = k_BLHD.shape[1] // frames
    memory_k, memory_v = (
        x[:, : candidates * T].unflatten(1, (candidates, T)) for x in (k_BLHD, v_BLHD)
    )
    score_BHN = torch.einsum(
        "bhd,bnhd->bhn", q_BLHD.detach().float().mean(dim=1), memory_k.float().mean(dim=2)
    )
    index = score_BHN.topk(keep, dim=2).indices.sort(dim=2).values[..., None, None]
    chosen_k, chosen_v = (
        x.permute(0, 3, 1, 2, 4).take_along_dim(index, dim=2).permute(0, 2, 3, 1, 4).flatten(1, 2)
        for x in (memory_k, memory_v)
    )
    return torch.cat((chosen_k, k_BLHD[:, candidates * T :]), dim=1), torch.cat(
        (chosen_v, v_BLHD[:, candidates * T :]), dim=1
    )
