"""The transformer over flat sequences, and the error of a lesson.

Many blocks go through at once, each in its deployment's context.

The past of a block is gathered, not masked: 12 frames of keys a block instead of the whole sequence
(a third of the attention's arithmetic).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional

from kvpo.generators.flow import TIME_SCALE
from kvpo.generators.rope import Angles, frame_angles, rotate
from kvpo.mini.pretraining.layouts import Layout
from kvpo.mini.pretraining.networks import BLOCK, WINDOW, encode_text


@dataclass(frozen=True)
class FlatView:
    """Input of a flat sequence's attention; the stock block hands it through as ``rotary_emb``."""

    batch: int
    angles: Angles
    pick: torch.Tensor
    """One-hot gather [slots * 12, N].

    As a matrix, its backward is a product too (index_add is slow on a CPU).
    """
    bias: torch.Tensor
    """0 or -inf for the padded keys, [B * slots, 1, 1, 12 T]."""


class FlatSelfAttention:
    """Every block of 3 frames attends to its 12 gathered frames."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn, hidden, _encoder, _mask, view: FlatView):
        flat = hidden.reshape(view.batch, -1, hidden.shape[-1])
        q, k, v = (
            norm(project(flat))
            for norm, project in (
                (attn.norm_q, attn.to_q),
                (attn.norm_k, attn.to_k),
                (_same, attn.to_v),
            )
        )
        q, k, v = (x.to(v.dtype).unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = rotate(q, view.angles), rotate(k, view.angles)
        tokens, slots = hidden.shape[1], view.bias.shape[0] // view.batch
        q = q.reshape(view.batch * slots, BLOCK * tokens, attn.heads, -1)
        k, v = (
            gathered(x, view.pick, tokens).reshape(
                view.batch * slots, WINDOW * tokens, attn.heads, -1
            )
            for x in (k, v)
        )
        return attn.to_out[1](attn.to_out[0](attend(q, k, v, view.bias).reshape(hidden.shape)))


class FlatCrossAttention:
    """The text has one row per slot, [B * slots, L, D]; the slot's three frames fold onto it."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn, hidden, text, _mask, _view):
        q = attn.norm_q(attn.to_q(hidden.reshape(text.shape[0], -1, hidden.shape[-1])))
        k, v = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.to(v.dtype).unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return attn.to_out[1](attn.to_out[0](attend(q, k, v).reshape(hidden.shape)))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention of [R, L, H, D], written out.

    At these sizes the CPU's fused backward takes half of a training step.
    """
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


def flat_velocity(
    transformer: WanTransformer3DModel,
    plan: Layout,
    x: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    frames: torch.Tensor,
) -> torch.Tensor:
    """v_BNCHW of a flat sequence.

    x [B, N, C, H, W] with N = 3 slots;  sigma [B, slots], 0 = clean;  text [B, slots, L, D];  frames [B, N] absolute ids.
    """
    m, (b, _, _, height, width) = transformer, x.shape
    grid = height // m.config.patch_size[1], width // m.config.patch_size[2]
    hidden = m.patch_embedding(x.flatten(0, 1).unsqueeze(2)).flatten(2).transpose(1, 2).float()
    time = (TIME_SCALE * sigma).repeat_interleave(BLOCK, 1).flatten()
    temb, modulation, text, _ = m.condition_embedder(time, text.flatten(0, 1))
    modulation = modulation.unflatten(1, (6, -1))
    view = FlatView(
        b, frame_angles(m.rope, frames, grid), *gather_tables(plan, b, grid[0] * grid[1], x.device)
    )
    for block in m.blocks:
        hidden = block(hidden, text, modulation, view)
    shift, scale = (m.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
    out = m.proj_out((m.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)).float()
    out = out.unflatten(2, (*m.config.patch_size[1:], -1)).unflatten(1, grid)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def gather_tables(
    plan: Layout, batch: int, tokens: int, device
) -> tuple[torch.Tensor, torch.Tensor]:
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


@dataclass(frozen=True)
class Lesson:
    """A flat sequence of B rows and N = 3 slots frames, and the answers of its noisy slots.

    The noisy slots stand last.
    """

    plan: Layout
    x: torch.Tensor
    """x_BNCHW."""
    sigma: torch.Tensor
    """Noise level per slot [B, slots], 0 = clean."""
    text: torch.Tensor
    """[B, slots, L, D]."""
    frames: torch.Tensor
    """Absolute frame ids [B, N]."""
    target: torch.Tensor
    """v_BMCHW of the last M frames."""
    weight: torch.Tensor
    """[B, M, 1, H, W]."""


def lesson_error(transformer: WanTransformer3DModel, lesson: Lesson) -> torch.Tensor:
    with torch.autocast(lesson.x.device.type, torch.bfloat16):
        v = flat_velocity(
            transformer, lesson.plan, lesson.x, lesson.sigma, lesson.text, lesson.frames
        )
    return flow_error(v[:, -lesson.target.shape[1] :], lesson.target, lesson.weight)
