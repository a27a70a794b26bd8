"""`kvpo ab`: two generators' videos side by side on one static page, for people to compare without knowing which is which.

    OUT/page/index.html   what raters get; opens offline and asks for every pair VQ, MQ, TA and overall: left, same or right
    OUT/key.json          which side is whose, for `kvpo unblind`; not for raters

Both generators get the same scripts with the same noise.  A is on the left in half of the pairs (one more where their number is odd
and the draw says so), drawn from the stream (seed, "ab", "sides"), so that a preference for a side cancels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence

import torch
import tyro

from kvpo.ab_page import QUESTIONS, write_page
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.denoise import SAMPLERS
from kvpo.environment import command, pick_device
from kvpo.files import must_be_new, write_atomic
from kvpo.generating import write_missing
from kvpo.generators.pipeline import Geometry
from kvpo.loading import load_generator
from kvpo.parts import evaluation_scripts
from kvpo.progress import Progress
from kvpo.rng import stream
from kvpo.types import Script

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Ab:
    """Make a blind A/B page of two generators: same scripts, same noise, sides hidden.  A second call goes on where the first stopped."""

    a: Positional[str]
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    b: Positional[str]
    """The other one."""
    recipe: str = "mini"
    """Where sampler, length and scripts are taken from."""
    prompts: str = ""
    """Prompt file; default: what the recipe evaluates on."""
    scripts: int = 16
    seeds: tuple[int, ...] = (0,)
    """A pair of every script for each."""
    blocks: int = 0
    """Length of the videos, blocks; 0 = the recipe's."""
    out: Path = Path("runs/ab")
    device: str = "auto"

    def __call__(self) -> None:
        must_be_new(self.out / "page" / "index.html")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}: give at least one seed and each once, equal ones would make equal pairs")
        config = load_config(recipe_path(self.recipe))
        config = replace(config, evaluate=replace(config.evaluate, scripts=self.scripts, prompts=self.prompts or config.evaluate.prompts))
        config = replace(config, data=replace(config.data, blocks=self.blocks or config.data.blocks))
        pairs, progress = draw_pairs(evaluation_scripts(config), self.seeds, config.evaluate.seed), Progress()
        geometry = self.write_videos("a", pairs, config, progress)
        self.write_videos("b", pairs, config, progress, geometry)
        study = hashlib.blake2b((self.out / "key.json").read_bytes(), digest_size=8).hexdigest()
        claim(self.out / "key.json", {"study": study, "command": command()})
        write_page(self.out / "page", study, [pair.script for pair in pairs], geometry)
        progress.say(f"{len(pairs)} pairs, {len(QUESTIONS)} questions each\nfor the raters: {self.out}/page\nfor kvpo unblind, not for raters: {self.out}/key.json")

    def write_videos(self, name: str, pairs: Sequence[Pair], config: RunConfig, progress: Progress, other: Geometry | None = None) -> Geometry:
        """One generator's videos, page/000-left.mp4 or -right.mp4 and so on; those that are there already stay.  Its geometry, alike the ``other``'s."""
        pipeline, label = load_generator(getattr(self, name), pick_device(self.device), config.vae_dtype, config.dtype)
        check_alike(other or pipeline.geometry, pipeline.geometry)
        claim(self.out / "key.json", {name: label, "sampler": config.sampler, "pairs": [pair.record for pair in pairs]})
        paths = [self.out / "page" / f"{number:03d}-{pair.side(name)}.mp4" for number, pair in enumerate(pairs)]
        write_missing(pipeline, SAMPLERS[config.sampler], [(pair.script, pair.seed, path) for pair, path in zip(pairs, paths)], label, progress)
        return pipeline.geometry


@dataclass(frozen=True)
class Pair:
    script: Script
    seed: int
    left: str
    """Whose video is on the left, "a" or "b"."""

    def side(self, name: str) -> str:
        return "left" if name == self.left else "right"

    @property
    def record(self) -> dict:
        return {"script": self.script.id, "prompts": list(self.script.texts), "starts": list(self.script.starts), "blocks": self.script.blocks, "seed": self.seed, "left": self.left}


def claim(path: Path, key: dict) -> None:
    """Add to the study's key.  ValueError where it says otherwise already: the videos there are then another study's."""
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if differ := [name for name in key if there.get(name, key[name]) != key[name]]:
        raise ValueError(f"{path.parent} holds another study: its key.json differs in {', '.join(differ)}; give another --out")
    write_atomic(path, json.dumps(there | key, indent=1) + "\n")


def draw_pairs(scripts: Sequence[Script], seeds: Sequence[int], seed: int) -> list[Pair]:
    """Every script with every seed, in random order, sides in random balance."""
    both = [(script, s) for script in scripts for s in seeds]
    generator = stream(seed, "ab", "sides")
    order, sides = torch.randperm(len(both), generator=generator).tolist(), torch.randperm(len(both), generator=generator)
    first = int(torch.randint(2, (), generator=generator))  # whose is the one more where the number is odd
    return [Pair(*both[i], "ab"[(int(side) + first) % 2]) for i, side in zip(order, sides)]


def check_alike(a: Geometry, b: Geometry) -> None:
    """ValueError where the sides could be told apart by size or length, or do not share their noise."""
    of_a, of_b = ({name: getattr(g, name) for name in ("block", "latent_height", "latent_width", "fps")} for g in (a, b))
    if of_a != of_b:
        raise ValueError(f"A makes videos of {of_a}, B of {of_b}: such pairs are not blind, and share no noise; compare generators of one geometry")
