"""The contract of the generator: cached == uncached, `velocity` only reads, forks share, rows do
not see each other."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from tiny import (
    BLUE,
    CHANNELS,
    RED,
    SMALL,
    TEXT_DIM,
    draw,
    embed,
    new_pipeline,
    new_stream,
    new_transformer,
    story,
    with_geometry,
)

from kvpo.generators.cache import FrameCache, gather
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.history import Routed, SinkWindow
from kvpo.policy.policy import ADAPTER_TARGETS
from kvpo.types import BranchPlan, Window

F, H, W = 2, 4, 4
TOKENS = 4
CLOSE = {"atol": 2e-5, "rtol": 0}


def latents(batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    return draw(batch, frames, CHANNELS, H, W, seed=seed)


def text(rows: int = 1, seed: int = 7) -> torch.Tensor:
    return draw(rows, 5, TEXT_DIM, seed=seed)


@pytest.fixture(scope="module")
def model(pipeline):
    return pipeline.generator


def filled(
    model, blocks: int, rows: int = 1, history=SinkWindow(1, 7), capacity: int = 20, prompt=None
) -> tuple[FrameCache, torch.Tensor]:
    """A cache after ``blocks`` committed blocks, and their clean latents."""
    cache, clean = model.new_cache(capacity, H, W, rows=rows, sink=1), latents(rows, blocks * F)
    for b in range(blocks):
        frames = list(range(b * F, (b + 1) * F))
        model.commit(
            clean[:, frames],
            text() if prompt is None else prompt,
            frames,
            cache,
            history.past(frames[0], F),
        )
    return cache, clean


def pages(cache: FrameCache) -> list[torch.Tensor]:
    return [t.clone() for t in (*cache.k, *cache.v)]


# --- Cached == uncached ---


class MaskedAttention(WanAttnProcessor):
    """diffusers' own self-attention, with a mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden, encoder, _mask, rotary):
        return super().__call__(attn, hidden, encoder, self.mask, rotary)


def flat(
    model: CausalWan,
    x_NCHW: torch.Tensor,
    time_N: torch.Tensor,
    reads: list[set[int]],
    prompt: torch.Tensor,
) -> torch.Tensor:
    """One forward of the stock model over all frames at once; frame f attends to the frames
    ``reads[f]``."""
    stock, N = copy.deepcopy(model.transformer), len(x_NCHW)
    seen = torch.tensor([[k in reads[q] for k in range(N)] for q in range(N)])
    for block in stock.blocks:
        block.attn1.set_processor(
            MaskedAttention(seen.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1))
        )
        block.attn2.set_processor(WanAttnProcessor())
    return stock(
        x_NCHW.transpose(0, 1)[None],
        time_N.repeat_interleave(TOKENS)[None],
        prompt,
        return_dict=False,
    )[0][0].transpose(0, 1)


def deployed(frame: int, sink: int, window: int) -> set[int]:
    """What a frame may read, written down once more: its block, the sink, and the latest frames."""
    start = frame // F * F
    own = set(range(start, start + F))
    if window < 0:
        return own | set(range(start))
    return own | {f for f in range(start) if f < sink or f >= start - (window - sink - F)}


@pytest.mark.parametrize(("sink", "window"), [(1, -1), (1, 7), (2, 6), (3, 5), (0, 4)])
@torch.no_grad()
def test_cached_is_uncached(model, sink, window):
    """The stream over the cache against one flat forward: clean past at time 0, the last block
    at its noise level."""
    blocks, sigma, history = 6, 0.625, SinkWindow(sink, window)
    cache, clean = filled(model, blocks - 1, history=history)
    noisy, frames = latents(1, F, seed=1), list(range((blocks - 1) * F, blocks * F))
    v = model.velocity(noisy, sigma, text(), frames, cache, history.past(frames[0], F))
    times = torch.tensor([0.0] * ((blocks - 1) * F) + [1000.0 * sigma] * F)
    expected = flat(
        model,
        torch.cat((clean, noisy), dim=1)[0],
        times,
        [deployed(f, sink, window) for f in range(blocks * F)],
        text(),
    )
    torch.testing.assert_close(v[0], expected[-F:], **CLOSE)
    assert v.std() > 0.1, "an output near zero would agree with anything"


