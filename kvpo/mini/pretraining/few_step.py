"""Stages 3 and 4 of pretraining: few-step training on the model's own rollouts.

Stage 2 has only seen true pasts and truly noised inputs.  In the stream both are the model's own work: its inputs
are its own predictions with fresh noise on them, its past is what it committed.  So here the model plays with its
own sampler and its own cache, and is taught at the inputs and in the context it really met.  In turn:

*   openings (``kvpo.mini.pretraining.openings``);
*   continuations of true stories: one true answer at every noise level, so a few steps suffice;
*   streams: six blocks of the model's own from the first on.  The true opening nearest to its own tells where its
    object is, and so what the true continuation of its own video is;
*   long streams (stage 4): fourteen such blocks, and lessons on a stretch of seven of them, the sink before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Sequence

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from kvpo.generators.sampler import Renoise, denoise_block
from kvpo.generators.causal_wan import CausalWan
from kvpo.mini.pretraining.autoencoder import encode
from kvpo.mini.pretraining.flat import Lesson, lesson_error, slot_text
from kvpo.mini.pretraining.layouts import Layout, Slot, draw_layout, draw_switch, layout, stretch
from kvpo.mini.pretraining.library import OBJECT_WEIGHT, Library, object_cells
from kvpo.mini.pretraining.linear_encoder import LinearEncoder
from kvpo.mini.pretraining.networks import BLOCK, SINK, STEPS, encode_text, new_tokenizer, tokenize
from kvpo.mini.pretraining.openings import LESSON_SLOTS, SIGMAS, Openings, likeliest, opening_lesson, sample_openings, sampled_openings
from kvpo.mini.stories import chance, describe, describe_change, next_scene, pick
from kvpo.mini.pretraining.teacher_forcing import Crops, cut
from kvpo.mini.world import pixel_frames, render
from kvpo.mini.world import play as play_truth
from kvpo.common.rng import stream

TURNS = ("opening", "stream", "stream", "continuation")
"""What the steps of stage 3 teach, one of these drawn for each."""
LONG_TURNS = ("opening", "stream", "long", "long", "continuation")
"""And those of stage 4: after six blocks of its own, the model only knew a past that was at least in part the story's."""
ASTRAY = 0.25
"""Relative error of the past at which a lesson's weight falls to 1 / e: out of a past that has lost the object nobody can tell the true
continuation, and teaching it all the same teaches to draw the mean of all places (measured: 100 steps of that, and nothing was learnt)."""


def cached_twin(transformer: WanTransformer3DModel) -> CausalWan:
    """The same parameters (shared, not copied) behind the streaming generator's attention."""
    twin = WanTransformer3DModel.from_config(transformer.config)
    for mine, theirs in zip(twin.modules(), transformer.modules()):
        mine._parameters.update(theirs._parameters)
    return CausalWan(twin.eval())


@dataclass(frozen=True)
class Played:
    """What the model met and made: per source, its network inputs x_SBFCHW and its clean latents x0_BFCHW."""

    inputs: dict[int, torch.Tensor]
    clean: dict[int, torch.Tensor]

    def of(self, sources: Sequence[int]) -> Played:
        """Those sources, counted anew."""
        made = {i: self.inputs[source] for i, source in enumerate(sources) if source in self.inputs}
        return Played(made, {i: self.clean[source] for i, source in enumerate(sources)})


def stages(plan: Layout) -> list[list[Slot]]:
    """The clean slots in the order in which a stream commits them; a re-encoding's frames in one pass."""
    groups: list[list[Slot]] = []
    for slot in plan.slots:
        if slot.noisy:
            continue
        again = slot.prompt != slot.source
        if again and groups and groups[-1][-1].prompt == slot.prompt and groups[-1][-1].prompt != groups[-1][-1].source:
            groups[-1].append(slot)
        else:
            groups.append([slot])
    return groups


