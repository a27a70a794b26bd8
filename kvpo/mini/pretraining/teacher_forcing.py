"""Stage 2 of pretraining: causal flow matching with teacher forcing.

Every block is trained in its deployment's context.

Two kinds of lessons: crops of true stories, and opening blocks
(``kvpo.mini.pretraining.openings``). The stories have habits (``kvpo.mini.habits``), so a block
after the first has few true answers, which the generator learns all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpo.common.rng import stream
from kvpo.generators.flow import add_noise, velocity_of, warped_sigmas
from kvpo.mini.pretraining.flat import Lesson, lesson_error, slot_text
from kvpo.mini.pretraining.layouts import ROUTED_SOURCES, Layout, draw_layout, stretch
from kvpo.mini.pretraining.library import Library
from kvpo.mini.pretraining.networks import BLOCK, STEPS
from kvpo.mini.pretraining.openings import Openings, opening_lesson

OPENINGS = 6
"""Steps of which one teaches openings."""
CONTEXT_NOISE = 0.35
"""Largest deviation of the noise on clean context, which is told time 0.

A stream reads its own errors; a generator that has met nothing but true pasts takes them for what
was meant, and objects fade from block to block. What their errors are, nothing teaches.
"""


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

    def to(self, device) -> Crops:
        return Crops(*(x.to(device) for x in (self.latents, self.weight, self.ids, self.frames)))


def cut(library: Library, plan: Layout, batch: int, generator: torch.Generator) -> Crops:
    """A batch of crops whose prompts switch where ``plan`` says and nowhere else."""
    rows = []
    for _ in range(batch):
        story, first = library.draw(plan.kind, len(stretch(plan.kind)), plan.switch, generator)
        blocks = list(range(first, first + len(stretch(plan.kind))))
        if plan.kind != "opening":
            blocks = [0, *blocks]
        if plan.kind == "routed":
            blocks += (
                1 + torch.randperm(first - 1, generator=generator)[:ROUTED_SOURCES].sort().values
            ).tolist()
        rows.append((*library.cut(story, blocks), _frame_ids(plan, blocks, generator)))
    return Crops(*(torch.stack(column) for column in zip(*rows)))


def _frame_ids(plan: Layout, blocks: list[int], generator: torch.Generator) -> torch.Tensor:
    """True frame ids, or later ones.

    Half of the later crops pretend that more time has passed since the sink, up to frame 400.
    """
    ids = torch.tensor([BLOCK * b + f for b in blocks for f in range(BLOCK)])
    if plan.kind != "opening" and bool(torch.rand((), generator=generator) < 0.6):
        shift = BLOCK * int(120 * torch.rand((), generator=generator) ** 2)
        far = BLOCK * int(torch.randint(shift // BLOCK + 1, (), generator=generator))
        ids[BLOCK : BLOCK * (1 + len(stretch(plan.kind)))] += shift
        ids[BLOCK * (1 + len(stretch(plan.kind))) :] += far
    return ids


def draw_sigmas(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels: half of them the sampler's four, half uniform before the warp."""
    few = torch.tensor(warped_sigmas(STEPS))[torch.randint(STEPS, shape, generator=generator)]
    s = torch.rand(shape, generator=generator).clamp(min=0.004)
    any_level = 5.0 * s / (1.0 + 4.0 * s)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, few, any_level)


def crop_lesson(
    encoder, library: Library, batch: int, generator: torch.Generator, device
) -> Lesson:
    """Blocks of true stories, noised, after their true pasts."""
    plan = draw_layout(generator)
    crops = cut(library, plan, batch, generator).to(device)
    at, noisy = plan.frames(), torch.tensor([slot.noisy for slot in plan.slots])
    x0 = crops.latents[:, at]
    eps = torch.randn(x0.shape, generator=generator).to(device)
    sigma = torch.where(noisy, draw_sigmas((batch, len(plan.slots)), generator), 0.0).to(device)
    dirt = torch.where(
        noisy, 0.0, CONTEXT_NOISE * torch.rand(batch, len(plan.slots), generator=generator)
    ).to(device)
    level, grain = (s.repeat_interleave(BLOCK, 1)[:, :, None, None, None] for s in (sigma, dirt))
    x = add_noise(x0, eps, level) + grain * eps
    taught = BLOCK * int(noisy.sum())
    return Lesson(
        plan,
        x,
        sigma,
        slot_text(encoder, plan, crops.ids),
        crops.frames[:, at],
        velocity_of(x0, eps)[:, -taught:],
        crops.weight[:, at][:, -taught:],
    )


def teacher_forcing_loss(
    transformer, encoder, library: Library, openings: Openings, seed: int, batch: int, device="cpu"
):
    """loss(step) of stage 2."""

    def loss(step: int):
        g = stream(seed, "teacher-forcing", step)
        if step % OPENINGS == 0:
            lesson = opening_lesson(encoder, openings, batch, g, device)
        else:
            lesson = crop_lesson(encoder, library, batch, g, device)
        return lesson_error(transformer, lesson), {
            "kind": lesson.plan.kind,
            "switch": lesson.plan.switch is not None,
        }

    return loss
