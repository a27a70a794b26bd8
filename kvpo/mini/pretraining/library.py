"""Stories with their latents, encoded once.

Stages 2 and 3 of pretraining cut their batches from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from kvpo.mini.pretraining.autoencoder import encode
from kvpo.mini.pretraining.linear_encoder import LinearEncoder
from kvpo.mini.pretraining.networks import BLOCK, new_tokenizer, tokenize
from kvpo.mini.pretraining.training import save_whole
from kvpo.mini.stories import Story, write_story
from kvpo.types import Script

OBJECT_WEIGHT = 3.0
"""Extra weight in the loss of a latent cell that shows the object.

The object covers some 4 % of the picture.
"""


def write_library(seed: int, stories: int) -> list[Story]:
    """Write two kinds of stories in turn.

    They are stories of 10 blocks as evaluations tell them, and long ones of 8 blocks a segment.
    """
    out = []
    for i in range(stories):
        if i % 3:
            out.append(write_story(seed, "library", i, blocks=10, habits=True))
        else:
            segments = 1 + (i // 3) % 4
            out.append(
                write_story(
                    seed,
                    "library",
                    i,
                    blocks=8 * max(segments, 2),
                    segments=segments,
                    memory=segments >= 3 and (i // 12) % 2 == 0,
                    habits=True,
                )
            )
    return out


def object_cells(pixels: torch.Tensor) -> torch.Tensor:
    """Latent cells that show the saturated object: RGB [T, 3, 64, 64] -> bool [N, 8, 8]."""
    saturated = (pixels.amax(1) - pixels.amin(1) > 0.2).float()[:, None]
    cells = functional.max_pool2d(saturated, 8)[:, 0]
    return torch.cat((cells[:1], cells[1:].unflatten(0, (-1, 4)).amax(1))) > 0


@dataclass(frozen=True)
class Library:
    scripts: tuple[Script, ...]
    latents: tuple[torch.Tensor, ...]
    """x0_NCHW float16 of each story, in model units."""
    cells: tuple[torch.Tensor, ...]
    """bool [N, H, W] of each story: where the object shows."""
    tokens: tuple[torch.Tensor, ...]
    """Tokens of each story's prompts [segments, L]."""
    _starts: dict = field(default_factory=dict, repr=False)

    def places(self, kind: str, length: int, switch: int | None) -> list[tuple[int, int]]:
        """Every (story, first block) of a stretch with its only prompt switch at ``switch``.

        The stretch has ``length`` blocks. Raises ValueError where there is none.
        """
        key = (kind, length, switch)
        if key not in self._starts:
            earliest = {"opening": 0, "later": 1, "routed": 3}[kind]
            found = []
            for i, script in enumerate(self.scripts):
                last = 0 if kind == "opening" else script.blocks - length
                for first in range(earliest, last + 1):
                    inside = [s - first for s in script.starts if 0 < s - first < length]
                    if inside == ([] if switch is None else [switch]):
                        found.append((i, first))
            if not found:
                raise ValueError(
                    f"no story of the library has a stretch of {length} blocks ({kind}) with its only switch at {switch}; write more stories"
                )
            self._starts[key] = found
        return self._starts[key]

    def draw(
        self, kind: str, length: int, switch: int | None, generator: torch.Generator
    ) -> tuple[int, int]:
        places = self.places(kind, length, switch)
        return places[int(torch.randint(len(places), (), generator=generator))]

    def cut(self, story: int, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut K blocks of a story.

        Returns latents [3 K, C, H, W], loss weights [3 K, 1, H, W] and prompt tokens [K, L].
        """
        at = torch.tensor([BLOCK * b + f for b in blocks for f in range(BLOCK)])
        weight = 1.0 + OBJECT_WEIGHT * self.cells[story][at][:, None].float()
        prompt = torch.tensor([self.scripts[story].segment(b) for b in blocks])
        return self.latents[story][at].float(), weight, self.tokens[story][prompt]


def build_library(
    vae,
    code: LinearEncoder,
    seed: int,
    stories: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Library:
    """Render and encode every story from its first frame on.

    So the latents are those of a stream.
    """
    tokenizer, rows = new_tokenizer(), []
    for i, story in enumerate(write_library(seed, stories)):
        pixels = story.render()
        latents = encode(vae, code, pixels[None])[0].half()
        rows.append(
            (story.script, latents, object_cells(pixels), tokenize(tokenizer, story.script.texts))
        )
        progress(i + 1)
    scripts, latents, cells, tokens = (tuple(column) for column in zip(*rows))
    return Library(scripts, latents, cells, tokens)


def save_library(library: Library, path: Path) -> None:
    scripts = [(s.id, s.texts, s.starts, s.blocks) for s in library.scripts]
    save_whole(
        {
            "scripts": scripts,
            "latents": library.latents,
            "cells": library.cells,
            "tokens": library.tokens,
        },
        path,
    )


def load_library(path: Path) -> Library:
    state = torch.load(path, weights_only=True)
    scripts = tuple(
        Script(i, tuple(texts), tuple(starts), blocks)
        for i, texts, starts, blocks in state["scripts"]
    )
    return Library(scripts, tuple(state["latents"]), tuple(state["cells"]), tuple(state["tokens"]))
