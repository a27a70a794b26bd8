"""The main path: KVPO, stage by stage, in the paper's order. Read `Alignment.group` and
`Alignment.learn` first.

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
from kvpo.common.wording import count_of
from kvpo.config import RunConfig
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
from kvpo.method.update import Updater, group_means
from kvpo.method.velocity_penalty import held_velocities
from kvpo.policy.policy import Policy
from kvpo.report.report import write_report
from kvpo.report.samples import show_group
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
        self.ranks = Ranks.join(self.device, config.patience)
        self.column, self.row = self.ranks.split(config.branch_parallel, config.patience)
        """The ranks with other groups, and those that share this one's."""
        self.column.share(config.groups)
        with progress.timed("loading the rewards"):
            self.judges, self.advantages = judges(config, self.device)
        self.rewards = trained(self.judges)
        refuse_frozen(self.rewards, calibration_clips(config), self.advantages.weights)
        self.source, self.scripts = (
            script_source(config),
            evaluation_scripts(config),
        )  # read now: a malformed file must not show itself after the training
        written = (
            (*self.source.scripts, *self.scripts)
            if isinstance(self.source, PromptSet)
            else self.scripts
        )
        check_prompts(folder_of(config.pipeline), written, progress.warn)
        with progress.timed("loading the generator"):
            self.pipeline = self._load_pipeline()
        if config.gradient_checkpointing:
            self.pipeline.generator.transformer.enable_gradient_checkpointing()
        self.policy = Policy(self.pipeline.generator, config.policy, config.seed, self.ranks)
        self.agreement, sketch = (
            Agreement(config.agreement),
            Sketch(len(self.policy.names), config.seed) if config.agreement.window else None,
        )
        self.updater = Updater(
            self.policy,
            config.optimizer,
            config.objective,
            config.temperature,
            config.unsafe,
            config.groups,
            self.row,
            sketch,
        )
        check_room(config.exploring, config.rollout, config.data.blocks, self.pipeline.geometry)
        config.energy.step_weights(
            self.pipeline.geometry.sigmas
        )  # refused now where they do not fit the generator's steps
        config.velocity_penalty.check(self.pipeline.geometry)
        self.sampler = SAMPLERS[config.sampler]
        self.phases = Phases(self._tell, progress.ended)
        self.silent = 0
        """Groups that could not be measured, the last ones on end."""
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

    def run(self, resume: bool, override: bool) -> Path:
        """Train, checkpoint, evaluate; the path of the report. FloatingPointError or ValueError
        before an update that must not happen, `Stopped` after a signal: the steps before are
        saved."""
        with self.state:
            start = self.state.begin(resume, override)
            log = (
                MetricLog(self.out, resume_after=start - 1 if resume else None)
                if self.ranks.first
                else NoLog()
            )
            with (
                stoppable(),
                log,
                self.state.saver,
                self.progress.bar("align", self.config.steps, start) as bar,
            ):
                try:
                    self._train(log, bar)
                except (
                    Stopped,
                    ValueError,
                    FloatingPointError,
                ):  # all ranks raise these, so all can save
                    self.state.save_what_is_left(self.trials.best(self.done))
                    raise
            self.ranks.only_first(lambda: write_report(self.out))
        return self.out / "report.html"

    def _tell(self, doing: str) -> None:
        """What begins now, to those who wait for this rank and to who watches."""
        self.ranks.tell(doing)
        self.progress.phase(doing.rstrip(","))

    @property
    def done(self) -> int:
        """Steps in all."""
        return self.state.done

    def _train(self, log: MetricLog | NoLog, bar: Bar) -> None:
        """The steps that are left, and the evaluations between and behind them."""
        if self.trials.missing(self.done):  # killed between a checkpoint and its evaluation
            log.write(self.done - 1, self.trials.evaluate(self.done))
        while not self.trials.must_stop(self.done, log) and self.done < self.config.steps:
            metrics = self.step(self.done)
            log.write(self.done, metrics)
            self.state.done += 1
            self.phases.where = f" after {count_of(self.done, 'step')},"
            bar.advance(console_line(self.done, metrics, self.config.steps), log=True)
            if self.done % self.config.checkpoint.every == 0 or self.trials.due(self.done):
                self._save()
            if self.trials.due(self.done):
                log.write(self.done - 1, self.trials.evaluate(self.done))
        self._save()
        if not self.trials.due(
            self.done
        ):  # a run that was killed in its last evaluation has only this left to do
            log.write(self.done - 1, self.trials.evaluate(self.done))

    def _save(self) -> None:
        with self.phases("checkpoint"):
            self.state.save(self.trials.best(self.done))

    def step(self, step: int) -> dict[str, float]:
        """All groups of a step, this rank's share of them here, then the update on them, or
        several."""
        calls = self.pipeline.generator.calls
        with self.phases("total"):
            own, learnt = self._first_pass(step)
            found = [
                self._update(own, last=self.config.inner_updates == 1)
                | self.agreement.take(self.ranks)
            ]
            if self.config.inner_updates > 1:
                found += self._further_updates(step, learnt)
            metrics = all_updates(found)
        return (
            metrics
            | self.phases.take()
            | {
                "memory/peak_gib": take_peak(self.device) / 2**30,
                "calls/generator": self.pipeline.generator.calls - calls,
            }
        )

    def _first_pass(self, step: int) -> tuple[dict[int, dict[str, float]], list[Learnt]]:
        """Explore and learn from this rank's groups, one after another, or where the step's
        spread is asked for all of them before any is learnt from."""
        with self.policy.for_groups():
            if self.config.advantages.std == "group":
                return self.ranks.together(
                    lambda: self._learn_all(step, self._explored(step), None)
                )
            kept = self.ranks.together(lambda: list(self._explored(step)))
            spread = spread_of(
                self.column.gather({k.index: k.variances for k in kept if k.variances is not None})
            )
            return self.ranks.together(lambda: self._learn_all(step, kept, spread))

    def _explored(self, step: int) -> Iterator[Kept]:
        """This rank's groups of a step, as many prefixes at a time as are generated side by
        side."""
        # a disk that is full is no reason to train on until the next checkpoint
        self.state.saver.check()
        own, size = list(self.column.share(self.config.groups)), self.config.rollout.prefixes
        for part in (own[first : first + size] for first in range(0, len(own), size)):
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
            learnt += [again] if again is not None and self.config.inner_updates > 1 else []
            del group, again
        return metrics, learnt

    def _further_updates(self, step: int, learnt: list[Learnt]) -> list[dict[str, float]]:
        """The second to the last update on a step's groups. A signal waits until they are made:
        between them the weights are no step's."""
        found, n = [], self.config.inner_updates
        self.state.midway = True
        with not_now():
            for made in range(1, n):
                with self.policy.for_groups():
                    own = self.ranks.together(
                        lambda: {k.index: self._learn_again(step, made, k) for k in learnt}  # noqa: B023, called at once
                    )
                found.append(self._update(own, last=made == n - 1))
        self.state.midway = False
        return found

    def _learn_again(self, step: int, made: int, learnt: Learnt) -> dict[str, float]:
        with self._saying(step, [learnt.index], made):
            update = self.updater.accumulate(
                learnt.replay, learnt.advantage, self.phases, learnt.update
            )
            return update.metrics | self._hold(learnt.replay.rollout, learnt.replay.embeddings)

    def _update(self, own: dict[int, dict[str, float]], last: bool) -> dict[str, float]:
        """One update from the gradients of all ranks' groups; the mean of their metrics, and its
        own."""
        groups = {
            index: found
            for part in self.ranks.gather(own if self.row.first else {})
            for index, found in part.items()
        }
        self._refuse_silence(
            [groups[index].get("group/unmeasurable", 0.0) for index in sorted(groups)]
        )
        metrics = group_means([groups[index] for index in sorted(groups)])
        with self.phases("optimizer"):
            self.policy.layout.add_gradients()
            metrics |= self.updater.step(last)
        return metrics

    def _refuse_silence(self, unmeasurable: Sequence[float]) -> None:
        """ValueError, on all ranks, where group after group had no rewards: one is bad luck, but
        a reward that never measures teaches nothing."""
        for lost in unmeasurable:
            self.silent = self.silent + 1 if lost else 0
        if self.silent >= MOST_SILENT:
            raise ValueError(
                f"{self.silent} groups in a row could not be measured; the reward that gives nothing is named above, where they were skipped"
            )

    @contextmanager
    def _saying(self, step: int, groups: Sequence[int], made: int = 0) -> Iterator[None]:
        """When it was, to those who wait for this rank, and of a reward, an energy or an
        advantage that can not be. ``made``: updates of the step so far."""
        when = f"step {step}, group {', '.join(map(str, groups))}"
        self.phases.where = f" of {when},"
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
            applied = (
                f"{made} of the step's {self.config.inner_updates} updates were applied"
                if made
                else "Nothing of this step was applied"
            )
            raise kind(f"{when}: {error}. {applied}") from error

    def starts(self, step: int, groups: Sequence[int]) -> list[Start]:
        """The pasts of some groups of a step, up to their forks."""
        config, names, scripts = (
            self.config,
            [("train", step, i) for i in groups],
            [self.source.script(step, i) for i in groups],
        )
        embeddings = self.row.together(
            lambda: {text: e for script in scripts for text, e in self.embed(script).items()}
        )
        held = [
            functools.partial(self._held, script, stream(config.seed, *name, "hold"))
            for script, name in zip(scripts, names)
        ]

        def generated() -> list[Start]:
            with self.policy.using(self.policy.behaviour), self.phases("prefix"):
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

        return self.row.together(generated)

    def group(self, step: int, index: int, start: Start) -> Kept:
        """One script from its past on: explore, and score."""
        config, name, script, embeddings = (
            self.config,
            ("train", step, index),
            start.script,
            start.past.embeddings,
        )
        rollout, own, pixels = self.row.together(
            lambda: self.explore(script, embeddings, name, start=start)
        )
        rewards = all_rewards(self.row, own)
        spread_of_own = (
            variances(rewards) if config.advantages.std == "step" and measurable(rewards) else None
        )
        shown = config.show_every and step % config.show_every == 0 and index == 0
        return Kept(
            index,
            rollout,
            embeddings,
            rewards,
            pixels if shown else None,
            spread_of_own,
            _group_metrics(rollout, pixels, self.row),
        )

    def learn(
        self, step: int, group: Kept, spread: Spread | None
    ) -> tuple[dict[str, float], Learnt | None]:
        """And add its gradient; its metrics, and what a further update on it needs. A group that
        can not be measured is skipped, but for the penalty."""
        config, rollout, rewards = self.config, group.rollout, group.rewards
        try:
            advantage = self.advantages(rewards, spread)
        except Unmeasurable as reason:
            self.progress.say(f"step {step}, group {group.index} is skipped: {reason}")
            return {"group/unmeasurable": 1.0, "group/skipped": 1.0} | self._hold(
                rollout, group.embeddings
            ) | group.metrics, None
        agreement = conflicts(
            rewards.components, self.advantages.by_component(advantage)[:, rewards.valid[:-1]]
        )
        if config.shuffle_advantages:
            advantage = _shuffled(
                advantage, stream(config.seed, "train", step, group.index, "shuffle")
            )
        if config.zero_advantages:
            advantage = replace(advantage, values=torch.zeros_like(advantage.values))
        members = range(rollout.num_branches + (config.advantages.anchor and self.row.last))
        replay = Replay(
            self.pipeline,
            rollout,
            group.embeddings,
            CONTEXTS[config.context],
            config.energy,
            members,
            config.rows_per_pass,
            config.rollout.together,
        )
        update = self.updater.accumulate(replay, advantage, self.phases)
        if self.row.first:
            self.agreement.note(group.index, update.sketch)
        penalty = self._hold(rollout, group.embeddings)
        if group.pixels is not None:
            plans, shown = all_rows(self.row, rollout, group.pixels)
            self.row.only_first(
                lambda: show_group(
                    self.out,
                    step,
                    self.pipeline,
                    replace(rollout, plans=plans),
                    shown,
                    rewards,
                    advantage,
                    update,
                    config.exploring,
                )
            )
        found = (
            {"group/unmeasurable": 0.0}
            | update.metrics
            | penalty
            | advantage.metrics
            | agreement
            | _reward_metrics(rewards)
            | group.metrics
        )
        return found | (spread.metrics(rewards.components) if spread else {}), Learnt(
            group.index, replay, advantage, update
        )

    def _hold(self, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Add the gradient of the velocity penalty on a group's held blocks."""
        penalty = self.config.velocity_penalty

        def velocities():
            return [
                held_velocities(self.pipeline, rollout, embeddings, b, penalty.steps)
                for b in rollout.held
            ]

        return self.row.together(
            lambda: self.updater.hold(penalty, velocities, self.phases) if self.row.first else {}
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
        """A group of the behaviour policy (this rank's branches of it, and the anchor), its
        rewards, and its pixels from the fork on. ``name`` names its streams; ``explorer``:
        default the recipe's; ``start``: its past, where that is there already; the rest as in
        `roll_out`."""
        config, explorer = self.config, explorer or self.config.exploring
        seen, own = (
            functools.partial(
                horizon, script, geometry=self.pipeline.geometry, config=config.score
            ),
            self.row.stretch(config.rollout.branches),
        )
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

    def _held(self, script: Script, generator: torch.Generator, fork: int) -> list[int]:
        """Opening blocks of a group that the velocity penalty holds."""
        config, geometry = self.config, self.pipeline.geometry
        opening = config.exploring.eligible_forks(script.blocks, geometry)[0]
        return config.velocity_penalty.draw(
            script, fork, opening, geometry, config.rollout.cache_frames, generator
        )

    def _load_pipeline(self) -> Pipeline:
        config = self.config
        if not isinstance(
            self.source, PromptSet
        ):  # stories without end: their texts are met one by one
            return load_pipeline(config.pipeline, self.device, config.vae_dtype, config.dtype)
        texts = sorted(
            {text for script in (*self.source.scripts, *self.scripts) for text in script.texts}
        )
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
        """Prompt -> [L, D]."""
        return dict(zip(script.texts, self.pipeline.encode_text(script.texts)))


def _shuffled(advantage: Advantage, generator: torch.Generator) -> Advantage:
    order = torch.randperm(len(advantage.values), generator=generator)
    return replace(advantage, values=advantage.values[order])


def _reward_metrics(rewards: RewardTable) -> dict[str, float]:
    metrics = {}
    for signal, r_KB in (("local", rewards.local), ("global", rewards.global_)):
        for name, r_B in zip(rewards.components, r_KB[:, rewards.valid]):
            metrics |= {
                f"reward/{signal}/{name}/{k}": float(v)
                for k, v in (
                    ("mean", r_B[:-1].mean()),
                    ("anchor", r_B[-1]),
                    ("best", r_B[:-1].max()),
                    ("std", r_B.std()),
                )
            }
    return metrics


def _group_metrics(rollout: Rollout, pixels: torch.Tensor, row: Ranks) -> dict[str, float]:
    length = 4 * rollout.trajectory.clean.shape[1] * rollout.trajectory.clean.shape[2]
    return {
        "group/fork": rollout.window.fork,
        "diversity/pixel": pixel_diversity(pixels[:-1, :length], row),
    }
