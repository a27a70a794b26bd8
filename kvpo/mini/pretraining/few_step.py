"""Stage 3 of pretraining: the sampler's few steps.

Stage 2 has only seen truly noised inputs. In the stream they are the model's own work: its own
predictions with fresh noise on them. So here the model plays with its own sampler and its own
cache, and is taught at the inputs that it really met. In turn:

*   openings (``kvpo.mini.pretraining.openings``);
*   continuations of true stories: one true answer at every noise level, so a few steps suffice.

Nothing teaches the true continuation of the model's OWN stream. Nobody has that for a real
generator: distilled streaming generators drift and fade on their own past, which is what alignment
is there to mend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import WanTransformer3DModel

from kvpo.common.rng import stream
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.sampler import Renoise, denoise_block
from kvpo.mini.pretraining.flat import Lesson, lesson_error, slot_text
from kvpo.mini.pretraining.layouts import Layout, Slot, draw_layout
from kvpo.mini.pretraining.library import Library
from kvpo.mini.pretraining.networks import BLOCK, SINK, STEPS, encode_text
from kvpo.mini.pretraining.openings import (
    LESSON_SLOTS,
    SIGMAS,
    Openings,
    opening_lesson,
    sampled_openings,
)
from kvpo.mini.pretraining.teacher_forcing import Crops, cut

TURNS = ("opening", "continuation")
"""Kinds of lessons, one of which is drawn for each step."""


def cached_twin(transformer: WanTransformer3DModel) -> CausalWan:
    """Put the same parameters (shared, not copied) behind the streaming generator's attention."""
    twin = WanTransformer3DModel.from_config(transformer.config)
    for mine, theirs in zip(twin.modules(), transformer.modules()):
        mine._parameters.update(theirs._parameters)
    return CausalWan(twin.eval())


@dataclass(frozen=True)
class Played:
    """Record of what the model met and made.

    It holds per source its network inputs x_SBFCHW and its clean latents x0_BFCHW.
    """

    inputs: dict[int, torch.Tensor]
    clean: dict[int, torch.Tensor]


def stages(plan: Layout) -> list[list[Slot]]:
    """The clean slots in the order in which a stream commits them.

    A re-encoding's frames are in one pass.
    """
    groups: list[list[Slot]] = []
    for slot in plan.slots:
        if slot.noisy:
            continue
        again = slot.prompt != slot.source
        if (
            again
            and groups
            and groups[-1][-1].prompt == slot.prompt
            and groups[-1][-1].prompt != groups[-1][-1].source
        ):
            groups[-1].append(slot)
        else:
            groups.append([slot])
    return groups


@torch.no_grad()
def play(
    model: CausalWan, plan: Layout, crops: Crops, text: torch.Tensor, generator: torch.Generator
) -> Played:
    """Generate the layout's noisy sources, but for a story's block 0, over a cache.

    All else stays the story's own.

    ``text`` [B, K, L, D], one row per source. The rows share the first row's frame ids: a cache
    names its pages by them, and a shift in time means nothing to the story.
    """
    ids, rows = crops.frames[0].tolist(), len(crops.latents)
    at = plan.frames().tolist()
    reads = {slot.source: [ids[at[f]] for f in slot.reads] for slot in plan.slots if slot.noisy}
    inputs = {}
    clean = {k: crops.latents[:, BLOCK * k : BLOCK * (k + 1)] for k in range(plan.sources)}
    cache = model.new_cache(BLOCK * plan.sources, *crops.latents.shape[-2:], rows=rows, sink=SINK)

    def frames(source: int) -> list[int]:
        return ids[BLOCK * source : BLOCK * (source + 1)]

    def generate(source: int) -> torch.Tensor:
        eps = torch.randn(STEPS, *clean[source].shape, generator=generator).to(crops.latents.device)
        met: list[torch.Tensor] = []
        made = denoise_block(
            lambda x, sigma: model.velocity(
                x, sigma, text[:, source], frames(source), cache, reads[source]
            ),
            Renoise(),
            SIGMAS,
            eps[0],
            lambda i: eps[i + 1],
            lambda _i, x, _v: met.append(x),
        )
        inputs[source] = torch.stack(met)
        return made

    for group in stages(plan):
        first = group[0]
        if first.source in reads and first.prompt == first.source:
            clean[first.source] = generate(first.source)
        past = [ids[at[f]] for f in first.reads] if len(group) == 1 else list(range(SINK))
        where = [f for slot in group for f in frames(slot.source)]
        model.commit(
            torch.cat([clean[slot.source] for slot in group], 1),
            text[:, first.prompt],
            where,
            cache,
            past,
        )
    for source in reads:
        if source not in inputs:
            clean[source] = generate(source)
    return Played(inputs, clean)


