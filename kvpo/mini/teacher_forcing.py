"""Stage 2 of pretraining: causal flow matching with teacher forcing, every block in its deployment's context.

One flat sequence holds clean blocks (network time 0) and noisy blocks (a noise level each); every block reads a
short list of clean frames and itself, exactly as the streaming generator reads its cache.  The list is gathered,
not masked: 12 frames of keys a block instead of the whole sequence (a third of the attention's arithmetic).

A crop is a few blocks of a story, its *sources*.  A *slot* is one block of the flat sequence: a source, clean or
noisy, under the prompt of some source.  So a frame that the deployment encodes twice (at a prompt switch the
window's past is encoded again under the new prompt) simply has two slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional

from kvpo.flow import TIME_SCALE, add_noise, velocity_of, warp, warped_sigmas
from kvpo.generators.rope import Angles, frame_angles, rotate
from kvpo.mini.library import Library
from kvpo.mini.networks import BLOCK, SINK, STEPS, WINDOW, encode_text
from kvpo.rng import stream

PAST = WINDOW - BLOCK
"""Past frames a block reads at most: the sink and 6 more."""
SLOTS = 15
"""Blocks of a flat sequence; one number for all layouts, so that one compiled graph serves them."""
ROUTED_SOURCES = 2
"""Far blocks that a routed layout adds to its stretch."""


@dataclass(frozen=True)
class Slot:
    source: int
    """Which block of the crop."""
    noisy: bool
    prompt: int
    """The source whose prompt it is encoded under."""
    reads: tuple[int, ...]
    """Past frames it attends to, as frame positions of the flat sequence (slot i holds 3 i, 3 i + 1, 3 i + 2)."""


@dataclass(frozen=True)
class Layout:
    """A flat sequence.  ``kind``: opening (sources are blocks 0, 1, ... of a story), later (source 0 is the story's
    block 0, its sink; the others a stretch further on), routed (as later, then far blocks between the two) or stream
    (an opening, every block noisy once; for stages 3 and 4).
    ``switch``: the position in the stretch at which the prompt changes, None = nowhere."""

    kind: str
    switch: int | None
    slots: tuple[Slot, ...]

    @property
    def sources(self) -> int:
        return 1 + max(slot.source for slot in self.slots)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames whose keys each slot reads, [slots, 12] (past, padding, itself), and which of them count, bool."""
        index = torch.zeros(len(self.slots), WINDOW, dtype=torch.long)
        real = torch.zeros(len(self.slots), WINDOW, dtype=torch.bool)
        for i, slot in enumerate(self.slots):
            index[i, : len(slot.reads)] = torch.tensor(slot.reads, dtype=torch.long)
            index[i, PAST:] = torch.arange(BLOCK * i, BLOCK * (i + 1))
            real[i, : len(slot.reads)], real[i, PAST:] = True, True
        return index, real

    def frames(self) -> torch.Tensor:
        """Frame of the crop behind every frame of the sequence, [3 slots]."""
        return torch.tensor([BLOCK * slot.source + f for slot in self.slots for f in range(BLOCK)])


def _stretch(kind: str) -> list[int]:
    """Sources of the consecutive blocks, in time order."""
    return {"opening": list(range(6)), "stream": list(range(6)), "later": list(range(1, 8)), "routed": list(range(1, 7))}[kind]


