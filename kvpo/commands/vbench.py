"""`kvpo vbench`: videos as VBench wants them, its scores and totals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.common.environment import command, pick_device
from kvpo.common.files import try_folder, write_atomic
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.evaluation.prompt_sets import SETS
from kvpo.rewards.isolated.environments import python_of
from kvpo.types import Script


@dataclass(frozen=True)
class Vbench:
    """Write a generator's videos as VBench wants them.

    With --environment, measure them by VBench. A second call goes on where the first stopped.
    """

    generator: Positional[str]
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    prompts: Path
    """Prompt file, one prompt a script: it names the videos, and is what they are judged by."""
    extended: Path | None = None
    """Prompt file with the same lines, longer, to make the videos from; default: --prompts."""
    recipe: str = "mini"
    """Recipe that sampler and length are taken from."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A video of every prompt for each, PROMPT-0.mp4, PROMPT-1.mp4, ..."""
    blocks: int = 0
    """Length of the videos, blocks; 0 = the recipe's."""
    environment: str = ""
    """Environment of VBench: vbench, or the path of a Python.
    `kvpo reward-env create vbench` makes the first; default: only the videos are written."""
    mode: Literal["custom_input", "vbench_standard"] = "custom_input"
    """Set of prompts: any ones, or VBench's own.
    custom_input: any prompts, 10 dimensions and no total; vbench_standard: VBench's own prompts,
    all 16 dimensions."""
    dimensions: tuple[str, ...] = ()
    """Default: all that the mode has."""
    out: Path = Path("runs/vbench")
    device: str = "auto"

    def __call__(self) -> None:
        from kvpo.evaluation.vbench import measure, named_scripts, table, totals
        from kvpo.generators.readable import check_prompts
        from kvpo.runs.loading import pipeline_folder

        python, dimensions = self.environment and python_of(self.environment), self.chosen()
        config, progress = load_config(recipe_path(self.recipe)), Progress()
        scripts = named_scripts(self.prompts, self.extended, self.blocks or config.data.blocks)
        if self.mode == "vbench_standard" and len(scripts) != SETS["vbench"].scripts:
            raise ValueError(
                f"{self.prompts} has {len(scripts)} prompts, but VBench's own mode looks for its {SETS['vbench'].scripts} and passes over what is missing; write them by `kvpo prompts vbench`"
            )
        try_folder(self.out)
        check_prompts(pipeline_folder(self.generator), scripts, progress.warn)
        progress.log(
            f"kvpo vbench {self.generator}: {len(scripts)} prompts with {len(self.seeds)} videos each, into {self.out}"
        )
        label = self.write_videos(scripts, config, progress)
        if not python:
            progress.say(
                f"{len(scripts) * len(self.seeds)} videos in {self.out / 'videos'}; measure them with the same command and --environment vbench"
            )
            return
        scores = measure(
            python,
            self.out / "videos",
            self.out / "results" / self.mode,
            dimensions,
            self.mode,
            progress,
        )
        record = {
            "label": label,
            "mode": self.mode,
            "prompts": len(scripts),
            "seeds": self.seeds,
            "scores": scores,
            **totals(scores),
            "command": command(),
        }
        write_atomic(self.out / "vbench.json", json.dumps(record, indent=1) + "\n")
        progress.say(f"{table(scores)}\nwritten to {self.out / 'vbench.json'}")

    def chosen(self) -> list[str]:
        """Dimensions to measure.  ValueError where the mode, or VBench, has not got them."""
        from kvpo.evaluation.vbench import DIMENSIONS, INDEXES

        there = [
            name for name, d in DIMENSIONS.items() if d.custom or self.mode == "vbench_standard"
        ]
        if wrong := [name for name in self.dimensions if name not in there]:
            raise ValueError(
                f"--dimensions {' '.join(wrong)}: not in mode {self.mode}, which has others; choose from {', '.join(there)}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))}: give at least one seed and each once, equal ones would make equal videos"
            )
        if self.mode == "vbench_standard" and len(self.seeds) != INDEXES:
            raise ValueError(
                f"{len(self.seeds)} seeds, but VBench's own mode looks for {INDEXES} videos of every prompt and passes over what is missing; give {INDEXES} --seeds"
            )
        return list(self.dimensions) or there

    def write_videos(self, scripts: Sequence[Script], config: RunConfig, progress: Progress) -> str:
        """Write the videos that are not there yet; returns the generator's label.

        Raises ValueError where those that are there are of something else.
        """
        from kvpo.evaluation.vbench import video_name
        from kvpo.generators.generate import write_missing
        from kvpo.generators.sampler import SAMPLERS
        from kvpo.runs.loading import load_generator

        with progress.timed("loading the generator"):
            pipeline, label = load_generator(
                self.generator, pick_device(self.device), config.vae_dtype, config.dtype
            )
        made = self.out / "videos.json"
        record = {
            "label": label,
            "sampler": config.sampler,
            "seeds": list(self.seeds),
            "scripts": [[s.id, s.texts[0], s.blocks] for s in scripts],
        }
        if made.exists() and json.loads(made.read_text(encoding="utf-8")) != record:
            raise ValueError(
                f"{self.out} holds videos of another generator, or of other prompts, seeds or length (see {made}); give another --out"
            )
        write_atomic(made, json.dumps(record, indent=1) + "\n")
        videos = [
            (s, seed, self.out / "videos" / video_name(s.id, i))
            for s in scripts
            for i, seed in enumerate(self.seeds)
        ]
        write_missing(pipeline, SAMPLERS[config.sampler], videos, label, progress)
        return label
