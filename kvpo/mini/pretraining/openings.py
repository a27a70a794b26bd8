"""Opening blocks: how a story that says nothing of places may begin.

The first block may show its object anywhere, and the mean of all places, which flow matching
predicts at high noise, is several faint objects or none. So the target is ONE of 9 true openings of
the prompt, the one that the input speaks for most: argmax_k <x, c_k> - (1 - sigma) |c_k|^2 / 2, the
likeliest of them under x = (1 - sigma) c + sigma eps. The noise decides where, and the first steps
already commit to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.flow import add_noise, warped_sigmas
from kvpo.generators.sampler import Renoise, denoise_block
from kvpo.mini.pretraining.autoencoder import encode
from kvpo.mini.pretraining.flat import Lesson
from kvpo.mini.pretraining.layouts import Layout, Slot
from kvpo.mini.pretraining.library import OBJECT_WEIGHT, object_cells
from kvpo.mini.pretraining.linear_encoder import LinearEncoder
from kvpo.mini.pretraining.networks import BLOCK, STEPS, encode_text, new_tokenizer, tokenize
from kvpo.mini.stories import write_story
from kvpo.mini.world import Scene, pixel_frames, play, render

SIGMAS = warped_sigmas(STEPS)
LESSON_SLOTS = 24
"""Blocks of a flat sequence that is not cut from a true story."""
GRID = (16.0, 32.0, 48.0)
BESIDE = (8.0, 56.0)
"""Coordinates at which openings may show their object, pixels.

They are whole tokens apart, 9 places (6 beside a pillar). They are not anywhere: which of many near
places the noise speaks for nobody could compute in one step, and the mean of near places is a blob
without shape or motion (measured).
"""
APART = Layout("opening", None, tuple(Slot(i, True, i, ()) for i in range(LESSON_SLOTS)))
"""A flat sequence of opening blocks that do not see each other."""


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
        pixels = torch.stack([render([scene], play([scene], [0], frames, x, y)) for x, y in places])
        rows.append(
            (
                tokenize(tokenizer, story.script.texts[:1])[0],
                encode(vae, code, pixels).half(),
                torch.stack([object_cells(p) for p in pixels]),
                torch.tensor(places),
            )
        )
    tokens, latents, cells, where = (torch.stack(column) for column in zip(*rows))
    return Openings(tokens, latents, cells, where, tuple(scenes))


Inputs = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
"""Function that makes network inputs x_SRFCHW at the sampler's S noise levels.

It takes candidates [R, K, F, C, H, W], text [R, L, D] and a generator.
"""


def noised_openings(
    candidates: torch.Tensor, text: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Inputs of flow matching: true openings under true noise."""
    rows, places = candidates.shape[:2]
    x0 = torch.stack(
        [
            candidates[range(rows), torch.randint(places, (rows,), generator=generator)]
            for _ in SIGMAS
        ]
    )
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    return add_noise(x0, eps, torch.tensor(SIGMAS).to(x0).view(-1, 1, 1, 1, 1, 1))


def sampled_openings(
    model: CausalWan, candidates: torch.Tensor, text: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Inputs that the sampler really meets."""
    return sample_openings(model, text, candidates[:, 0].shape, generator)[0]


def opening_lesson(
    encoder, openings: Openings, inputs: Inputs, batch: int, generator: torch.Generator, device
) -> Lesson:
    """Opening blocks of prompts drawn at random, at all of the sampler's noise levels."""
    drawn = torch.randint(
        len(openings.tokens), (batch * LESSON_SLOTS // STEPS,), generator=generator
    )
    text = encode_text(encoder, openings.tokens[drawn].to(device))
    candidates, row = openings.latents[drawn].float().to(device), torch.arange(len(drawn))
    x, targets, weights = inputs(candidates, text.detach(), generator), [], []
    for x_i, sigma in zip(x, SIGMAS):
        best = likeliest(x_i, candidates, sigma).cpu()
        targets.append((x_i - candidates[row, best]) / sigma)
        weights.append(
            1.0 + OBJECT_WEIGHT * openings.cells[drawn, best][:, :, None].float().to(device)
        )

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(batch, LESSON_SLOTS, *t.shape[2:])

    sigma = rows(torch.tensor(SIGMAS)[:, None].expand(-1, len(drawn))).to(device)
    frames = torch.arange(BLOCK).repeat(batch, LESSON_SLOTS).to(device)
    x, target, weight = (
        rows(t).flatten(1, 2) for t in (x, torch.stack(targets), torch.stack(weights))
    )
    return Lesson(APART, x, sigma, rows(text.expand(STEPS, *text.shape)), frames, target, weight)


@torch.no_grad()
def sample_openings(
    model: CausalWan, text: torch.Tensor, shape: torch.Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opening blocks of the model's own: the inputs it met x_SRFCHW and what it made x0_RFCHW."""
    eps = torch.randn(STEPS, *shape, generator=generator).to(text.device)
    met: list[torch.Tensor] = []
    made = denoise_block(
        lambda x, sigma: model.velocity(x, sigma, text, list(range(BLOCK))),
        Renoise(),
        SIGMAS,
        eps[0],
        lambda i: eps[i + 1],
        lambda _i, x, _v: met.append(x),
    )
    return torch.stack(met), made


def likeliest(x: torch.Tensor, candidates: torch.Tensor, sigma: float) -> torch.Tensor:
    """Index [R] of the candidate [R, K, F, C, H, W] that each input x_RFCHW speaks for most.

    At sigma = 1 the noise alone decides.
    """
    c = candidates.flatten(2)
    return ((c @ x.flatten(1)[:, :, None])[:, :, 0] - (1 - sigma) / 2 * c.square().sum(-1)).argmax(
        1
    )