@torch.no_grad()
def test_routed_is_gathered_by_hand(model):
    """Routed frames keep their positions; which row, slot or order they come from does not
    matter."""
    cache, clean = filled(model, 5)
    noisy, frames, routed = latents(1, F, seed=1), [10, 11], (0, 2, 5, 6, 9)
    reads = [deployed(f, 1, 7) for f in range(10)] + [{*routed, *frames}] * 2
    times = torch.tensor([0.0] * 10 + [500.0] * F)
    expected = flat(model, torch.cat((clean, noisy), dim=1)[0], times, reads, text())
    torch.testing.assert_close(
        model.velocity(noisy, 0.5, text(), frames, cache, routed)[0], expected[-F:], **CLOSE
    )
    torch.testing.assert_close(
        model.velocity(noisy, 0.5, text(), frames, cache, routed[::-1])[0], expected[-F:], **CLOSE
    )
    assert (
        model.velocity(noisy, 0.5, text(), frames, cache, (0, 6, 7, 8, 9))[0] - expected[-F:]
    ).abs().max() > 1e-3, "another choice must matter"


@torch.no_grad()
def test_gather_takes_the_pages_of_the_named_frames(model):
    parent, _ = filled(model, 3)
    fork = parent.fork(2, 4)
    model.commit(latents(2, F, seed=3), text(), [6, 7], fork, (0, 4, 5))
    lists = [(0, 6, 3), (7, 1, 5)]
    k, v = gather(fork.sources(fork.find(lists, 2), 1), 2, 3)
    for got, own, shared in ((k, fork.k[1], parent.k[1]), (v, fork.v[1], parent.v[1])):
        for row, wanted in enumerate(lists):
            by_hand = [own[row, f - 6] if f >= 6 else shared[0, f] for f in wanted]
            assert torch.equal(got[row], torch.cat(by_hand))


@torch.no_grad()
def test_one_sigma_per_frame(model):
    sigma = torch.tensor([[0.3, 0.9]])
    expected = flat(model, latents(1, F)[0], 1000.0 * sigma[0], [{0, 1}] * 2, text())
    torch.testing.assert_close(
        model.velocity(latents(1, F), sigma, text(), [0, 1])[0], expected, **CLOSE
    )


@torch.no_grad()
def test_bf16_within_tolerance(model):
    rounded = copy.deepcopy(model.transformer).to(torch.bfloat16)
    for block in rounded.blocks:  # as from_pretrained keeps them
        block.scale_shift_table.data, block.norm2 = (
            block.scale_shift_table.data.float(),
            block.norm2.float(),
        )
    rounded.scale_shift_table.data, rounded.condition_embedder.time_embedder = (
        rounded.scale_shift_table.data.float(),
        rounded.condition_embedder.time_embedder.float(),
    )
    low = CausalWan(rounded)
    (cache, _), (exact_cache, _) = filled(low, 4), filled(model, 4)
    assert low.dtype == cache.k[0].dtype == torch.bfloat16
    exact = model.velocity(latents(1, F, seed=1), 0.5, text(), [8, 9], exact_cache, (0, 4, 5, 6, 7))
    v = low.velocity(latents(1, F, seed=1), 0.5, text(), [8, 9], cache, (0, 4, 5, 6, 7))
    assert v.dtype == torch.float32
    assert (v - exact).norm() / exact.norm() < 0.03


# --- The cache ---


@torch.no_grad()
def test_velocity_leaves_the_cache_as_it_was(model):
    cache, _ = filled(model, 4)
    before, slots = pages(cache), dict(cache.slots)
    model.velocity(latents(1, F, seed=1), 0.5, text(), [8, 9], cache, (0, 4, 5, 6, 7))
    assert all(torch.equal(a, b) for a, b in zip(before, pages(cache))) and cache.slots == slots
    assert cache.resident == list(range(8))


