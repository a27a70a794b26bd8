"""Frame-paged KV cache: one page per latent frame, addressed by its absolute frame id.

Keys carry their rotation and softmax ignores the order of keys, so a page never moves: eviction
reuses a page, routing is a choice of pages, and a fork shares its parent's pages read-only over any
number of rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvpo.generators.memory import Bank

Frames = Sequence[int]


def frame_lists(frames: Frames | Sequence[Frames]) -> list[Frames]:
    """Lists of frames, where one list may stand for all rows: that one, or one per row."""
    lists = [row for row in frames if not isinstance(row, int)]
    return lists or [[frame for frame in frames if isinstance(frame, int)]]


@dataclass(frozen=True)
class Source:
    """Location of some of the requested pages.

    It holds tensors only: one compiled graph then serves every layer.
    """

    k: torch.Tensor
    v: torch.Tensor
    """Pages of one layer, [R, N, T, H, D]: cache rows, slots, tokens of a frame."""
    row: torch.Tensor
    slot: torch.Tensor
    """Cache row and slot of every page found here, [M]."""
    at: tuple[torch.Tensor, torch.Tensor] | None
    """Query row and position in its list of every page, 2 x [M].

    None: these pages are the whole request, [B * n] in order.
    """


def gather(sources: Sequence[Source], batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather keys and values of ``n`` frames for each of ``batch`` rows, 2 x [B, n * T, H, D].

    They never carry gradient.
    """
    if len(sources) == 1 and sources[0].at is None:
        s = sources[0]
        k, v = (pages[s.row, s.slot].unflatten(0, (-1, n)).flatten(1, 2) for pages in (s.k, s.v))
        return k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    k, v = (sources[0].k.new_empty(batch, n, *sources[0].k.shape[2:]) for _ in "kv")
    for s in sources:
        k[s.at], v[s.at] = s.k[s.row, s.slot], s.v[s.row, s.slot]
    return k.flatten(1, 2), v.flatten(1, 2)


