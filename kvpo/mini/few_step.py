"""Stages 3 and 4 of pretraining: few-step training on the model's own rollouts.

Stage 2 has only seen true pasts and truly noised inputs.  In the stream both are the model's own work: its inputs
are its own predictions with fresh noise on them, its past is what it committed.  So here the model plays with its
own sampler and its own cache, and is taught at the inputs and in the context it really met.  In turn:

*   continuations: every block after the first has one true answer, the story's; the world is deterministic once a
    block of it is known, so this is the target at every noise level and a few steps suffice;
*   openings: the first block may show its object anywhere, and the mean of all places, which flow matching
    predicts at high noise, is several faint objects or none.  So the target is ONE of 9 true openings of the
    prompt, the one that the input speaks for most: argmax_k <x, c_k> - (1 - sigma) |c_k|^2 / 2, the likeliest of
    them under x = (1 - sigma) c + sigma eps.  The noise decides where, and the first steps already commit to it;
*   streams: six blocks of the model's own from the first on.  The true opening nearest to its own tells where its
    object is, and so what the true continuation of its own video is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from kvpo.denoise import Renoise, denoise_block
from kvpo.flow import add_noise, velocity_of, warped_sigmas
from kvpo.generators.causal_wan import CausalWan
from kvpo.mini.autoencoder import encode
from kvpo.mini.library import OBJECT_WEIGHT, Library, object_cells
from kvpo.mini.linear_encoder import LinearEncoder
from kvpo.mini.networks import BLOCK, SINK, STEPS, encode_text, new_tokenizer, tokenize
from kvpo.mini.stories import chance, describe, describe_change, next_scene, pick, write_story
from kvpo.mini.teacher_forcing import Crops, Layout, Slot, cut, draw_layout, flat_velocity, flow_error, layout, slot_text
from kvpo.mini.world import Scene, pixel_frames, render
from kvpo.mini.world import play as play_truth
from kvpo.rng import stream

SIGMAS = warped_sigmas(STEPS)
LESSON_SLOTS = 24
"""Blocks of a flat sequence of this stage: playing costs more than learning from it, so much is learnt from what was played."""
FIRST_TURNS = ("told", "told", "told", "continuation")
THEN_TURNS = ("played", "stream", "told", "stream", "continuation")
"""What the steps teach, one of these drawn for each, in the first half of stage 3, and from then on: streams are worth little before openings are good."""
GRID = (16.0, 32.0, 48.0)
BESIDE = (8.0, 56.0)
"""Where openings may show their object: whole tokens apart, 9 places (6 beside a pillar).  Not anywhere: which of many near places the
noise speaks for nobody could compute in one step, and the mean of near places is a blob without shape or motion (measured)."""
STREAM_BLOCKS = 6
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
class Openings:
    """First blocks of M prompts, K of each with the object in different places."""

    tokens: torch.Tensor
    """[M, L]."""
    latents: torch.Tensor
    """x0_MKFCHW float16."""
    cells: torch.Tensor
    """bool [M, K, F, H, W]: where the object shows."""
    places: torch.Tensor
    """Object centres in frame 0 [M, K, 2]."""
    scenes: tuple[Scene, ...]


def build_openings(vae, code: LinearEncoder, seed: int, prompts: int) -> Openings:
    tokenizer, rows, scenes = new_tokenizer(), [], []
    for i in range(prompts):
        story = write_story(seed, "openings", i)
        scene, frames = story.scenes[0], pixel_frames(BLOCK)
        places = [(x, y) for x in (BESIDE if scene.pillar else GRID) for y in GRID]
        places = (2 * places)[: len(GRID) ** 2]
        scenes.append(scene)
        pixels = torch.stack([render([scene], play_truth([scene], [0], frames, x, y)) for x, y in places])
        rows.append((tokenize(tokenizer, story.script.texts[:1])[0], encode(vae, code, pixels).half(), torch.stack([object_cells(p) for p in pixels]), torch.tensor(places)))
    return Openings(*(torch.stack(column) for column in zip(*rows)), scenes=tuple(scenes))


@dataclass(frozen=True)
class Played:
    """What the model met and made: per source, its network inputs x_SBFCHW and its clean latents x0_BFCHW."""

    inputs: dict[int, torch.Tensor]
    clean: dict[int, torch.Tensor]


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
    reads = {slot.source: [ids[at[f]] for f in slot.reads] for slot in plan.slots if slot.noisy and not _is_opening(plan, slot)}
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
class Lessons:
    """A flat sequence of what was played: the committed blocks, and noisy slots at steps the sampler really took."""

    plan: Layout
    levels: tuple[int, ...]
    """Step of the schedule per noisy slot, in their order."""

    @property
    def noisy(self) -> list[Slot]:
        return [slot for slot in self.plan.slots if slot.noisy]


def draw_lessons(plan: Layout, generator: torch.Generator) -> Lessons:
    """The layout's clean slots, then as many (block, step) pairs as the sequence holds."""
    clean = tuple(slot for slot in plan.slots if not slot.noisy)
    noisy = list({slot.source: slot for slot in plan.slots if slot.noisy and not _is_opening(plan, slot)}.values())
    pairs = [(slot, level) for slot in noisy for level in range(STEPS)]
    drawn = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()][: LESSON_SLOTS - len(clean)]
    return Lessons(Layout(plan.kind, plan.switch, clean + tuple(slot for slot, _ in drawn)), tuple(level for _, level in drawn))