@torch.no_grad()
def play(model: CausalWan, plan: Layout, crops: Crops, text: torch.Tensor, generator: torch.Generator) -> Played:
    """Generate the layout's noisy sources, but for a story's block 0, over a cache; all else stays the story's own.

    ``text`` [B, K, L, D], one row per source.  The rows share the first row's frame ids: a cache names its pages by
    them, and a shift in time means nothing to the story.
    """
    ids, rows = crops.frames[0].tolist(), len(crops.latents)
    at = plan.frames().tolist()
    reads = {slot.source: [ids[at[f]] for f in slot.reads] for slot in plan.slots if slot.noisy}
    inputs, clean = {}, {k: crops.latents[:, BLOCK * k : BLOCK * (k + 1)] for k in range(plan.sources)}
    cache = model.new_cache(BLOCK * plan.sources, *crops.latents.shape[-2:], rows=rows, sink=SINK)

    def frames(source: int) -> list[int]:
        return ids[BLOCK * source : BLOCK * (source + 1)]

    def generate(source: int) -> torch.Tensor:
        eps = torch.randn(STEPS, *clean[source].shape, generator=generator).to(crops.latents.device)
        met: list[torch.Tensor] = []
        made = denoise_block(
            lambda x, sigma: model.velocity(x, sigma, text[:, source], frames(source), cache, reads[source]),
            Renoise(), SIGMAS, eps[0], lambda i: eps[i + 1], lambda _i, x, _v: met.append(x),
        )  # fmt: skip
        inputs[source] = torch.stack(met)
        return made

    for group in stages(plan):
        first = group[0]
        if first.source in reads and first.prompt == first.source:
            clean[first.source] = generate(first.source)
        past = [ids[at[f]] for f in first.reads] if len(group) == 1 else list(range(SINK))
        where = [f for slot in group for f in frames(slot.source)]
        model.commit(torch.cat([clean[slot.source] for slot in group], 1), text[:, first.prompt], where, cache, past)
    for source in reads:
        if source not in inputs:
            clean[source] = generate(source)
    return Played(inputs, clean)


@dataclass(frozen=True)
class Exercises:
    """A flat sequence of what was played: the committed blocks, and noisy slots at steps the sampler really took."""

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
    drawn = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()][: LESSON_SLOTS - len(clean)]
    return Exercises(Layout(plan.kind, plan.switch, clean + tuple(slot for slot, _ in drawn)), tuple(level for _, level in drawn))


def few_step_loss(transformer, encoder, write: Writer, library: Library, openings: Openings, turns: Sequence[str], seed: int, name: str, batch: int, device="cpu"):
    """loss(step) of stages 3 and 4.  ``name`` names their random streams."""
    student = cached_twin(transformer)

    def opening(g: torch.Generator) -> Lesson:
        return opening_lesson(encoder, openings, partial(sampled_openings, student), batch, g, device)

    def continuation(g: torch.Generator) -> Lesson:
        plan = draw_layout(g)
        crops = cut(library, plan, batch, g).to(device)
        crops = replace(crops, frames=crops.frames[:1].expand_as(crops.frames))
        return lesson_of(plan, crops, playing(plan, crops, g), g)

    def streamed(g: torch.Generator) -> Lesson:
        plan = layout("stream", draw_switch("stream", g))
        crops, truth = opened(plan, g)
        return lesson_of(plan, crops, playing(plan, crops, g), g, truth)

    def long(g: torch.Generator) -> Lesson:
        whole = layout("long", draw_switch("long", g))
        crops, truth = opened(whole, g)
        plan, sources = draw_stretch(whole, g)
        return lesson_of(plan, crops.of(sources), playing(whole, crops, g).of(sources), g, replace(crops, latents=truth).of(sources).latents)

    def opened(plan: Layout, g: torch.Generator) -> tuple[Crops, torch.Tensor]:
        """A story that begins with the model's own block 0, and its true latents."""
        drawn = torch.randint(len(openings.tokens), (batch,), generator=g)
        with torch.no_grad():
            text = encode_text(encoder, openings.tokens[drawn].to(device))
        made = sample_openings(student, text, openings.latents[drawn, 0].shape, g)[1]
        best = likeliest(made, openings.latents[drawn].float().to(device), 0.0).cpu()
        crops = write.continue_from(openings, drawn, best, plan.switch, plan.sources, g).to(device)
        truth = crops.latents.clone()
        crops.latents[:, :BLOCK] = made
        return crops, truth

    def playing(plan: Layout, crops: Crops, g: torch.Generator) -> Played:
        with torch.no_grad():
            text = encode_text(encoder, crops.ids.flatten(0, 1)).unflatten(0, crops.ids.shape[:2])
        return play(student, plan, crops, text, g)

    def lesson_of(plan: Layout, crops: Crops, played: Played, g: torch.Generator, truth: torch.Tensor | None = None) -> Lesson:
        drawn = draw_exercises(plan, g)
        x, sigma, target = exercise(drawn, crops, played)
        at = drawn.plan.frames()
        weight = crops.weight[:, at] * (trust(drawn.plan, crops, played, truth) if truth is not None else 1.0)
        taught = target.shape[1]
        return Lesson(drawn.plan, x, sigma, slot_text(encoder, drawn.plan, crops.ids), crops.frames[:, at], target, weight[:, -taught:])

    def loss(step: int):
        turn = turns[int(torch.randint(len(turns), (), generator=stream(seed, f"{name}-turn", step)))]
        lesson = {"opening": opening, "stream": streamed, "long": long, "continuation": continuation}[turn](stream(seed, name, step))
        return lesson_error(transformer, lesson), {"turn": turn, "kind": lesson.plan.kind}

    return loss