class _Builder:
    """Adds slots in time order; remembers under which slot each source's frames are read."""

    def __init__(self, kind: str, switch: int | None, generator: torch.Generator | None):
        self.kind, self.switch, self.generator = kind, switch, generator
        self.stretch = _stretch(kind)
        self.slots: list[Slot] = []
        self.clean: dict[int, int] = {}
        self.sink: tuple[int, ...] = ()
        self.far: tuple[int, ...] = ()

    def add(self, source: int, noisy: bool, reads: tuple[int, ...], prompt: int | None = None) -> int:
        self.slots.append(Slot(source, noisy, source if prompt is None else prompt, reads))
        return len(self.slots) - 1

    def past(self, position: int) -> tuple[int, ...]:
        """All readable frames of the stretch before ``position``, oldest first, the sink left out."""
        before = [s for s in self.stretch[:position] if s != 0]
        return tuple(f for s in before for f in frames_of(self.clean[s]))

    def history(self, position: int) -> tuple[int, ...]:
        past = self.past(position)
        if self.kind != "routed" or position < 2:
            return self.sink + past[-(PAST - SINK) :]
        nearest = int(torch.randint(1, 5, (), generator=self.generator))
        pool = self.far + past[:-nearest]
        drawn = torch.randperm(len(pool), generator=self.generator)[: PAST - SINK - nearest].sort().values
        return self.sink + tuple(pool[int(i)] for i in drawn) + past[-nearest:]

    def encode_again(self, position: int) -> None:
        """The switch: the window's past, but not the sink, is encoded once more in one pass under the new prompt.

        In that pass all frames see the sink and the latest 9 of themselves, later ones included.  (Older frames of
        the pass, which only a route could read later, keep their first encoding here.)
        """
        again = [s for s in self.stretch[max(0, position - (WINDOW - SINK) // BLOCK) : position] if s != 0]
        self.clean |= {source: len(self.slots) + i for i, source in enumerate(again)}
        for source in again:
            others = tuple(f for s in again if s != source for f in frames_of(self.clean[s]))
            self.add(source, False, self.sink + others, prompt=self.stretch[position])

    def build(self) -> Layout:
        if self.stretch[0] != 0:
            self.sink = frames_of(self.add(0, False, ()))
        if self.kind == "routed":
            far = range(len(self.stretch) + 1, len(self.stretch) + 1 + ROUTED_SOURCES)
            self.far = tuple(f for s in far for f in frames_of(self.add(s, False, self.sink)))
        reads = {}
        for position, source in enumerate(self.stretch):
            if position == self.switch:
                self.encode_again(position)
            reads[source] = self.history(position)
            if position < len(self.stretch) - 1:
                self.clean[source] = self.add(source, False, reads[source])
            if source == 0:
                self.sink = frames_of(self.clean[0])
        # Blocks 0 and 1 of a later stretch have no full past of their own: context only.
        noisy = self.stretch if self.stretch[0] == 0 else self.stretch[2:]
        spare = noisy if self.stretch[0] == 0 else noisy[::-1]  # the opening block is the hardest: it gets a second noise level first
        count = len(noisy) if self.kind == "stream" else SLOTS - len(self.slots)
        for source in [*noisy, *spare][:count]:
            self.add(source, True, reads[source])
        return Layout(self.kind, self.switch, tuple(self.slots))


def frames_of(slot: int) -> tuple[int, ...]:
    return tuple(range(BLOCK * slot, BLOCK * (slot + 1)))


def layout(kind: str, switch: int | None, generator: torch.Generator | None = None) -> Layout:
    """``generator`` draws the routes of a routed layout."""
    return _Builder(kind, switch, generator).build()


def draw_layout(generator: torch.Generator) -> Layout:
    """3 in 10 openings, 1 in 5 routed; a switch in half of them, after position 2 at the earliest."""
    kind = ("opening",) * 3 + ("later",) * 5 + ("routed",) * 2
    kind = kind[int(torch.randint(10, (), generator=generator))]
    at = int(torch.randint(2, 2 * len(_stretch(kind)) - 2, (), generator=generator))
    return layout(kind, at if at < len(_stretch(kind)) else None, generator)


@dataclass(frozen=True)
class Crops:
    """Rows of a batch, cut for one layout.  K sources of 3 frames."""

    latents: torch.Tensor
    """x0_BNCHW, N = 3 K."""
    weight: torch.Tensor
    """[B, N, 1, H, W]: the object's cells count more."""
    ids: torch.Tensor
    """Tokens of every source's prompt [B, K, L]."""
    frames: torch.Tensor
    """Absolute frame ids [B, N]."""

    def to(self, device) -> "Crops":
        return Crops(*(x.to(device) for x in (self.latents, self.weight, self.ids, self.frames)))


def cut(library: Library, plan: Layout, batch: int, generator: torch.Generator) -> Crops:
    """A batch of crops whose prompts switch where ``plan`` says and nowhere else."""
    rows = []
    for _ in range(batch):
        story, first = library.draw(plan.kind, len(_stretch(plan.kind)), plan.switch, generator)
        blocks = list(range(first, first + len(_stretch(plan.kind))))
        if plan.kind != "opening":
            blocks = [0, *blocks]
        if plan.kind == "routed":
            blocks += (1 + torch.randperm(first - 1, generator=generator)[:ROUTED_SOURCES].sort().values).tolist()
        rows.append((*library.cut(story, blocks), _frame_ids(plan, blocks, generator)))
    return Crops(*(torch.stack(column) for column in zip(*rows)))


def _frame_ids(plan: Layout, blocks: list[int], generator: torch.Generator) -> torch.Tensor:
    """True frame ids; half of the later crops pretend that more time has passed since the sink, up to frame 400."""
    ids = torch.tensor([BLOCK * b + f for b in blocks for f in range(BLOCK)])
    if plan.kind != "opening" and bool(torch.rand((), generator=generator) < 0.6):
        shift = BLOCK * int(120 * torch.rand((), generator=generator) ** 2)
        far = BLOCK * int(torch.randint(shift // BLOCK + 1, (), generator=generator))
        ids[BLOCK : BLOCK * (1 + len(_stretch(plan.kind)))] += shift
        ids[BLOCK * (1 + len(_stretch(plan.kind))) :] += far
    return ids


def draw_sigmas(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Half of them the sampler's four, half uniform before the warp."""
    few = torch.tensor(warped_sigmas(STEPS))[torch.randint(STEPS, shape, generator=generator)]
    s = torch.rand(shape, generator=generator).clamp(min=0.004)
    any_level = 5.0 * s / (1.0 + 4.0 * s)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, few, any_level)


@dataclass(frozen=True)
class FlatView:
    """What the attention of a flat sequence needs; the stock block hands it through as ``rotary_emb``."""

    batch: int
    angles: Angles
    pick: torch.Tensor
    """One-hot gather [slots * 12, N]: as a matrix, its backward is a product too (index_add is slow on a CPU)."""
    bias: torch.Tensor
    """0 or -inf for the padded keys, [B * slots, 1, 1, 12 T]."""


class FlatSelfAttention:
    """Every block of 3 frames attends to its 12 gathered frames."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn, hidden, _encoder, _mask, view: FlatView):
        flat = hidden.reshape(view.batch, -1, hidden.shape[-1])
        q, k, v = (norm(project(flat)) for norm, project in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k), (_same, attn.to_v)))
        q, k, v = (x.to(v.dtype).unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = rotate(q, view.angles), rotate(k, view.angles)
        tokens, slots = hidden.shape[1], view.bias.shape[0] // view.batch
        q = q.reshape(view.batch * slots, BLOCK * tokens, attn.heads, -1)
        k, v = (gathered(x, view.pick, tokens).reshape(view.batch * slots, WINDOW * tokens, attn.heads, -1) for x in (k, v))
        return attn.to_out[1](attn.to_out[0](attend(q, k, v, view.bias).reshape(hidden.shape)))


class FlatCrossAttention:
    """The text has one row per slot, [B * slots, L, D]; the slot's three frames fold onto it."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn, hidden, text, _mask, _view):
        q = attn.norm_q(attn.to_q(hidden.reshape(text.shape[0], -1, hidden.shape[-1])))
        k, v = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.to(v.dtype).unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return attn.to_out[1](attn.to_out[0](attend(q, k, v).reshape(hidden.shape)))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention of [R, L, H, D], written out: at these sizes the CPU's fused backward takes half of a training step."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores.float() if bias is None else scores.float() + bias).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _same(x):
    return x


def gathered(x: torch.Tensor, pick: torch.Tensor, tokens: int) -> torch.Tensor:
    """Frames of x [B, N T, H, D] in the order of ``pick``: [B, slots * 12, T H D]."""
    frames = x.unflatten(1, (-1, tokens)).flatten(2)
    return pick.to(x.dtype) @ frames


def use_flat_attention(transformer: WanTransformer3DModel) -> None:
    for block in transformer.blocks:
        block.attn1.set_processor(FlatSelfAttention())
        block.attn2.set_processor(FlatCrossAttention())


def flat_velocity(transformer: WanTransformer3DModel, plan: Layout, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """v_BNCHW of a flat sequence.

    x [B, N, C, H, W] with N = 3 slots;  sigma [B, slots], 0 = clean;  text [B, slots, L, D];  frames [B, N] absolute ids.
    """
    m, (b, n, _, height, width) = transformer, x.shape
    grid = height // m.config.patch_size[1], width // m.config.patch_size[2]
    hidden = m.patch_embedding(x.flatten(0, 1).unsqueeze(2)).flatten(2).transpose(1, 2).float()
    time = (TIME_SCALE * sigma).repeat_interleave(BLOCK, 1).flatten()
    temb, modulation, text, _ = m.condition_embedder(time, text.flatten(0, 1))
    modulation = modulation.unflatten(1, (6, -1))
    view = FlatView(b, frame_angles(m.rope, frames, grid), *gather_tables(plan, b, grid[0] * grid[1], x.device))
    for block in m.blocks:
        hidden = block(hidden, text, modulation, view)
    shift, scale = (m.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
    out = m.proj_out((m.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)).float()
    out = out.unflatten(2, (*m.config.patch_size[1:], -1)).unflatten(1, grid)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def gather_tables(plan: Layout, batch: int, tokens: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    index, real = plan.keys()
    pick = functional.one_hot(index.flatten(), BLOCK * len(plan.slots)).float()
    bias = torch.where(real, 0.0, float("-inf")).repeat_interleave(tokens, 1)[:, None, None, :]
    return pick.to(device), bias.repeat(batch, 1, 1, 1).to(device)


def slot_text(encoder, plan: Layout, ids: torch.Tensor) -> torch.Tensor:
    """Encoded prompts of every slot [B, slots, L, D] from tokens [B, K, L]."""
    rows = encode_text(encoder, ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
    return rows[:, torch.tensor([slot.prompt for slot in plan.slots])]


def flow_error(v: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean squared error with the object's cells weighted up."""
    return (weight * (v - target).square()).sum() / (weight.sum() * v.shape[2])


CONTEXT_NOISE = 0.1
"""Clean context carries noise up to this deviation and is told time 0: what streams has small errors too."""


def teacher_forcing_loss(transformer, encoder, library: Library, seed: int, batch: int, device="cpu"):
    """loss(step) of stage 2."""

    def loss(step: int):
        g = stream(seed, "teacher-forcing", step)
        plan = draw_layout(g)
        crops = cut(library, plan, batch, g).to(device)
        at, noisy = plan.frames(), torch.tensor([slot.noisy for slot in plan.slots])
        x0, weight = crops.latents[:, at], crops.weight[:, at]
        eps = torch.randn(x0.shape, generator=g).to(device)
        sigma = torch.where(noisy, draw_sigmas((batch, len(plan.slots)), g), 0.0).to(device)
        dirt = torch.where(noisy, 0.0, CONTEXT_NOISE * torch.rand(batch, len(plan.slots), generator=g)).to(device)
        level, grain = (s.repeat_interleave(BLOCK, 1)[:, :, None, None, None] for s in (sigma, dirt))
        x = add_noise(x0, eps, level) + grain * eps
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = flat_velocity(transformer, plan, x, sigma, slot_text(encoder, plan, crops.ids), crops.frames[:, at])
        chosen = noisy.repeat_interleave(BLOCK)
        error = flow_error(v[:, chosen], velocity_of(x0, eps)[:, chosen], weight[:, chosen])
        return error, {"kind": plan.kind, "switch": plan.switch is not None}

    return loss
