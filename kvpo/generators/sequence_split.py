"""One stream over several cards: tokens are shared out, and in self-attention heads (Ulysses).

Outside self-attention a rank has a P-th of every frame's tokens. Before it, an all-to-all exchange
trades tokens for heads: a rank attends with a P-th of the heads over the whole past, so its cache
holds a P-th of the keys and values. A second exchange trades back. Text, weights, noise and the
latents between passes are whole on every rank. The scheme is that of DeepSpeed-Ulysses
(arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from kvpo.distributed.ranks import Ranks


class Whole:
    """No split: this process has all tokens and all heads."""

    def meeting(self) -> AbstractContextManager[None]:
        """A context around a pass, in which the ranks exchange their parts."""
        return nullcontext()

    def heads(self, count: int) -> int:
        """Attention heads of this rank, of ``count``."""
        return count

    def tokens(self, x_NTD: torch.Tensor) -> torch.Tensor:
        """This rank's part of the tokens of every frame, [N, T / P, D]."""
        return x_NTD

    def whole(self, x_NTD: torch.Tensor) -> torch.Tensor:
        """All tokens of every frame, from the ranks' parts [N, T / P, D]."""
        return x_NTD

    def to_heads(self, xs: Sequence[torch.Tensor], frames: int) -> Sequence[torch.Tensor]:
        """Queries, keys and values [B, F * T / P, H, D] -> all tokens, own heads.

        They become [B, F * T, H / P, D]; ``frames`` is F.
        """
        return xs

    def to_tokens(self, x_BLHD: torch.Tensor, frames: int) -> torch.Tensor:
        """The way back: [B, F * T, H / P, D] -> own tokens, all heads [B, F * T / P, H, D]."""
        return x_BLHD


class OverHeads(Whole):
    """The split over ``ranks``, of passes without gradient."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.sent = 0
        """Bytes that this rank has sent to others."""

    def meeting(self) -> AbstractContextManager[None]:
        return self.ranks.meeting()

    def heads(self, count: int) -> int:
        return count // self.ranks.world

    def tokens(self, x_NTD: torch.Tensor) -> torch.Tensor:
        """Take this rank's part of the tokens of every frame, [N, T / P, D].

        ValueError with gradients enabled, for the exchanges would lose them.
        """
        if torch.is_grad_enabled():
            raise ValueError(
                f"a stream over {self.ranks.world} ranks makes passes without gradient only; generate under torch.no_grad(), or train with branch_parallel"
            )
        return x_NTD.chunk(self.ranks.world, dim=1)[self.ranks.rank]

    def whole(self, x_NTD: torch.Tensor) -> torch.Tensor:
        P = self.ranks.world
        x, found = x_NTD.contiguous(), x_NTD.new_empty(P, *x_NTD.shape)
        dist.all_gather_into_tensor(found.flatten(0, 1), x, group=self.ranks.channel)
        self.sent += x.nbytes * (P - 1)
        return found.transpose(0, 1).flatten(1, 2)

    def to_heads(self, xs: Sequence[torch.Tensor], frames: int) -> Sequence[torch.Tensor]:
        x = torch.stack(tuple(xs)).unflatten(3, (self.ranks.world, -1)).movedim(3, 0)
        found = self._exchanged(x).unflatten(3, (frames, -1))  # [P, 3, B, F, T / P, H / P, D]
        return found.movedim(0, 3).flatten(2, 4).unbind()

    def to_tokens(self, x_BLHD: torch.Tensor, frames: int) -> torch.Tensor:
        x = x_BLHD.unflatten(1, (frames, self.ranks.world, -1)).movedim(2, 0)
        found = self._exchanged(x)  # [P, B, F, T / P, H / P, D]
        return found.movedim(0, 3).flatten(3, 4).flatten(1, 2)

    def _exchanged(self, x: torch.Tensor) -> torch.Tensor:
        """Entry p of ``x`` [P, ...] goes to rank p; entry p of what comes back is rank p's."""
        x = x.contiguous()
        found = torch.empty_like(x)
        dist.all_to_all_single(found, x, group=self.ranks.channel)
        self.sent += x.nbytes // len(x) * (len(x) - 1)
        return found


def check_split(heads: int, tokens: int, bank: int, world: int) -> None:
    """Check that ``world`` ranks can share a stream of so many heads and tokens a frame.

    ValueError where they do not divide, or where the stream has a memory bank, whose choice of
    frames looks at all heads.
    """
    if bank:
        raise ValueError(
            f"a stream with a memory bank (bank = {bank}) can not be shared by {world} ranks: which frames it keeps, all heads decide; start one process"
        )
    for count, what in ((heads, "attention heads"), (tokens, "tokens of a frame")):
        if count % world:
            raise ValueError(
                f"{world} ranks can not share {count} {what} evenly; start a number of processes that divides both {heads} heads and {tokens} tokens"
            )
