"""A block's velocity through the cache against diffusers' own forward over all frames.

The cache, the history and our attention are all that differs; the mask of the uncached forward
says which frames each frame reads, and how often.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from kvpo.common.rng import normal
from kvpo.doctor.finding import relative
from kvpo.generators.cache import FrameCache
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.sampler import Stream
from kvpo.runs.parts import Parts
from kvpo.types import Script


class _AllFrames(WanAttnProcessor):
    """diffusers' own self-attention over a whole sequence.

    Frame q reads frame k ``counts[q, k]`` times.
    """

    def __init__(self, counts_NN: torch.Tensor):
        super().__init__()
        self.counts_NN = counts_NN

    def __call__(self, attn, hidden, encoder, _mask, rotary):
        tokens = hidden.shape[1] // len(self.counts_NN)
        mask = (
            self.counts_NN.log()
            .to(hidden.dtype)
            .repeat_interleave(tokens, 0)
            .repeat_interleave(tokens, 1)
        )
        return super().__call__(attn, hidden, encoder, mask, rotary)


@torch.no_grad()
def against_stock(run: Parts, blocks: int) -> float:
    """Relative difference of a block's velocity from diffusers' own forward over all frames.

    The block follows ``blocks`` clean ones, of which the last lies in a fork as a branch's does.
    """
    model = run.pipeline.generator
    g = run.pipeline.geometry
    F, N = g.block, (blocks + 1) * g.block
    prompt = run.source.script(0, 0).texts[0]
    x = normal(run.pipeline.latent_shape(N), run.config.seed, "doctor", "frames")[None].to(
        run.device
    )
    text = run.pipeline.encode_text([prompt])
    cache = run.pipeline.new_cache(N if g.window < 0 else g.window)
    # which prototypes a head would choose hangs on its queries, and no mask says that: here it
    # reads them all
    if cache.bank is not None:
        cache.bank = replace(cache.bank, keep=0)
    stream = Stream(
        model,
        g,
        None,
        [Script("doctor", (prompt,), (0,), blocks + 1)],
        {prompt: text[0]},
        None,
        cache,
    )
    counts_LNN = torch.zeros(cache.layers, N, N, device=run.device)
    for block in range(blocks + 1):
        if block == blocks - 1:
            stream.cache = stream.cache.fork(1, F)
        stream.switch()
        frames = list(range(block * F, (block + 1) * F))
        past = g.history.past(frames[0], F)
        for layer, counts_NN in enumerate(counts_LNN):
            for f in (*past, *frames):
                counts_NN[frames, _frame_of(f, layer, stream.cache)] += 1
        if block < blocks:
            model.commit(x[:, frames], text, frames, stream.cache, past)
            stream.blocks.append(x[:, frames])
    v = model.velocity(x[:, frames], 0.5, text, frames, stream.cache, past)
    return relative(v, _stock(model, x, [0.0] * (N - F) + [500.0] * F, text, counts_LNN)[:, -F:])


def _frame_of(f: int, layer: int, cache: FrameCache) -> int:
    """The frame of a page: of a slot of the memory bank, the one that the layer keeps in it."""
    if f >= 0:
        return f
    assert cache.bank is not None, "only a bank has slots"
    return int(cache.bank.frames[layer, 0, -1 - f])


def _stock(
    model: CausalWan,
    x_BNCHW: torch.Tensor,
    times_N: list[float],
    text: torch.Tensor,
    counts_LNN: torch.Tensor,
) -> torch.Tensor:
    """v_BNCHW of diffusers' own forward with its own attention; a time for every frame."""
    net = model.transformer
    ours = model.transformer.attn_processors
    rows, columns = model.grid(*x_BNCHW.shape[-2:])
    time = torch.tensor(times_N, device=x_BNCHW.device).repeat_interleave(rows * columns)[None]
    net.set_attn_processor(
        {
            name: _AllFrames(counts_LNN[int(name.split(".")[1])])
            if "attn1" in name
            else WanAttnProcessor()
            for name in ours
        }
    )
    v = net(x_BNCHW.transpose(1, 2).to(model.dtype), time, text.to(model.dtype), return_dict=False)[
        0
    ].transpose(1, 2)
    net.set_attn_processor(ours)
    return v
