"""The parts of a run, before it has a folder: rewards, stories, generator, weights, updater.

`kvpo doctor` and the benchmarks ask them for groups without a run around them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kvpo.common.environment import make_reproducible, pick_device
from kvpo.common.progress import Progress
from kvpo.common.rng import Name, stream
from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.distributed.ranks import Ranks
from kvpo.generators.backends import use_backend
from kvpo.generators.compiled import compile_blocks
from kvpo.generators.embeddings import load_with_texts
from kvpo.generators.geometry import pixel_span
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.preview import read_preview
from kvpo.generators.readable import check_prompts
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.agreement import Agreement
from kvpo.method.explorers import Explorer, forks_of
from kvpo.method.forks import check_room, draw_fork, spread_forks
from kvpo.method.prefix import Start
from kvpo.method.rollout import roll_out, roll_out_branches, start_groups
from kvpo.method.score import horizon, score
from kvpo.method.sketch import Sketch
from kvpo.method.update import Updater
from kvpo.policy.policy import Policy
from kvpo.rewards.calibration import refuse_frozen
from kvpo.runs.build import calibration_clips, evaluation_scripts, judges, script_source, trained
from kvpo.runs.loading import load_pipeline, start_of
from kvpo.types import RewardTable, Rollout, Script


class Parts:
    """The parts of a run, which explore groups."""

    def __init__(self, config: RunConfig, progress: Progress, out: Path | None = None):
        """Load everything; what a user may have got wrong is read first.

        ``out``: the folder of a run that may go on there, with the start that it has kept.
        ValueError or FileNotFoundError where rewards, prompts, generator and settings do not fit.
        """
        self.config, self.progress = config, progress
        self.device = pick_device(config.device)
        make_reproducible(self.device)
        self.phases = Phases(self._tell, progress.ended)
        self.ranks = Ranks.join(self.device, config.patience)
        # The ranks of a column have other groups; those of a row share this one's group.
        self.column, self.row = self.ranks.split(config.branch_parallel, config.patience)
        self.column.share(config.groups)

        # What a user may have got wrong is read before the generator is loaded, and nothing is
        # left to show itself after the training.
        with self.ranks.together():
            start = start_of(config.pipeline, out)
        # one of another run, which may train on meanwhile, is the same on all ranks
        self.start = self.ranks.gather(start)[0]
        preview = None
        if config.score.preview:
            preview = read_preview(Path(config.score.preview), self.start.folder)
        with progress.timed("loading the rewards"):
            self.judges, self.advantages = judges(config, self.device)
        self.rewards = trained(self.judges)
        refuse_frozen(self.rewards, calibration_clips(config), self.advantages.weights)
        self.source = script_source(config)
        self.scripts = evaluation_scripts(config)
        check_prompts(self.start.folder, self._written_scripts(), progress.warn)

        with progress.timed("loading the generator"):
            self.pipeline = self._load_pipeline()
            self._take_start()
        if preview is not None:
            self.pipeline.preview = preview.to(self.device, getattr(torch, config.vae_dtype))
        geometry = self.pipeline.geometry
        check_room(config.exploring, config.rollout, config.data.blocks, geometry)
        for script in self._written_scripts():
            forks_of(config.exploring, script, geometry)
        config.energy.step_weights(geometry.sigmas)  # refused here where they do not fit its steps
        config.velocity_penalty.check(geometry)
        self.sampler = SAMPLERS[config.sampler]
        use_backend(self.pipeline.generator, config.attention)
        if config.gradient_checkpointing:
            self.pipeline.generator.transformer.enable_gradient_checkpointing()
        if config.compile:
            compile_blocks(self.pipeline.generator)

        self.policy = Policy(self.pipeline.generator, config.policy, config.seed, self.ranks)
        self.agreement = Agreement(config.agreement)
        self.updater = self._new_updater()

    def _new_updater(self) -> Updater:
        config = self.config
        sketch = Sketch(len(self.policy.names), config.seed) if config.agreement.window else None
        return Updater(
            self.policy,
            config.optimizer,
            config.objective,
            config.temperature,
            config.unsafe,
            config.groups,
            self.row,
            sketch,
        )

    def _written_scripts(self) -> Sequence[Script]:
        """The scripts that are known in advance: stories without end are told one by one."""
        return (*(self.source.scripts or ()), *self.scripts)

    def _tell(self, doing: str) -> None:
        """Say what begins now, to the ranks that wait for this one and on the terminal."""
        self.ranks.tell(doing)
        self.progress.phase(doing.rstrip(","))

    def _load_pipeline(self) -> Pipeline:
        config = self.config
        if self.source.scripts is None:
            # Stories without end: their texts are met one by one, so the encoder stays.
            folder = str(self.start.folder)
            return load_pipeline(folder, self.device, config.vae_dtype, config.dtype)
        texts = sorted({text for script in self._written_scripts() for text in script.texts})
        with self.progress.bar("embed prompts", len(texts)) as bar:
            return load_with_texts(
                self.start.folder,
                texts,
                self.device,
                getattr(torch, config.dtype),
                getattr(torch, config.vae_dtype),
                bar.move_to,
                self.progress.warn,
            )

    def _take_start(self) -> None:
        """Give the pipeline the weights of another run, where it starts from them; say which."""
        lost = self.start.put_into(self.pipeline)
        if (weights := self.start.weights) is None:
            return
        less = f", its adapter merged: rounding to {self.config.dtype} loses {100 * lost:.1f} % of what it adds"
        self.progress.say(f"starts from {weights.label}" + (less if lost >= 0.001 else ""))

    # What is asked of them.

    def embed(self, script: Script) -> dict[str, torch.Tensor]:
        """Prompt -> its embedding [L, D]."""
        return dict(zip(script.texts, self.pipeline.encode_text(script.texts)))

    def starts(self, step: int, groups: Sequence[int]) -> list[Start]:
        """The pasts of some groups of a step, up to their forks."""
        config = self.config
        names: list[Name] = [("train", step, i) for i in groups]
        stories: list[Name] = [("train", step, i % config.stories) for i in groups]
        scripts = [self.source.script(step, i % config.stories) for i in groups]
        embeddings: dict[str, torch.Tensor] = {}
        with self.row.together():
            for script in scripts:
                embeddings |= self.embed(script)
        held = [
            functools.partial(self._held, script, stream(config.seed, *name, "hold"))
            for script, name in zip(scripts, names)
        ]
        with self.row.together(), self.policy.rolling_out(), self.phases("prefix"):
            return start_groups(
                self.pipeline,
                self.sampler,
                config.exploring,
                config.rollout,
                scripts,
                embeddings,
                config.seed,
                names,
                held,
                [self._fork(s, step, i) for s, i in zip(scripts, groups)],
                stories,
            )

    def _fork(self, script: Script, step: int, group: int) -> int:
        """The fork block of a step's group: drawn for it alone, or spread over those it shares."""
        config, story = self.config, group % self.config.stories
        count, alike = config.rollout.forks, config.rollout.alike_forks
        eligible = self._eligible(script, step, story)
        if count == 1 and not alike:
            return draw_fork(eligible, config.seed, ("train", step, group))
        drawn_for: Name = ("train", step) if alike else ("train", step, story)
        generator = stream(config.seed, *drawn_for, "forks")
        return spread_forks(eligible, count, generator)[group // config.stories]

    def _eligible(self, script: Script, step: int, story: int) -> list[int]:
        """Fork blocks of a story; those that its source finds worth it, unless they are too few."""
        explorer, geometry = self.config.exploring, self.pipeline.geometry
        eligible = forks_of(explorer, script, geometry)
        windows = {
            fork: pixel_span((fork, fork + explorer.window_blocks), geometry) for fork in eligible
        }
        worth = self.source.worth_forking(step, story, windows)
        return worth if len(worth) >= self.config.rollout.forks else eligible

    def explore(
        self,
        script: Script,
        embeddings: Mapping[str, torch.Tensor],
        name: Name,
        explorer: Explorer | None = None,
        fork: int | None = None,
        start: Start | None = None,
    ) -> tuple[Rollout, RewardTable, torch.Tensor]:
        """A group of the behaviour policy, its rewards, and its pixels from the fork on.

        This rank's branches are made, and the anchor. ``name`` names the random streams;
        ``explorer``: default the recipe's; ``fork`` as in `roll_out`; ``start``: the group's past,
        where that is there already.
        """
        config, explorer = self.config, explorer or self.config.exploring
        seen = functools.partial(
            horizon, script, geometry=self.pipeline.geometry, config=config.score
        )
        own = self.row.stretch(config.rollout.branches)
        with self.policy.rolling_out():
            if start is None:
                rollout = roll_out(
                    self.pipeline,
                    self.sampler,
                    explorer,
                    config.rollout,
                    script,
                    embeddings,
                    config.seed,
                    name,
                    self.phases,
                    fork,
                    seen,
                    own=own,
                    needs=config.recorded,
                )
            else:
                rollout = roll_out_branches(
                    self.pipeline,
                    explorer,
                    config.rollout,
                    start,
                    config.seed,
                    name,
                    self.phases,
                    seen,
                    own,
                    config.recorded,
                )
        return rollout, *score(self.pipeline, rollout, self.rewards, config.score, self.phases)

    def _held(self, script: Script, generator: torch.Generator, fork: int) -> list[int]:
        """Opening blocks of a group that the velocity penalty holds."""
        config, geometry = self.config, self.pipeline.geometry
        opening = forks_of(config.exploring, script, geometry)[0]
        return config.velocity_penalty.draw(
            script, fork, opening, geometry, config.rollout.cache_frames, generator
        )