@torch.no_grad()
def test_a_fork_shares_its_parents_pages(model):
    parent, _ = filled(model, 5, capacity=16)
    before, addresses = pages(parent), [t.data_ptr() for t in (*parent.k, *parent.v)]
    fork = parent.fork(7, 4)
    page = parent.nbytes // 16
    assert fork.nbytes == 7 * 4 * page, "a fork pays for its own frames only"
    (source,) = fork.sources(fork.find((0, 8, 9), 7), 0)
    assert source.k.data_ptr() == parent.k[0].data_ptr()
    model.commit(latents(7, F, seed=3), text(), [10, 11], fork, (0, 8, 9))
    assert all(torch.equal(a, b) for a, b in zip(before, pages(parent)))
    assert addresses == [t.data_ptr() for t in (*parent.k, *parent.v)]
    assert fork.resident == list(range(12)) and parent.resident == list(range(10))


@torch.no_grad()
def test_a_forked_parent_refuses_writes(model):
    parent, _ = filled(model, 2)
    parent.fork(2, 4)
    with pytest.raises(
        RuntimeError, match=r"frames \[4, 5\] can not be written: this cache has been forked"
    ):
        model.commit(latents(1, F), text(), [4, 5], parent)


def test_only_a_cache_of_one_row_can_branch_out(model):
    cache = model.new_cache(4, H, W, rows=3)
    with pytest.raises(ValueError, match="3 rows can be forked into 3 rows, not 2"):
        cache.fork(2, 4)
    assert cache.fork(3, 4).rows == 3


@pytest.mark.parametrize(
    ("capacity", "sink", "blocks", "resident"),
    [
        (8, 2, 3, [0, 1, 2, 3, 4, 5]),
        (8, 2, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 2, 5, [0, 1, 4, 5, 6, 7, 8, 9]),
        (8, 2, 7, [0, 1, 8, 9, 10, 11, 12, 13]),
        (8, 0, 5, [2, 3, 4, 5, 6, 7, 8, 9]),
        (5, 1, 4, [0, 4, 5, 6, 7]),
        (4, 3, 3, None),
    ],
)
def test_eviction(capacity, sink, blocks, resident):
    """The oldest go first, the sink never."""
    cache = FrameCache(1, capacity, 1, 1, 2, sink=sink)
    for b in range(blocks - (resident is None)):
        cache.reserve([2 * b, 2 * b + 1])
    if resident is None:
        with pytest.raises(ValueError, match=r"no page for frames \[4, 5\].*enlarge the cache"):
            cache.reserve([4, 5])
    else:
        assert cache.resident == resident
        assert len(set(cache.slots.values())) == len(resident)


def test_a_frame_written_again_keeps_its_page():
    cache = FrameCache(1, 8, 1, 1, 2)
    assert torch.equal(cache.reserve([0, 1, 2]), cache.reserve([0, 1, 2]))
    assert cache.reserve([1, 5]).tolist() == [1, 3]


def test_a_frame_that_is_not_there_is_named():
    cache = FrameCache(1, 4, 1, 1, 2)
    cache.reserve([0, 1])
    with pytest.raises(KeyError, match="frame 3 is not in the cache, which holds "):
        cache.find((0, 3), 1)


def test_a_frame_that_a_fork_rewrote_and_evicted_is_gone():
    """The parent's page of it holds the keys of before: reading them instead would be silent and
    wrong."""
    parent = FrameCache(1, 4, 1, 1, 2)
    parent.reserve([0, 1, 2])
    fork = parent.fork(1, 2)
    fork.reserve([2])
    fork.reserve([3, 4])
    assert fork.resident == [0, 1, 3, 4]
    with pytest.raises(KeyError, match="frame 2 is not in the cache"):
        fork.find((2,), 1)


