"""Opening blocks: how a story that says nothing of places may begin.

The first block may show its object anywhere, and the mean of all places, which flow matching
predicts at high noise, is several faint objects or none. So the target is ONE of 9 true openings of
the prompt, the one that the input speaks for most: argmax_k <x, c_k> - (1 - sigma) |c_k|^2 / 2, the
likeliest of them under x = (1 - sigma) c + sigma eps. The noise decides where, and the first steps
already commit to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpo.generators.flow import add_noise, warped_sigmas
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


def noised_openings(candidates: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Inputs x_SRFCHW of flow matching at the sampler's S noise levels.

    They are true openings, drawn from the candidates [R, K, F, C, H, W], under noise.
    """
    rows, places = candidates.shape[:2]
    x0 = torch.stack(
        [
            candidates[range(rows), torch.randint(places, (rows,), generator=generator)]
            for _ in SIGMAS
        ]
    )
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    return add_noise(x0, eps, torch.tensor(SIGMAS).to(x0).view(-1, 1, 1, 1, 1, 1))


def opening_lesson(
    encoder, openings: Openings, batch: int, generator: torch.Generator, device
) -> Lesson:
    """Opening blocks of prompts drawn at random, at all of the sampler's noise levels."""
    drawn = torch.randint(
        len(openings.tokens), (batch * LESSON_SLOTS // STEPS,), generator=generator
    )
    text = encode_text(encoder, openings.tokens[drawn].to(device))
    candidates, row = openings.latents[drawn].float().to(device), torch.arange(len(drawn))
    x, targets, weights = noised_openings(candidates, generator), [], []
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


def likeliest(x: torch.Tensor, candidates: torch.Tensor, sigma: float) -> torch.Tensor:
    """Index [R] of the candidate [R, K, F, C, H, W] that each input x_RFCHW speaks for most.

    At sigma = 1 the noise alone decides.
    """
    c = candidates.flatten(2)
    return ((c @ x.flatten(1)[:, :, None])[:, :, 0] - (1 - sigma) / 2 * c.square().sum(-1)).argmax(
        1
    )