def few_step_loss(transformer, encoder, write: Writer, library: Library, openings: Openings, name: str, first: int, seed: int, batch: int, device="cpu"):
    """loss(step) of stages 3 and 4.  ``name`` names their random streams; the ``first`` steps take FIRST_TURNS."""
    student = cached_twin(transformer)

    def continuation(g: torch.Generator):
        plan = draw_layout(g)
        crops = cut(library, plan, batch, g).to(device)
        return played_on(plan, Crops(crops.latents, crops.weight, crops.ids, crops.frames[:1].expand_as(crops.frames)), g)

    def streamed(g: torch.Generator):
        switch = int(torch.randint(2, 2 * STREAM_BLOCKS - 2, (), generator=g))
        switch = switch if switch < STREAM_BLOCKS else None
        drawn = torch.randint(len(openings.tokens), (batch,), generator=g)
        made = sample_openings(student, encode_text(encoder, openings.tokens[drawn].to(device)), openings.latents[drawn, 0].shape, g)[1]
        best = likeliest(made, openings.latents[drawn].float().to(device), 0.0).cpu()
        crops = write.continue_from(openings, drawn, best, switch, g).to(device)
        truth = crops.latents.clone()
        crops.latents[:, :BLOCK] = made
        return played_on(layout("stream", switch), crops, g, truth)

    def played_on(plan: Layout, crops: Crops, g: torch.Generator, truth: torch.Tensor | None = None):
        with torch.no_grad():
            text = encode_text(encoder, crops.ids.flatten(0, 1)).unflatten(0, crops.ids.shape[:2])
        played, lessons = play(student, plan, crops, text, g), draw_lessons(plan, g)
        x, sigma, target = exercise(lessons, crops, played)
        at = lessons.plan.frames()
        weight = crops.weight[:, at] * (trust(lessons, crops, played, truth) if truth is not None else 1.0)
        return lessons.plan, x, sigma, slot_text(encoder, lessons.plan, crops.ids), crops.frames[:, at], target, weight

    def opening(g: torch.Generator, told: bool):
        drawn = torch.randint(len(openings.tokens), (batch * LESSON_SLOTS // STEPS,), generator=g)
        x, target, weight = told_openings(openings, drawn, g, device) if told else open_stories(student, encoder, openings, drawn, g, device)
        text = encode_text(encoder, openings.tokens[drawn].to(device))[None].expand(STEPS, -1, -1, -1)
        sigma = torch.tensor(SIGMAS)[:, None].expand(-1, len(drawn))
        rows = lambda t: t.reshape(batch, LESSON_SLOTS, *t.shape[2:])  # noqa: E731
        frames = torch.arange(BLOCK).repeat(batch, LESSON_SLOTS)
        return APART, rows(x).flatten(1, 2), rows(sigma).to(device), rows(text), frames.to(device), rows(target).flatten(1, 2), rows(weight).flatten(1, 2)

    def loss(step: int):
        turns = FIRST_TURNS if step < first else THEN_TURNS
        turn = turns[int(torch.randint(len(turns), (), generator=stream(seed, f"{name}-turn", step)))]
        teach = {"told": partial(opening, told=True), "played": partial(opening, told=False), "stream": streamed, "continuation": continuation}[turn]
        plan, x, sigma, text, frames, target, weight = teach(stream(seed, name, step))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = flat_velocity(transformer, plan, x, sigma, text, frames)
        taught = target.shape[1]  # the noisy frames stand last
        return flow_error(v[:, -taught:], target, weight[:, -taught:]), {"kind": f"{turn} {plan.kind}"}

    return loss


def exercise(lessons: Lessons, crops: Crops, played: Played):
    """Inputs x_BNCHW and noise levels [B, slots] of the flat sequence, and the target velocities of its noisy frames."""
    x = [played.inputs[slot.source][level] for slot, level in zip(lessons.noisy, lessons.levels)]
    truths = [crops.latents[:, BLOCK * slot.source : BLOCK * (slot.source + 1)] for slot in lessons.noisy]
    targets = [(x_i - truth) / SIGMAS[level] for x_i, truth, level in zip(x, truths, lessons.levels)]
    clean = [played.clean[slot.source] for slot in lessons.plan.slots if not slot.noisy]
    sigma = torch.tensor([0.0] * len(clean) + [SIGMAS[level] for level in lessons.levels]).expand(len(crops.latents), -1)
    return torch.cat(clean + x, 1), sigma.to(crops.latents.device), torch.cat(targets, 1)


def trust(lessons: Lessons, crops: Crops, played: Played, truth: torch.Tensor) -> torch.Tensor:
    """How much the lessons of every frame of the flat sequence count [B, N, 1, 1, 1]: exp(-e / ASTRAY), e = the worst error of the blocks before it."""
    trusted, worst = {}, torch.zeros(len(truth), device=truth.device)
    for source in range(lessons.plan.sources):
        trusted[source] = (-worst / ASTRAY).exp()
        at = slice(BLOCK * source, BLOCK * (source + 1))
        weight = crops.weight[:, at]
        error = (weight * (played.clean[source] - truth[:, at]).square()).sum((1, 2, 3, 4))
        worst = torch.maximum(worst, error / (weight * truth[:, at].square()).sum((1, 2, 3, 4)))
    return torch.stack([trusted[slot.source] for slot in lessons.plan.slots], 1).repeat_interleave(BLOCK, 1)[:, :, None, None, None]


APART = Layout("opening", None, tuple(Slot(i, True, i, ()) for i in range(LESSON_SLOTS)))
"""A flat sequence of opening blocks that do not see each other."""


@torch.no_grad()
def open_stories(model: CausalWan, encoder, openings: Openings, drawn: torch.Tensor, generator: torch.Generator, device):
    """The sampler's inputs for the opening blocks of the prompts ``drawn`` [R], target velocities and weights, each [S, R, F, ...]."""
    candidates = openings.latents[drawn].float().to(device)
    met, _ = sample_openings(model, encode_text(encoder, openings.tokens[drawn].to(device)), candidates[:, 0].shape, generator)
    targets, weights, row = [], [], torch.arange(len(drawn))
    for x, sigma in zip(met, SIGMAS):
        best = likeliest(x, candidates, sigma).cpu()
        answer, cells = candidates[row, best], openings.cells[drawn, best]
        targets.append((x - answer) / sigma)
        weights.append(1.0 + OBJECT_WEIGHT * cells[:, :, None].float().to(device))
    return met, torch.stack(targets), torch.stack(weights)


def told_openings(openings: Openings, drawn: torch.Tensor, generator: torch.Generator, device):
    """The same from true openings in places drawn at random, with true noise at the sampler's levels: plain flow matching."""
    row, best = torch.arange(len(drawn)), torch.randint(openings.latents.shape[1], (STEPS, len(drawn)), generator=generator)
    answers = torch.stack([openings.latents[drawn[row], k] for k in best]).float().to(device)
    eps = torch.randn(answers.shape, generator=generator).to(device)
    sigma = torch.tensor(SIGMAS, device=device).view(-1, 1, 1, 1, 1, 1)
    cells = torch.stack([openings.cells[drawn[row], k] for k in best])
    return add_noise(answers, eps, sigma), velocity_of(answers, eps), 1.0 + OBJECT_WEIGHT * cells[:, :, :, None].float().to(device)


@torch.no_grad()
def sample_openings(model: CausalWan, text: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Opening blocks of the model's own: the inputs it met x_SRFCHW and what it made x0_RFCHW."""
    eps = torch.randn(STEPS, *shape, generator=generator).to(text.device)
    met: list[torch.Tensor] = []
    made = denoise_block(
        lambda x, sigma: model.velocity(x, sigma, text, list(range(BLOCK))), Renoise(), SIGMAS, eps[0],
        lambda i: eps[i + 1], lambda _i, x, _v: met.append(x),
    )  # fmt: skip
    return torch.stack(met), made


@dataclass(frozen=True)
class Writer:
    """Writes the true continuation of an opening: a second scene, and the latents of the whole story."""

    vae: AutoencoderKLWan
    code: LinearEncoder

    def continue_from(self, openings: Openings, drawn: torch.Tensor, best: torch.Tensor, switch: int | None, generator: torch.Generator) -> Crops:
        """Stories that open with prompts ``drawn`` [B], their objects at their places ``best`` [B], and change at block ``switch``."""
        tokenizer, rows = new_tokenizer(), []
        for prompt, place in zip(drawn.tolist(), best.tolist()):
            first = openings.scenes[prompt]
            change = pick(("motion", "motion", "colour", "shape"), generator)
            second = next_scene(first, change, generator)
            text = describe_change(second, change, generator) if chance(0.5, generator) else "now " + describe(second, generator)
            scenes, starts = ([first], [0]) if switch is None else ([first, second], [0, pixel_frames(BLOCK * switch)])
            pixels = render(scenes, play_truth(scenes, starts, pixel_frames(BLOCK * STREAM_BLOCKS), *openings.places[prompt, place].tolist()))
            ids = torch.stack((openings.tokens[prompt], tokenize(tokenizer, [text])[0]))
            spoken = torch.tensor([int(switch is not None and b >= switch) for b in range(STREAM_BLOCKS)])
            weight = 1.0 + OBJECT_WEIGHT * object_cells(pixels)[:, None].float()
            rows.append((encode(self.vae, self.code, pixels[None])[0], weight, ids[spoken], torch.arange(BLOCK * STREAM_BLOCKS)))
        return Crops(*(torch.stack(column) for column in zip(*rows)))


def likeliest(x: torch.Tensor, candidates: torch.Tensor, sigma: float) -> torch.Tensor:
    """Which of the candidates [R, K, F, C, H, W] each input x_RFCHW speaks for most, [R]; at sigma = 1 the noise alone decides."""
    c = candidates.flatten(2)
    return ((c @ x.flatten(1)[:, :, None])[:, :, 0] - (1 - sigma) / 2 * c.square().sum(-1)).argmax(1)


def _is_opening(plan: Layout, slot: Slot) -> bool:
    return plan.kind in ("opening", "stream") and slot.source == 0