def test_some_rows_alone_can_not_open_a_page():
    """The other rows would read whatever the page held before, in a fork instead of the parent's
    frame."""
    parent = FrameCache(1, 4, 1, 1, 2)
    parent.reserve([0, 1])
    fork = parent.fork(3, 4)
    with pytest.raises(
        ValueError, match=r"frames \[1\] have no page.*rows \[0, 2\] of 3 can not be written alone"
    ):
        fork.reserve([1], rows=[0, 2])
    fork.reserve([1])
    fork.reserve([1], rows=[0, 2])


@torch.no_grad()
def test_a_cache_of_one_row_serves_every_row_of_a_pass(model):
    """Also where its pages lie in two caches; once, the rows after the first read uninitialised
    memory."""
    parent, _ = filled(model, 3)
    fork = parent.fork(1, 4)
    model.commit(latents(1, F, seed=3), text(), [6, 7], fork, (0, 4, 5))
    x = latents(3, F, seed=4)
    together = model.velocity(x, 0.5, text(), [8, 9], fork, (0, 4, 5, 6, 7))
    apart = torch.cat(
        [model.velocity(row[None], 0.5, text(), [8, 9], fork, (0, 4, 5, 6, 7)) for row in x]
    )
    torch.testing.assert_close(together, apart, **CLOSE)


@pytest.mark.parametrize(
    ("past", "rows"),
    [((0, 1), None), ([(0, 1), (0, 1)], None), ((0, 1), [0, 1]), ([(0, 1)] * 2, [0, 1, 2, 0])],
)
def test_rows_that_do_not_match_are_refused(model, past, rows):
    cache, _ = filled(model, 1, rows=3)
    with pytest.raises(ValueError, match="4 query rows with"):
        model.velocity(latents(4, F), 0.5, text(), [2, 3], cache, past, rows)


def test_rows_must_read_equally_many_frames(model):
    cache, _ = filled(model, 2, rows=2)
    with pytest.raises(ValueError, match=r"equally many frames, not \[1, 2\]"):
        model.velocity(latents(2, F), 0.5, text(), [4, 5], cache, [(0,), (0, 1)])


def test_prompts_must_share_out_evenly(model):
    with pytest.raises(ValueError, match="3 rows can not be shared out evenly over 2 prompts"):
        model.velocity(latents(3, F), 0.5, text(2), [0, 1])


def test_positions_end_where_the_tables_end(model):
    with pytest.raises(ValueError, match="frame 1024 has no rotary position"):
        model.velocity(latents(1, F), 0.5, text(), [1023, 1024])


# --- Rows are independent ---


@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(model):
    """Other frames, histories, noise levels, cache rows and prompts in every row of one pass."""
    cache, _ = filled(model, 4, rows=3, prompt=text(3))
    x, prompts = latents(4, F, seed=2), text(4, seed=9)
    frames = [[8, 9], [6, 7], [8, 9], [4, 5]]
    past = [(0, 5, 7), (0, 4, 5), (0, 1, 2), (0, 2, 3)]
    rows = [2, 0, 0, 1]
    sigma = torch.tensor([1.0, 0.9375, 0.625, 0.2])
    together = model.velocity(x, sigma, prompts, frames, cache, past, rows)
    for i in range(4):
        alone = model.velocity(
            x[i : i + 1],
            sigma[i : i + 1],
            prompts[i : i + 1],
            frames[i],
            cache,
            past[i],
            rows[i : i + 1],
        )
        torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)


@torch.no_grad()
def test_rows_that_share_a_prompt_stand_together(model):
    x, prompts = latents(4, F), text(2)
    folded = model.velocity(x, 0.5, prompts, [0, 1])
    torch.testing.assert_close(
        folded, model.velocity(x, 0.5, prompts.repeat_interleave(2, 0), [0, 1]), **CLOSE
    )


SCRIPTS = (
    story(7, 4, id="a"),
    story(7, 2, 5, id="b"),
    story(7, id="c"),
    story(7, 4, texts=(SMALL, RED), id="d"),
)


