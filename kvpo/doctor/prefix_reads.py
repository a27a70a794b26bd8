"""A generator that checks, bit for bit, what every row reads of the shared prefix."""

from __future__ import annotations

import torch

from kvpo.doctor.finding import Finding
from kvpo.generators.cache import FrameCache, gather
from kvpo.generators.causal_wan import CausalWan


class WatchedGenerator(CausalWan):
    """A generator that looks at what a denoise pass is about to read of the prefix.

    It does so for every row, before it runs.
    """

    def __init__(self, model: CausalWan, prefix: FrameCache):
        # Not CausalWan's own, which would give the transformer new attention processors.
        torch.nn.Module.__init__(self)
        self.transformer = model.transformer
        self.calls = 0
        self.prefix = prefix
        self.left = _prints(prefix)
        self.reads = 0
        self.wrong = 0

    def velocity(self, x, sigma, text, frames, cache=None, past=(), rows=None):
        """`CausalWan.velocity`, after the pages that it will read were compared."""
        lists = past if isinstance(past, list) else [past] * len(x)
        found = cache.find(past, len(x))
        pages = [
            (row, i, f)
            for row, wanted in enumerate(lists)
            for i, f in enumerate(wanted)
            if self._is_the_prefix(cache, f)
        ]
        for layer in range(cache.layers if pages else 0):
            read = [
                kv.unflatten(1, (len(lists[0]), -1))
                for kv in gather(cache.sources(found, layer), len(x), len(lists[0]))
            ]
            self.wrong += sum(
                [_print(kv[row, i]) for kv in read] != self.left[f, layer] for row, i, f in pages
            )
            self.reads += len(pages)
        return super().velocity(x, sigma, text, frames, cache, past, rows)

    def _is_the_prefix(self, cache: FrameCache, f: int) -> bool:
        """Whether the prefix owns the page of a frame, or of a slot of the bank (below 0).

        Pages that rows encoded anew at a prompt switch are their own, and so is a bank that they
        have recorded to.
        """
        if f < 0:
            return cache.bank is self.prefix.bank
        return f in self.prefix.slots and f not in cache.slots

    def finding(self) -> Finding:
        """Judge what was read, and whether the prefix is still as it was left."""
        wrong = self.wrong + sum(
            page != self.left[key] for key, page in _prints(self.prefix).items()
        )
        return Finding(
            "pages of the prefix that a row reads otherwise than left",
            wrong,
            f"<= 0 of {self.reads}, bit for bit",
            wrong == 0 < self.reads,
        )


def _prints(cache: FrameCache) -> dict[tuple[int, int], list[int]]:
    """Prints of the keys and values of all that can be read.

    Keyed by (frame or slot of the bank, layer).
    """
    readable = (*cache.resident, *(cache.bank.slots if cache.bank else ()))
    return {
        (f, layer): [_print(kv) for kv in cache.page(f, layer)]
        for f in readable
        for layer in range(cache.layers)
    }


def _print(x: torch.Tensor) -> int:
    """A number that stands for the bits: a copy of the prefix's pages may not fit beside them."""
    words = x.contiguous().view(torch.int16).flatten().long()
    return int((words * torch.arange(1, 2 * len(words), 2, device=x.device)).sum())
