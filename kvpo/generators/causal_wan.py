"""The causal generator: a stock `WanTransformer3DModel` driven block by block.

`velocity` reads the cache, `commit` writes it. Replay, activation checkpointing and the anchor are
safe by construction: no pass with gradient can change what another pass reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from kvpo.generators.attention import FoldedCrossAttention, LayerView, PagedSelfAttention
from kvpo.generators.cache import FrameCache, Frames, frame_lists
from kvpo.generators.flow import TIME_SCALE
from kvpo.generators.rope import check_positions, frame_angles
from kvpo.generators.sequence_split import Whole


class CausalWan(nn.Module):
    """A stock Wan transformer that runs block by block over a `FrameCache`.

    It adds no parameters and patches no module: attention processors and this loop are all there
    is.
    """

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self.transformer = transformer
        for block in transformer.blocks:
            block.attn1.set_processor(PagedSelfAttention())
            block.attn2.set_processor(FoldedCrossAttention())
        self.calls = 0
        """Forward passes so far, for the cost report."""

    @property
    def split(self) -> Whole:
        """The way in which passes are shared with other ranks, the same in every block."""
        return self.transformer.blocks[0].attn1.processor.split

    def share(self, split: Whole) -> None:
        """Make all further passes with other ranks, as ``split`` says; caches are made after it."""
        for block in self.transformer.blocks:
            block.attn1.processor.split = split

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the large matrices, of pages and text."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    def new_cache(
        self, capacity: int, height: int, width: int, *, rows: int = 1, sink: int = 0
    ) -> FrameCache:
        """An empty cache for latents of ``height`` x ``width``; ``capacity`` in frames."""
        config, (rows_T, columns_T) = self.transformer.config, self.grid(height, width)
        return FrameCache(
            config.num_layers,
            capacity,
            rows_T * columns_T,
            self.split.heads(config.num_attention_heads),
            config.attention_head_dim,
            rows=rows,
            sink=sink,
            dtype=self.dtype,
            device=self.device,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame."""
        _, ph, pw = self.transformer.config.patch_size
        return height // ph, width // pw

    def velocity(
        self,
        latents_BFCHW: torch.Tensor,
        sigma: torch.Tensor | float,
        text_PLD: torch.Tensor,
        frames: Frames | Sequence[Frames],
        cache: FrameCache | None = None,
        past: Frames | Sequence[Frames] = (),
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """v_BFCHW, the network's velocity at noise level ``sigma`` (a number, [B], or [B, F]).

        The cache is left as it was.

        ``frames``: absolute ids, one list for all rows or one per row. ``past``: frames to read,
        likewise. ``rows``: cache row of every row (default: one to one). P divides B: rows of a
        prompt stand together.
        """
        sigma_BF = self._per_frame(sigma, latents_BFCHW)
        lists = frame_lists(frames)
        return self._forward(
            latents_BFCHW, TIME_SCALE * sigma_BF, text_PLD, lists, cache, past, rows, None, None
        )

    @torch.no_grad()
    def commit(
        self,
        clean_BFCHW: torch.Tensor,
        text_PLD: torch.Tensor,
        frames: Frames,
        cache: FrameCache,
        past: Frames | Sequence[Frames] = (),
        rows: Sequence[int] | None = None,
        own: int | None = None,
    ) -> torch.Tensor:
        """Run the clean pass (time 0), which writes keys and values of clean frames to the cache.

        Returns the velocity, rarely wanted.

        ``rows``: the cache rows written and read (default: all of them, in order). ``own``: only
        the newest ``own`` frames of the pass serve as keys in it (the re-encoding at a prompt
        switch).
        """
        batch = len(clean_BFCHW)
        if batch != (cache.rows if rows is None else len(rows)):
            raise ValueError(
                f"{batch} rows of latents for {cache.rows if rows is None else len(rows)} cache rows; commit one history per cache row"
            )
        row = (
            torch.arange(batch, device=self.device)
            if rows is None
            else torch.tensor(list(rows), device=self.device)
        )
        write = (row[:, None], cache.reserve(frames, rows))
        return self._forward(
            clean_BFCHW,
            self._per_frame(0.0, clean_BFCHW),
            text_PLD,
            [frames],
            cache,
            past,
            rows,
            own,
            write,
        )

    @torch.no_grad()
    def mean_text_keys(self, text_PLD: torch.Tensor) -> list[torch.Tensor]:
        """Mean key of every prompt in every layer's cross-attention, [P, H, D] float32.

        A memory bank is scored by them.
        """
        text = self.transformer.condition_embedder.text_embedder(text_PLD.to(self.dtype))
        heads = self.transformer.config.num_attention_heads
        return [
            block.attn2.norm_k(block.attn2.to_k(text)).float().mean(dim=1).unflatten(1, (heads, -1))
            for block in self.transformer.blocks
        ]

    def _per_frame(self, sigma: torch.Tensor | float, latents: torch.Tensor) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
        return (sigma[:, None] if sigma.dim() == 1 else sigma).expand(latents.shape[:2])

    def _views(self, batch: int, latents, frames, cache, past, rows, own, write):
        grid = self.grid(*latents.shape[-2:])
        check_positions(self.transformer.rope, frames)
        angles = frame_angles(
            self.transformer.rope,
            torch.tensor(list(map(list, frames)), device=latents.device),
            grid,
        )
        found = cache.find(past, batch, rows) if cache is not None and len(past) else []
        num_past = len(frame_lists(past)[0]) if found else 0
        activated = _activated(past, cache) if found else None
        tokens = (own or latents.shape[1]) * grid[0] * grid[1]
        for i in range(self.transformer.config.num_layers):
            pages = None if write is None else (cache.k[i], cache.v[i], *write)
            yield LayerView(
                batch,
                angles,
                cache.sources(found, i) if found else (),
                num_past,
                activated,
                tokens,
                pages,
            )

    def _forward(
        self, latents_BFCHW, time_BF, text_PLD, frames, cache, past, rows, own, write
    ) -> torch.Tensor:
        net, (B, F, _, H, W) = self.transformer, latents_BFCHW.shape
        if B % text_PLD.shape[0]:
            raise ValueError(
                f"{B} rows can not be shared out evenly over {text_PLD.shape[0]} prompts; give one prompt, or one per row"
            )
        self.calls += 1
        x = (
            net.patch_embedding(latents_BFCHW.to(self.dtype).flatten(0, 1).unsqueeze(2))
            .flatten(2)
            .transpose(1, 2)
        )
        x = self.split.tokens(x)
        embedding, modulation, text, _ = net.condition_embedder(
            time_BF.reshape(-1), text_PLD.to(self.dtype)
        )
        modulation = modulation.unflatten(1, (6, -1))
        checkpointing = torch.is_grad_enabled() and net.gradient_checkpointing
        views = self._views(B, latents_BFCHW, frames, cache, past, rows, own, write)
        with self.split.meeting():
            for block, view in zip(net.blocks, views):
                args = (x, text, modulation, view)
                x = (
                    net._gradient_checkpointing_func(block, *args)
                    if checkpointing
                    else block(*args)
                )
            shift, scale = (net.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
            x = net.proj_out((net.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
            x = self.split.whole(x)
        _, ph, pw = net.config.patch_size
        # [B * F, rows, columns, ph, pw, C]
        x = x.unflatten(2, (ph, pw, -1)).unflatten(1, self.grid(H, W))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, F, -1, H, W).to(latents_BFCHW.dtype)


def _activated(past: Frames | Sequence[Frames], cache: FrameCache) -> tuple[int, int] | None:
    """(candidates, kept): number of sink and bank frames, which stand first, and of those read.

    None where all are read. Raises ValueError where rows have unequally many.
    """
    if cache.bank is None or not cache.bank.keep:
        return None
    counts = {
        len(list(itertools.takewhile(lambda frame: frame < cache.sink, row)))
        for row in frame_lists(past)
    }
    if len(counts) > 1:
        raise ValueError(
            f"rows of one pass must read equally many frames of sink and memory, not {sorted(counts)}"
        )
    (candidates,) = counts
    return (candidates, cache.bank.keep) if candidates > cache.bank.keep else None
