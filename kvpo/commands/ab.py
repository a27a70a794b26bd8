"""`kvpo ab`: a blind A/B page of two generators."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvpo.commands.options import Positional
from kvpo.common.environment import command, pick_device
from kvpo.common.files import must_be_new, try_folder
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path

if TYPE_CHECKING:
    from kvpo.evaluation.ab_pairs import Pair
    from kvpo.generators.geometry import Geometry


@dataclass(frozen=True)
class Ab:
    """Make a blind A/B page of two generators: same scripts, same noise, sides hidden.

    A second call goes on where the first stopped.
    """

    a: Positional[str]
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    b: Positional[str]
    """The other one."""
    recipe: str = "mini"
    """Recipe that sampler, length and scripts are taken from."""
    prompts: str = ""
    """Prompt file; default: what the recipe evaluates on."""
    scripts: int = 16
    seeds: tuple[int, ...] = (0,)
    """A pair of every script for each."""
    blocks: int = 0
    """Length of the videos, blocks; 0 = the recipe's."""
    apart: bool = False
    """Leave the videos beside the page; else it holds them itself where they are small."""
    out: Path = Path("runs/ab")
    device: str = "auto"

    def __call__(self) -> None:
        must_be_new(self.out / "page" / "index.html")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))}: give at least one seed and each once, equal ones would make equal pairs"
            )
        from kvpo.evaluation.ab_pairs import claim, draw_pairs
        from kvpo.generators.readable import check_prompts
        from kvpo.pages.ab import QUESTIONS, write_page
        from kvpo.runs.build import evaluation_scripts
        from kvpo.runs.loading import pipeline_folder

        config = load_config(recipe_path(self.recipe))
        config = replace(
            config,
            evaluate=replace(
                config.evaluate,
                scripts=self.scripts,
                prompts=self.prompts or config.evaluate.prompts,
            ),
        )
        config = replace(
            config, data=replace(config.data, blocks=self.blocks or config.data.blocks)
        )
        pairs = draw_pairs(evaluation_scripts(config), self.seeds, config.evaluate.seed)
        progress = Progress()
        try_folder(self.out)
        for name in (self.a, self.b):
            check_prompts(pipeline_folder(name), [pair.script for pair in pairs], progress.warn)
        geometry = self.write_videos("a", pairs, config, progress)
        self.write_videos("b", pairs, config, progress, geometry)
        study = hashlib.blake2b((self.out / "key.json").read_bytes(), digest_size=8).hexdigest()
        claim(self.out / "key.json", {"study": study, "command": command()})
        scripts = [pair.script for pair in pairs]
        write_page(self.out / "page", study, scripts, geometry, self.apart)
        progress.say(
            f"{len(pairs)} pairs, {len(QUESTIONS)} questions each\nfor the raters: {self.out}/page\nfor kvpo unblind, not for raters: {self.out}/key.json"
        )

    def write_videos(
        self,
        name: str,
        pairs: Sequence[Pair],
        config: RunConfig,
        progress: Progress,
        other: Geometry | None = None,
    ) -> Geometry:
        """Write one generator's videos, page/000-left.mp4 or -right.mp4 and so on.

        Those that are there already stay. Returns its geometry, alike the ``other``'s.
        """
        from kvpo.evaluation.ab_pairs import check_alike, claim
        from kvpo.generators.generate import write_missing
        from kvpo.generators.sampler import SAMPLERS
        from kvpo.runs.loading import load_generator

        pipeline, label = load_generator(
            getattr(self, name), pick_device(self.device), config.vae_dtype, config.dtype
        )
        check_alike(other or pipeline.geometry, pipeline.geometry)
        claim(
            self.out / "key.json",
            {name: label, "sampler": config.sampler, "pairs": [pair.record for pair in pairs]},
        )
        paths = [
            self.out / "page" / f"{number:03d}-{pair.side(name)}.mp4"
            for number, pair in enumerate(pairs)
        ]
        write_missing(
            pipeline,
            SAMPLERS[config.sampler],
            [(pair.script, pair.seed, path) for pair, path in zip(pairs, paths)],
            label,
            progress,
            blind=True,
        )
        return pipeline.geometry