@dataclass(frozen=True)
class Exercises:
    """A flat sequence of what was played.

    It has the committed blocks, and noisy slots at steps the sampler really took.
    """

    plan: Layout
    levels: tuple[int, ...]
    """Step of the schedule per noisy slot, in their order."""

    @property
    def noisy(self) -> list[Slot]:
        return [slot for slot in self.plan.slots if slot.noisy]


def draw_exercises(plan: Layout, generator: torch.Generator) -> Exercises:
    """The layout's clean slots, then as many (block, step) pairs as the sequence holds."""
    clean = tuple(slot for slot in plan.slots if not slot.noisy)
    noisy = list({slot.source: slot for slot in plan.slots if slot.noisy}.values())
    pairs = [(slot, level) for slot in noisy for level in range(STEPS)]
    drawn = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()][
        : LESSON_SLOTS - len(clean)
    ]
    return Exercises(
        Layout(plan.kind, plan.switch, clean + tuple(slot for slot, _ in drawn)),
        tuple(level for _, level in drawn),
    )


def few_step_loss(
    transformer, encoder, library: Library, openings: Openings, seed: int, batch: int, device="cpu"
):
    """loss(step) of stage 3."""
    student = cached_twin(transformer)

    def opening(g: torch.Generator) -> Lesson:
        return opening_lesson(
            encoder, openings, partial(sampled_openings, student), batch, g, device
        )

    def continuation(g: torch.Generator) -> Lesson:
        plan = draw_layout(g)
        crops = cut(library, plan, batch, g).to(device)
        crops = replace(crops, frames=crops.frames[:1].expand_as(crops.frames))
        with torch.no_grad():
            text = encode_text(encoder, crops.ids.flatten(0, 1)).unflatten(0, crops.ids.shape[:2])
        played, drawn = play(student, plan, crops, text, g), draw_exercises(plan, g)
        x, sigma, target = exercise(drawn, crops, played)
        at, taught = drawn.plan.frames(), target.shape[1]
        return Lesson(
            drawn.plan,
            x,
            sigma,
            slot_text(encoder, drawn.plan, crops.ids),
            crops.frames[:, at],
            target,
            crops.weight[:, at][:, -taught:],
        )

    def loss(step: int):
        turn = TURNS[
            int(torch.randint(len(TURNS), (), generator=stream(seed, "few-step-turn", step)))
        ]
        lesson = {"opening": opening, "continuation": continuation}[turn](
            stream(seed, "few-step", step)
        )
        return lesson_error(transformer, lesson), {"turn": turn, "kind": lesson.plan.kind}

    return loss


def exercise(drawn: Exercises, crops: Crops, played: Played):
    """Make the flat sequence: inputs x_BNCHW, noise levels [B, slots] and target velocities.

    The targets are those of its noisy frames.
    """
    x = [played.inputs[slot.source][level] for slot, level in zip(drawn.noisy, drawn.levels)]
    truths = [
        crops.latents[:, BLOCK * slot.source : BLOCK * (slot.source + 1)] for slot in drawn.noisy
    ]
    targets = [(x_i - truth) / SIGMAS[level] for x_i, truth, level in zip(x, truths, drawn.levels)]
    clean = [played.clean[slot.source] for slot in drawn.plan.slots if not slot.noisy]
    sigma = torch.tensor([0.0] * len(clean) + [SIGMAS[level] for level in drawn.levels]).expand(
        len(crops.latents), -1
    )
    return torch.cat(clean + x, 1), sigma.to(crops.latents.device), torch.cat(targets, 1)
