"""The main path: KVPO, stage by stage, in the paper's order.

Read `Alignment.group` and `Alignment.learn` first.

prompts -> rollout -> score -> advantages -> replay -> loss -> update        then checkpoint, evaluate, report
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.common.environment import make_reproducible, pick_device, take_peak
from kvpo.common.metrics import MetricLog, NoLog, console_line
from kvpo.common.progress import Bar, Progress
from kvpo.common.rng import stream
from kvpo.common.timing import Phases
from kvpo.common.trackers import Trackers
from kvpo.common.wording import count_of
from kvpo.config import RunConfig, to_dict
from kvpo.distributed.branches import all_rewards, all_rows
from kvpo.distributed.ranks import Ranks
from kvpo.distributed.signals import Stopped, not_now, stoppable
from kvpo.generators.embeddings import load_with_texts
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.readable import check_prompts
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.advantages import Advantage, Unmeasurable, conflicts, measurable
from kvpo.method.agreement import Agreement
from kvpo.method.batch_spread import Spread, spread_of, variances
from kvpo.method.explorers import Explorer
from kvpo.method.kept_groups import Kept, Learnt, all_updates
from kvpo.method.prompts import PromptSet
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import Name, Start, check_room, go_on, roll_out, starts
from kvpo.method.score import horizon, pixel_diversity, score
from kvpo.method.sketch import Sketch
from kvpo.method.update import GroupUpdate, Updater, group_means
from kvpo.method.velocity_penalty import held_velocities
from kvpo.policy.policy import Policy
from kvpo.report.report import write_report
from kvpo.report.samples import show_group, shown_videos
from kvpo.rewards.calibration import refuse_frozen
from kvpo.runs.build import calibration_clips, evaluation_scripts, judges, script_source, trained
from kvpo.runs.loading import folder_of, load_pipeline
from kvpo.runs.monitor import Trials
from kvpo.runs.state import RunState
from kvpo.types import RewardTable, Rollout, Script

MOST_SILENT = 8
"""Groups in a row, over steps, that may have too few rewards to be compared."""


class Alignment:
    """A run: its parts, and the loop over them."""

    def __init__(self, config: RunConfig, out: Path, progress: Progress):
        self.config, self.out, self.progress = config, out, progress
        self.device = pick_device(config.device)
        make_reproducible(self.device)
        self.phases = Phases(self._tell, progress.ended)
        self.ranks = Ranks.join(self.device, config.patience)
        # The ranks of a column have other groups; those of a row share this one's group.
        self.column, self.row = self.ranks.split(config.branch_parallel, config.patience)
        self.column.share(config.groups)

        # What a user may have got wrong is read before the generator is loaded, and nothing is
        # left to show itself after the training.
        with progress.timed("loading the rewards"):
            self.judges, self.advantages = judges(config, self.device)
        self.rewards = trained(self.judges)
        refuse_frozen(self.rewards, calibration_clips(config), self.advantages.weights)
        self.source = script_source(config)
        self.scripts = evaluation_scripts(config)
        check_prompts(folder_of(config.pipeline), self._written_scripts(), progress.warn)

        with progress.timed("loading the generator"):
            self.pipeline = self._load_pipeline()
        geometry = self.pipeline.geometry
        check_room(config.exploring, config.rollout, config.data.blocks, geometry)
        config.energy.step_weights(geometry.sigmas)  # refused here where they do not fit its steps
        config.velocity_penalty.check(geometry)
        self.sampler = SAMPLERS[config.sampler]
        if config.gradient_checkpointing:
            self.pipeline.generator.transformer.enable_gradient_checkpointing()

        self.policy = Policy(self.pipeline.generator, config.policy, config.seed, self.ranks)
        self.agreement = Agreement(config.agreement)
        self.updater = self._new_updater()
        self.silent = 0
        """Groups in a row, the latest ones, that could not be measured."""
        self.state = RunState(
            config,
            out,
            progress,
            self.ranks,
            self.pipeline,
            self.policy,
            self.updater.optimizer,
            self.source,
            self.agreement,
        )
        self.trials = Trials(
            config,
            out,
            progress,
            self.ranks,
            self.phases,
            self.pipeline,
            self.policy,
            self.scripts,
            self.judges,
        )

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
        if isinstance(self.source, PromptSet):
            return (*self.source.scripts, *self.scripts)
        return self.scripts

    def run(self, resume: bool, override: bool) -> Path:
        """Train, checkpoint, evaluate; the path of the report.

        FloatingPointError or ValueError before an update that must not happen, `Stopped` after a
        signal: the steps before are saved.
        """
        with self.state:
            begun = self.state.begin(resume, override)
            log = NoLog()
            if self.ranks.first:
                log = self._log(begun - 1 if resume else None)
            bar = self.progress.bar("align", self.config.steps, begun)
            with stoppable(), log, self.state.saver, bar as shown:
                try:
                    self._train(log, shown)
                except (Stopped, ValueError, FloatingPointError):
                    # All ranks raise these, so all are here to save.
                    self.state.save_what_is_left(self.trials.best(self.done))
                    raise
            self.ranks.only_first(lambda: write_report(self.out))
        return self.out / "report.html"

    def _tell(self, doing: str) -> None:
        """Say what begins now, to the ranks that wait for this one and on the terminal."""
        self.ranks.tell(doing)
        self.progress.phase(doing.rstrip(","))

    @property
    def done(self) -> int:
        """Steps in all."""
        return self.state.done

    def _train(self, log: MetricLog | NoLog, bar: Bar) -> None:
        """The steps that are left, with the evaluations between and behind them."""
        if self.trials.missing(self.done):  # killed between a checkpoint and its evaluation
            self._evaluate(log)
        while not self.trials.must_stop(self.done, log) and self.done < self.config.steps:
            metrics = self.step(self.done)
            log.write(self.done, metrics, shown_videos(self.out, "groups", self.done))
            self.state.done += 1
            self.phases.where = f" after {count_of(self.done, 'step')},"
            bar.advance(console_line(self.done, metrics, self.config.steps), log=True)
            if self.done % self.config.checkpoint.every == 0 or self.trials.due(self.done):
                self._save()
            if self.trials.due(self.done):
                self._evaluate(log)
        self._save()
        if not self.trials.due(self.done):
            self._evaluate(log)

    def _evaluate(self, log: MetricLog | NoLog) -> None:
        metrics = self.trials.evaluate(self.done)
        log.write(self.done - 1, metrics, shown_videos(self.out, "samples", self.done))

    def _log(self, resume_after: int | None) -> MetricLog:
        """Open the run's log, and its trackers."""
        settings = to_dict(self.config)
        trackers = Trackers(self.config.trackers, self.out, settings, resume_after)
        return MetricLog(self.out, resume_after, trackers)

    def _save(self) -> None:
        with self.phases("checkpoint"):
            self.state.save(self.trials.best(self.done))

    # ----------------------------------------------------------------------------- one step

    def step(self, step: int) -> dict[str, float]:
        """Explore and learn from this rank's share of a step's groups, then update.

        There are ``inner_updates`` updates. Returned are the step's metrics.
        """
        calls_before = self.pipeline.generator.calls
        with self.phases("total"):
            of_groups, learnt = self._first_pass(step)
            found = self._update(of_groups, last=self.config.inner_updates == 1)
            updates = [found | self.agreement.take(self.ranks)]
            if self.config.inner_updates > 1:
                updates += self._further_updates(step, learnt)
        metrics = all_updates(updates) | self.phases.take()
        metrics["memory/peak_gib"] = take_peak(self.device) / 2**30
        metrics["calls/generator"] = self.pipeline.generator.calls - calls_before
        return metrics

    def _first_pass(self, step: int) -> tuple[dict[int, dict[str, float]], list[Learnt]]:
        """Explore this rank's groups and learn from each of them.

        Group by group, so that only one is held at a time. Where rewards are divided by the
        step's standard deviation, all groups must be explored before the first is learnt from.
        """
        with self.policy.for_groups():
            if self.config.advantages.std == "group":
                with self.ranks.together():
                    return self._learn_all(step, self._explored(step), None)
            with self.ranks.together():
                kept = list(self._explored(step))
            own = {group.index: group.variances for group in kept if group.variances is not None}
            spread = spread_of(self.column.gather(own))
            with self.ranks.together():
                return self._learn_all(step, kept, spread)

    def _explored(self, step: int) -> Iterator[Kept]:
        """This rank's groups of a step, explored and scored; prefixes side by side, as asked."""
        # A disk that is full is no reason to train on until the next checkpoint.
        self.state.saver.check()
        own = list(self.column.share(self.config.groups))
        size = self.config.rollout.prefixes
        for first in range(0, len(own), size):
            part = own[first : first + size]
            with self._saying(step, part):
                begun = self.starts(step, part)
            for index in part:
                with self._saying(step, [index]):
                    found = self.group(step, index, begun.pop(0))
                yield found.slim() if self.config.keeps_groups else found
                del found  # before the next one is explored

    def _learn_all(
        self, step: int, groups: Iterable[Kept], spread: Spread | None
    ) -> tuple[dict[int, dict[str, float]], list[Learnt]]:
        """Metrics of every group, and what further updates need of them."""
        metrics, learnt = {}, []
        for group in groups:
            with self._saying(step, [group.index]):
                metrics[group.index], again = self.learn(step, group, spread)
            if again is not None and self.config.inner_updates > 1:
                learnt.append(again)
            del group, again  # before the next one is explored
        return metrics, learnt

    def _further_updates(self, step: int, learnt: list[Learnt]) -> list[dict[str, float]]:
        """The second to the last update on a step's groups. A signal waits until they are made:
        between them the weights are no step's."""
        found, n = [], self.config.inner_updates
        self.state.midway = True
        with not_now():
            for made in range(1, n):
                own = {}
                with self.policy.for_groups(), self.ranks.together():
                    for group in learnt:
                        own[group.index] = self._learn_again(step, made, group)
                found.append(self._update(own, last=made == n - 1))
        self.state.midway = False
        return found

    def _update(self, own: dict[int, dict[str, float]], last: bool) -> dict[str, float]:
        """Update once from the gradients of all ranks' groups.

        Returned are the mean of the groups' metrics, and the update's own.
        """
        # The ranks of a row share a group, so its first rank alone speaks for it.
        parts = self.ranks.gather(own if self.row.first else {})
        groups = [found for part in parts for found in part.items()]
        of_groups = [metrics for _index, metrics in sorted(groups, key=lambda found: found[0])]
        self._refuse_silence([found.get("group/unmeasurable", 0.0) for found in of_groups])
        metrics = group_means(of_groups)
        with self.phases("optimizer"):
            self.policy.layout.add_gradients()
            metrics |= self.updater.step(last)
        return metrics

    def _refuse_silence(self, unmeasurable: Sequence[float]) -> None:
        """Raise ValueError, on all ranks, where group after group had no rewards.

        One is bad luck, but a reward that never measures teaches nothing.
        """
        for lost in unmeasurable:
            self.silent = self.silent + 1 if lost else 0
        if self.silent >= MOST_SILENT:
            raise ValueError(
                f"{self.silent} groups in a row could not be measured; the reward that gives nothing is named above, where they were skipped; correct it or leave it out"
            )

    @contextmanager
    def _saying(self, step: int, groups: Sequence[int], made: int = 0) -> Iterator[None]:
        """A context whose errors say which step and groups they are of.

        So does what other ranks read while they wait. ``made``: updates of the step so far.
        """
        when = f"step {step}, group {', '.join(map(str, groups))}"
        self.phases.where = f" of {when},"
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
            applied = "Nothing of this step was applied"
            if made:
                n = self.config.inner_updates
                applied = f"{made} of the step's {n} updates were applied"
            raise kind(f"{when}: {error}. {applied}") from error

    # ---------------------------------------------------------------------------- one group

    def starts(self, step: int, groups: Sequence[int]) -> list[Start]:
        """The pasts of some groups of a step, up to their forks."""
        config = self.config
        names: list[Name] = [("train", step, i) for i in groups]
        scripts = [self.source.script(step, i) for i in groups]
        embeddings: dict[str, torch.Tensor] = {}
        with self.row.together():
            for script in scripts:
                embeddings |= self.embed(script)
        held = [
            functools.partial(self._held, script, stream(config.seed, *name, "hold"))
            for script, name in zip(scripts, names)
        ]
        with self.row.together(), self.policy.using(self.policy.behaviour), self.phases("prefix"):
            return starts(
                self.pipeline,
                self.sampler,
                config.exploring,
                config.rollout,
                scripts,
                embeddings,
                config.seed,
                names,
                held,
            )

    def group(self, step: int, index: int, start: Start) -> Kept:
        """One script from its past on: explore, and score."""
        config, embeddings = self.config, start.past.embeddings
        with self.row.together():
            rollout, own, pixels = self.explore(
                start.script, embeddings, ("train", step, index), start=start
            )
        rewards = all_rewards(self.row, own)
        compared = config.advantages.std == "step" and measurable(rewards)
        shown = config.show_every and step % config.show_every == 0 and index == 0
        return Kept(
            index,
            rollout,
            embeddings,
            rewards,
            pixels if shown else None,
            variances(rewards) if compared else None,
            _group_metrics(rollout, pixels, self.row),
        )

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

        Of the group it is this rank's branches, and the anchor. ``name`` names its random streams; ``explorer``: default the recipe's; ``start``: its
        past, where that is there already; ``fork`` as in `roll_out`.
        """
        config, explorer = self.config, explorer or self.config.exploring
        seen = functools.partial(
            horizon, script, geometry=self.pipeline.geometry, config=config.score
        )
        own = self.row.stretch(config.rollout.branches)
        with self.policy.using(self.policy.behaviour):
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
                )
            else:
                rollout = go_on(
                    self.pipeline,
                    explorer,
                    config.rollout,
                    start,
                    config.seed,
                    name,
                    self.phases,
                    seen,
                    own,
                )
        return rollout, *score(self.pipeline, rollout, self.rewards, config.score, self.phases)

    def learn(
        self, step: int, group: Kept, spread: Spread | None
    ) -> tuple[dict[str, float], Learnt | None]:
        """Add a group's gradient to the step's; its metrics, and what a further update needs.

        A group that can not be measured adds nothing but the velocity penalty's gradient.
        """
        try:
            advantage = self.advantages(group.rewards, spread)
        except Unmeasurable as reason:
            self.progress.say(f"step {step}, group {group.index} is skipped: {reason}")
            metrics = {"group/unmeasurable": 1.0, "group/skipped": 1.0}
            return metrics | self._hold(group.rollout, group.embeddings) | group.metrics, None
        metrics = (
            {"group/unmeasurable": 0.0} | advantage.metrics | self._conflicts(group, advantage)
        )
        advantage = self._controlled(advantage, step, group.index)
        replay = self._replay(group)
        update = self.updater.accumulate(replay, advantage, self.phases)
        if self.row.first:
            self.agreement.note(group.index, update.sketch)
        metrics |= update.metrics | self._hold(group.rollout, group.embeddings)
        metrics |= _reward_metrics(group.rewards) | group.metrics
        if spread:
            metrics |= spread.metrics(group.rewards.components)
        if group.pixels is not None:
            self._show(step, group, advantage, update)
        return metrics, Learnt(group.index, replay, advantage, update)

    def _learn_again(self, step: int, made: int, learnt: Learnt) -> dict[str, float]:
        """Add the gradient of a group that an earlier update of the step has learnt from."""
        with self._saying(step, [learnt.index], made):
            update = self.updater.accumulate(
                learnt.replay, learnt.advantage, self.phases, learnt.update
            )
            return update.metrics | self._hold(learnt.replay.rollout, learnt.replay.embeddings)

    def _conflicts(self, group: Kept, advantage: Advantage) -> dict[str, float]:
        """Metrics of how far the rewards agree about the group's branches."""
        by_component = self.advantages.by_component(advantage)
        valid = group.rewards.valid[:-1]
        return conflicts(group.rewards.components, by_component[:, valid])

    def _controlled(self, advantage: Advantage, step: int, index: int) -> Advantage:
        """The advantage as it is; in a control, shuffled among the branches or zero."""
        if self.config.shuffle_advantages:
            generator = stream(self.config.seed, "train", step, index, "shuffle")
            order = torch.randperm(len(advantage.values), generator=generator)
            advantage = replace(advantage, values=advantage.values[order])
        if self.config.zero_advantages:
            advantage = replace(advantage, values=torch.zeros_like(advantage.values))
        return advantage

    def _replay(self, group: Kept) -> Replay:
        config = self.config
        members = range(group.rollout.num_branches + (config.advantages.anchor and self.row.last))
        return Replay(
            self.pipeline,
            group.rollout,
            group.embeddings,
            CONTEXTS[config.context],
            config.energy,
            members,
            config.rows_per_pass,
            config.rollout.together,
        )

    def _show(self, step: int, group: Kept, advantage: Advantage, update: GroupUpdate) -> None:
        """Keep the group's videos and numbers for the report; all ranks of a row enter."""
        plans, pixels = all_rows(self.row, group.rollout, group.pixels)
        with self.row.together():
            if self.row.first:
                show_group(
                    self.out,
                    step,
                    self.pipeline,
                    replace(group.rollout, plans=plans),
                    pixels,
                    group.rewards,
                    advantage,
                    update,
                    self.config.exploring,
                )

    def _hold(self, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Add the gradient of the velocity penalty on a group's held blocks."""
        penalty = self.config.velocity_penalty

        def velocities() -> list[torch.Tensor]:
            return [
                held_velocities(self.pipeline, rollout, embeddings, block, penalty.steps)
                for block in rollout.held
            ]

        with self.row.together():
            return self.updater.hold(penalty, velocities, self.phases) if self.row.first else {}

    def _held(self, script: Script, generator: torch.Generator, fork: int) -> list[int]:
        """Opening blocks of a group that the velocity penalty holds."""
        config, geometry = self.config, self.pipeline.geometry
        opening = config.exploring.eligible_forks(script.blocks, geometry)[0]
        return config.velocity_penalty.draw(
            script, fork, opening, geometry, config.rollout.cache_frames, generator
        )

    # ------------------------------------------------------------------------ the generator

    def _load_pipeline(self) -> Pipeline:
        config = self.config
        if not isinstance(self.source, PromptSet):
            # Stories without end: their texts are met one by one, so the encoder stays.
            return load_pipeline(config.pipeline, self.device, config.vae_dtype, config.dtype)
        texts = sorted({text for script in self._written_scripts() for text in script.texts})
        with self.progress.bar("embed prompts", len(texts)) as bar:
            return load_with_texts(
                folder_of(config.pipeline),
                texts,
                self.device,
                getattr(torch, config.dtype),
                getattr(torch, config.vae_dtype),
                bar.move_to,
                self.progress.warn,
            )

    def embed(self, script: Script) -> dict[str, torch.Tensor]:
        """Prompt -> its embedding [L, D]."""
        return dict(zip(script.texts, self.pipeline.encode_text(script.texts)))


def _reward_metrics(rewards: RewardTable) -> dict[str, float]:
    """Mean, best and spread of every reward over a group's branches, and the anchor's."""
    metrics = {}
    for signal, r_KB in (("local", rewards.local), ("global", rewards.global_)):
        for name, r_B in zip(rewards.components, r_KB[:, rewards.valid]):
            branches, anchor = r_B[:-1], r_B[-1]
            of_name = f"reward/{signal}/{name}"
            metrics[f"{of_name}/mean"] = float(branches.mean())
            metrics[f"{of_name}/anchor"] = float(anchor)
            metrics[f"{of_name}/best"] = float(branches.max())
            metrics[f"{of_name}/std"] = float(r_B.std())
    return metrics


def _group_metrics(rollout: Rollout, pixels: torch.Tensor, row: Ranks) -> dict[str, float]:
    _branches, blocks, frames, *_ = rollout.trajectory.clean.shape
    in_window = pixels[:-1, : 4 * blocks * frames]
    return {
        "group/fork": rollout.window.fork,
        "diversity/pixel": pixel_diversity(in_window, row),
    }