@pytest.mark.parametrize("window", [7, -1])
def test_a_switch_in_some_rows_is_each_row_alone(pipeline, window):
    pipeline = with_geometry(pipeline, window=window)
    together = new_stream(pipeline, *SCRIPTS)
    blocks = torch.cat([together.advance() for _ in range(7)], dim=1)
    for i, script in enumerate(SCRIPTS):
        alone = new_stream(pipeline, script)
        torch.testing.assert_close(
            blocks[i : i + 1], torch.cat([alone.advance() for _ in range(7)], dim=1), **CLOSE
        )


def test_a_switch_changes_what_follows(pipeline):
    plain = new_stream(pipeline, story(5, id="s"))
    switched = new_stream(pipeline, story(5, 4, id="s"))
    a, b = (torch.cat([s.advance() for _ in range(5)], dim=1) for s in (plain, switched))
    assert torch.equal(a[:, :8], b[:, :8]) and (a[:, 8:] - b[:, 8:]).abs().max() > 1e-2


def test_the_smallest_cache_streams_like_a_large_one(pipeline):
    """A switch re-encodes a whole window beside the sink: a cache of one window had no page for
    it, and evaluation of any late switch crashed."""
    for script in (story(9, 4, 7), story(9, 1, 2), story(9, 8)):
        small, large = (
            new_stream(pipeline, script, capacity=c) for c in (pipeline.geometry.resident(9), 40)
        )
        for _ in range(9):
            assert torch.equal(small.advance(), large.advance())


def test_switching_twice_at_a_block_is_once(pipeline):
    once, twice = new_stream(pipeline, story(4, 3)), new_stream(pipeline, story(4, 3))
    for stream in (once, twice):
        for _ in range(3):
            stream.advance()
    twice.switch()
    before = pages(twice.cache)
    twice.switch()
    assert all(torch.equal(a, b) for a, b in zip(before, pages(twice.cache)))
    assert torch.equal(once.advance(), twice.advance())


# --- Histories ---


@pytest.mark.parametrize(("sink", "size"), [(1, 7), (3, 12), (2, 6), (3, 5), (0, 4), (1, -1)])
def test_sink_window(sink, size):
    for block in range(12):
        frames = SinkWindow(sink, size).past(block * F, F)
        assert set(frames) == deployed(block * F, sink, size) - {block * F, block * F + 1}
        assert list(frames) == sorted(set(frames))


def test_routed_by_hand():
    """The routed frames stay, the nearest moves on; the anchor and all blocks outside the window
    read the rolling window."""
    history = Routed(
        SinkWindow(1, 7), (BranchPlan(frames=(2, 3, 5)), BranchPlan()), Window(4, 2), block=2
    )
    assert history.past(6, 2) == (0, 2, 3, 4, 5)
    assert history.past(8, 2) == [(0, 2, 3, 5, 7), (0, 4, 5, 6, 7)]
    assert history.past(10, 2) == [(0, 2, 3, 5, 9), (0, 6, 7, 8, 9)]
    assert history.past(12, 2) == (0, 8, 9, 10, 11)
    with pytest.raises(
        ValueError, match=r"4 routed frames \[1, 2, 3, 4\] and 1 of sink and memory leave 0 of 5"
    ):
        Routed(SinkWindow(1, 7), (BranchPlan(frames=(1, 2, 3, 4)),), Window(4, 2), block=2).past(
            8, 2
        )


# --- Gradients ---


def gradients(model: CausalWan, cache: FrameCache) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    v = model.velocity(latents(2, F, seed=1), 0.5, text(), [8, 9], cache, (0, 4, 5, 6, 7))
    return torch.autograd.grad(v.square().mean(), parameters)


def test_gradient_checkpointing_changes_nothing():
    model = CausalWan(new_transformer().requires_grad_(True))
    cache, _ = filled(model, 4)
    plain = gradients(model, cache)
    model.transformer.enable_gradient_checkpointing()
    recomputed = gradients(model, cache)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))
    assert any(g.any() for g in plain)