def draw_stretch(whole: Layout, generator: torch.Generator) -> tuple[Layout, list[int]]:
    """Layout and sources of a later stretch of a long stream; where the stream switches, a stretch that is taught the switch."""
    length = len(stretch("later"))
    last = whole.sources - length
    first = int(torch.randint(1, last + 1, (), generator=generator))
    if whole.switch is not None:
        first = min(max(first, whole.switch - length + 1, 1), max(whole.switch - 2, 1), last)
    at = None if whole.switch is None or not 1 <= whole.switch - first < length else whole.switch - first
    return layout("later", at), [0, *range(first, first + length)]


def exercise(drawn: Exercises, crops: Crops, played: Played):
    """Inputs x_BNCHW and noise levels [B, slots] of the flat sequence, and the target velocities of its noisy frames."""
    x = [played.inputs[slot.source][level] for slot, level in zip(drawn.noisy, drawn.levels)]
    truths = [crops.latents[:, BLOCK * slot.source : BLOCK * (slot.source + 1)] for slot in drawn.noisy]
    targets = [(x_i - truth) / SIGMAS[level] for x_i, truth, level in zip(x, truths, drawn.levels)]
    clean = [played.clean[slot.source] for slot in drawn.plan.slots if not slot.noisy]
    sigma = torch.tensor([0.0] * len(clean) + [SIGMAS[level] for level in drawn.levels]).expand(len(crops.latents), -1)
    return torch.cat(clean + x, 1), sigma.to(crops.latents.device), torch.cat(targets, 1)


def trust(plan: Layout, crops: Crops, played: Played, truth: torch.Tensor) -> torch.Tensor:
    """How much the lessons of every frame of the flat sequence count [B, N, 1, 1, 1]: exp(-e / ASTRAY), e = the worst error of the blocks before it."""
    trusted, worst = {}, torch.zeros(len(truth), device=truth.device)
    for source in range(plan.sources):
        trusted[source] = (-worst / ASTRAY).exp()
        at = slice(BLOCK * source, BLOCK * (source + 1))
        weight = crops.weight[:, at]
        error = (weight * (played.clean[source] - truth[:, at]).square()).sum((1, 2, 3, 4))
        worst = torch.maximum(worst, error / (weight * truth[:, at].square()).sum((1, 2, 3, 4)))
    return torch.stack([trusted[slot.source] for slot in plan.slots], 1).repeat_interleave(BLOCK, 1)[:, :, None, None, None]


@dataclass(frozen=True)
class Writer:
    """Writes the true continuation of an opening: a second scene, and the latents of the whole story."""

    vae: AutoencoderKLWan
    code: LinearEncoder

    def continue_from(self, openings: Openings, drawn: torch.Tensor, best: torch.Tensor, switch: int | None, blocks: int, generator: torch.Generator) -> Crops:
        """Stories of ``blocks`` that open with prompts ``drawn`` [B], their objects at their places ``best`` [B], and change at block ``switch``."""
        tokenizer, rows = new_tokenizer(), []
        for prompt, place in zip(drawn.tolist(), best.tolist()):
            first = openings.scenes[prompt]
            change = pick(("motion", "motion", "colour", "shape"), generator)
            second = next_scene(first, change, generator)
            text = describe_change(second, change, generator) if chance(0.5, generator) else "now " + describe(second, generator)
            scenes, starts = ([first], [0]) if switch is None else ([first, second], [0, pixel_frames(BLOCK * switch)])
            pixels = render(scenes, play_truth(scenes, starts, pixel_frames(BLOCK * blocks), *openings.places[prompt, place].tolist()))
            ids = torch.stack((openings.tokens[prompt], tokenize(tokenizer, [text])[0]))
            spoken = torch.tensor([int(switch is not None and b >= switch) for b in range(blocks)])
            weight = 1.0 + OBJECT_WEIGHT * object_cells(pixels)[:, None].float()
            rows.append((encode(self.vae, self.code, pixels[None])[0], weight, ids[spoken], torch.arange(BLOCK * blocks)))
        return Crops(*(torch.stack(column) for column in zip(*rows)))