class FrameCache:
    """Pages of ``rows`` independent histories that hold the same frames.

    ``parent`` pages may be read but are never written through a fork; a frame written here hides
    the parent's.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        rows: int = 1,
        sink: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        parent: FrameCache | None = None,
    ):
        self.layers = layers
        self.capacity = capacity
        self.rows = rows
        self.sink = sink
        self.parent = parent
        # One tensor a layer, not one for all: as views of one tensor, pages passed to torch.compile
        # both to read
        # and to write give silently wrong results (torch 2.13).
        shape = (rows, capacity, tokens, heads, head_dim)
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in "kv"
        )
        self.slots: dict[int, int] = {}
        self.evicted: set[int] = set()
        self.frozen = False
        self.bank: Bank | None = parent.bank if parent is not None else None
        """MemFlow's memory, where the history has one; its slots are frames with negative ids."""

    @property
    def resident(self) -> list[int]:
        """Absolute ids of the frames that can be read, ascending."""
        inherited = set(self.parent.resident) - self.evicted if self.parent else set()
        return sorted(inherited | set(self.slots))

    @property
    def nbytes(self) -> int:
        """Bytes of this cache's own pages."""
        return sum(t.nbytes for t in (*self.k, *self.v))

    def fork(self, rows: int, capacity: int) -> FrameCache:
        """Make a cache of ``rows`` histories that share this one's pages.

        This one can not be written any more. ``capacity``: frames each row may hold of its own at a
        time. Raises ValueError unless this cache has one row or ``rows``.
        """
        if self.rows not in (1, rows):
            raise ValueError(
                f"a cache of {self.rows} rows can be forked into {self.rows} rows, not {rows}; fork a cache of one row to branch out"
            )
        self.frozen = True
        _, _, tokens, heads, dim = self.k[0].shape
        return FrameCache(
            self.layers,
            capacity,
            tokens,
            heads,
            dim,
            rows=rows,
            sink=self.sink,
            dtype=self.k[0].dtype,
            device=self.k[0].device,
            parent=self,
        )

    def part(self, first: int, count: int) -> FrameCache:
        """Give ``count`` of the rows as a cache of their own in this one's memory.

        These rows must not be written here any more.
        """
        part = copy.copy(self)
        part.rows, part.slots, part.evicted = count, dict(self.slots), set(self.evicted)
        part.k, part.v = (
            [pages[first : first + count] for pages in layers] for layers in (self.k, self.v)
        )
        part.bank = self.bank and self.bank.part(first, count)
        return part

    def copied(self) -> FrameCache:
        """Give the same histories in memory of their own; this one can go on being written."""
        copied = self.part(0, self.rows)
        copied.k, copied.v = ([pages.clone() for pages in layers] for layers in (self.k, self.v))
        return copied

    def reserve(self, frames: Frames, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Find slots to write ``frames`` to, [F].

        A frame gets its own slot where it is resident, else a free one, else that of the oldest
        frame after the sink. Raises RuntimeError if the cache has been forked, ValueError if it has
        no room, or if only some ``rows`` are to be written to a new page: the others would read
        nothing there.
        """
        if self.frozen:
            raise RuntimeError(
                f"frames {list(frames)} can not be written: this cache has been forked, and its branches share its pages; write to a fork"
            )
        new = [f for f in frames if f not in self.slots]
        if new and rows is not None and len(rows) < self.rows:
            raise ValueError(
                f"frames {new} have no page of this cache's own, so rows {list(rows)} of {self.rows} can not be written alone; write every row, or enlarge the cache"
            )
        for frame in frames:
            if frame not in self.slots:
                self.slots[frame] = self._free_slot(frames)
                self.evicted.discard(frame)
        return torch.tensor([self.slots[f] for f in frames], device=self.k[0].device)

    def _free_slot(self, frames: Frames) -> int:
        if len(self.slots) < self.capacity:
            return len(self.slots)
        old = [f for f in self.slots if f >= self.sink and f not in frames]
        if not old:
            raise ValueError(
                f"no page for frames {list(frames)}: {self.capacity} pages hold {sorted(self.slots)}, of which the sink ({self.sink}) stays; enlarge the cache"
            )
        frame = min(old)
        self.evicted.add(frame)
        return self.slots.pop(frame)

    def find(
        self, frames: Frames | Sequence[Frames], batch: int, rows: Sequence[int] | None = None
    ) -> list[tuple[FrameCache | Bank, torch.Tensor, torch.Tensor, tuple | None]]:
        """Find the pages of ``batch`` query rows: (cache, row [M], slot [M], at).

        `sources` makes a `Source` of it for a layer.

        ``frames``: one list for all rows, or one list per query row (all of one length). ``rows``:
        the cache row of every query row; default: one to one, and a cache of one row serves all.
        Raises a KeyError that names the frames that are not resident.
        """
        lists = frame_lists(frames)
        if len({len(row) for row in lists}) > 1:
            raise ValueError(
                f"rows of one pass must read equally many frames, not {[len(row) for row in lists]}"
            )
        if (
            len(lists) not in (1, batch)
            or (rows is None and self.rows not in (1, batch))
            or (rows is not None and len(rows) != batch)
        ):
            raise ValueError(
                f"{batch} query rows with {len(lists)} lists of frames and {self.rows if rows is None else len(rows)} cache rows; give one for all, or one per query row"
            )
        if len(lists) == 1 and (
            rows is not None or self.rows > 1 or self.parent is not None or self.bank is not None
        ):
            lists = lists * batch  # else one lookup serves all rows
        rows = range(len(lists)) if rows is None else rows
        found: dict[FrameCache | Bank, list[tuple[int, int, int, int]]] = {}
        for query, (row, wanted) in enumerate(zip(rows, lists)):
            for position, frame in enumerate(wanted):
                owner = self._owner(frame)
                found.setdefault(owner, []).append(
                    (row if owner.rows > 1 else 0, owner.slots[frame], query, position)
                )
        return [
            (cache, *_indices(pages, whole=len(found) == 1, device=self.k[0].device))
            for cache, pages in found.items()
        ]

    def page(self, frame: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one frame in all rows, 2 x [R or 1, T, H, D]."""
        owner = self._owner(frame)
        slot = owner.slots[frame]
        return owner.k[layer][:, slot], owner.v[layer][:, slot]

    def _owner(self, frame: int) -> FrameCache | Bank:
        if frame < 0:
            if self.bank is None or frame not in self.bank.slots:
                raise KeyError(
                    f"the memory bank holds {0 if self.bank is None else len(self.bank.slots)} frames, slot {-1 - frame} was asked for"
                )
            return self.bank
        cache: FrameCache | None = self
        while cache is not None:
            if frame in cache.slots:
                return cache
            if frame in cache.evicted:
                break
            cache = cache.parent
        raise KeyError(
            f"frame {frame} is not in the cache, which holds {self.resident}; enlarge the cache or read a later frame"
        )

    def sources(self, found: Sequence, layer: int) -> tuple[Source, ...]:
        return tuple(
            Source(cache.k[layer], cache.v[layer], row, slot, at) for cache, row, slot, at in found
        )


def _indices(
    pages: list[tuple[int, int, int, int]], whole: bool, device
) -> tuple[torch.Tensor, torch.Tensor, tuple | None]:
    row, slot, query, position = torch.tensor(pages, device=device).T.contiguous()
    return row, slot, None if whole else (query, position)


def store(
    pages: torch.Tensor, row: torch.Tensor, slots: torch.Tensor, x_BLHD: torch.Tensor
) -> None:
    """Write whole frames' keys or values to the pages (row, slot); ``row`` is [B, 1]."""
    pages[row, slots] = x_BLHD.detach().unflatten(1, (len(slots), -1)).to(pages.dtype)