def test_lora_reaches_the_keys_and_values_of_the_text():
    """In the public code 60 of 300 LoRA modules, the cross-attention's keys and values, get no
    gradient."""
    model = CausalWan(new_transformer())
    model.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=ADAPTER_TARGETS, init_lora_weights=False)
    )
    cache, _ = filled(model, 4)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    dead = [n for n, g in zip(names, gradients(model, cache)) if not g.any()]
    assert len(names) == 2 * 10 * 2 and not dead
    assert sum("attn2.to_k" in n or "attn2.to_v" in n for n in names) == 8


def test_no_gradient_flows_into_the_past(model):
    cache, _ = filled(model, 3)
    assert not any(t.requires_grad for t in (*cache.k, *cache.v))
    x = latents(1, F, seed=1).requires_grad_(True)
    assert not model.commit(x, text(), [6, 7], cache, (0, 4, 5)).requires_grad


def test_calls_are_counted():
    model = new_pipeline().generator
    cache, _ = filled(model, 3)
    model.velocity(latents(1, F), 0.5, text(), [6, 7], cache, (0,))
    assert model.calls == 4


# --- Decoding ---


def full_decode(pipeline, latents_NCHW: torch.Tensor) -> torch.Tensor:
    """diffusers' own decoding of a whole video, uint8 [T, 3, H, W]; of two rows, because torch
    sums one row in another order."""
    mean, std = (
        torch.tensor(v).view(-1, 1, 1)
        for v in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    z = (latents_NCHW * std + mean).transpose(0, 1).expand(2, -1, -1, -1, -1)
    return ((pipeline.vae.decode(z).sample[0].transpose(0, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def test_streamed_decode_is_full_decode(pipeline):
    z = latents(1, 7)
    expected = full_decode(pipeline, z[0])
    for cuts in ([7], [2, 2, 3], [1, 5, 1]):
        decoder = pipeline.decoder()
        pixels = torch.cat([decoder(part) for part in z.split(cuts, dim=1)], dim=1)
        assert torch.equal(pixels[0], expected), cuts
    assert len(expected) == pipeline.geometry.pixel_frames(7) == 25
    assert expected.float().std() > 5.0


@torch.no_grad()
def test_forked_decode_is_continued_decode(pipeline):
    prefix, futures = latents(1, 3), latents(4, 3, seed=1)
    base = pipeline.decoder()
    base(prefix)
    forked = base.fork(4)(futures)
    for row in range(4):
        straight = pipeline.decoder()(torch.cat((prefix, futures[row : row + 1]), dim=1))[:, 9:]
        # Convolutions over a batch may be summed in another order: a pixel on the edge of rounding
        # may differ by 1.
        assert (forked[row].int() - straight[0].int()).abs().max() <= 1
    assert torch.equal(
        base(futures[:1]), pipeline.decoder()(torch.cat((prefix, futures[:1]), dim=1))[:, 9:]
    ), "a fork must leave its parent as it was"


@torch.no_grad()
def test_forks_of_several_streams_go_on_each_from_its_own(pipeline):
    """For a while a fork continued every stream from the first one's state."""
    base, futures = pipeline.decoder(), latents(2, 2, seed=1)
    base(latents(2, 3))
    assert torch.equal(base.fork(2)(futures), base(futures))


# --- Text ---


def test_text_is_zero_after_the_prompt(pipeline):
    """The network reads the padding unmasked: anything but zeros there would be read as words."""
    short, long = pipeline.encode_text(["a circle", SMALL])
    assert short.shape == (24, TEXT_DIM)
    lengths = [int(t.any(dim=1).sum()) for t in (short, long)]
    assert lengths == [3, len(SMALL.split()) + 1], "words and the end mark"
    assert not short[3:].any() and not long[lengths[1] :].any()


def test_a_prompt_always_reads_the_same(pipeline):
    alone, beside = pipeline.encode_text([RED])[0], pipeline.encode_text([SMALL, RED, BLUE])[1]
    assert torch.equal(alone, beside)
    assert embed(pipeline, story())[RED].equal(alone)
