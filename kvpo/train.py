"""The main path: KVPO, stage by stage, in the paper's order.

Read `Alignment.group` and `Alignment.learn` first.

prompts -> rollout -> score -> advantages -> replay -> loss -> update        then checkpoint, evaluate, report
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.common.environment import take_peak
from kvpo.common.extras import require_extra
from kvpo.common.metric_log import MetricLog, NoLog
from kvpo.common.metrics import console_line
from kvpo.common.progress import Bar, Progress
from kvpo.common.rng import stream
from kvpo.common.trackers import Trackers
from kvpo.common.wording import count_of
from kvpo.config import RunConfig, to_dict
from kvpo.distributed.branches import all_rewards, all_rows
from kvpo.distributed.ranks import Ranks
from kvpo.distributed.signals import Stopped, not_now, stoppable
from kvpo.method.advantages import Advantage, Unmeasurable, conflicts, measurable
from kvpo.method.batch_spread import Spread, spread_of, variances
from kvpo.method.kept_groups import Kept, Learnt, all_updates
from kvpo.method.prefix import Start
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.score import pixel_diversity
from kvpo.method.update import GroupUpdate, group_means
from kvpo.method.velocity_penalty import held_velocities
from kvpo.report.report import write_report
from kvpo.report.samples import show_group, shown_videos
from kvpo.runs.monitor import Trials
from kvpo.runs.parts import Parts
from kvpo.runs.state import RunState
from kvpo.types import RewardTable, Rollout

MOST_SILENT = 8
"""Groups in a row, over steps, that may have too few rewards to be compared."""


class Alignment:
    """A run: its parts, its folder, and the loop over them."""

    def __init__(self, config: RunConfig, out: Path, progress: Progress):
        """Load the parts; ValueError where a package is missing comes first."""
        require_extra("a run's report", "report", ("matplotlib",))
        self.config, self.out, self.progress = config, out, progress
        self.parts = Parts(config, progress, out)
        self.state = RunState(self.parts, out)
        self.trials = Trials(self.parts, out)
        self.silent = 0
        """Groups in a row, the latest ones, that could not be measured."""

    def run(self, resume: bool, override: bool) -> Path:
        """Train, checkpoint, evaluate; the path of the report.

        FloatingPointError or ValueError before an update that must not happen, `Stopped` after a
        signal: the steps before are saved.
        """
        with self.state:
            begun = self.state.begin(resume, override)
            log: MetricLog | NoLog = NoLog()
            if self.parts.ranks.first:
                log = self._log(begun - 1 if resume else None)
            bar = self.progress.bar("align", self.config.steps, begun)
            with stoppable(), log, self.state.saver, bar as shown:
                try:
                    self._train(log, shown)
                except (Stopped, ValueError, FloatingPointError):
                    # All ranks raise these, so all are here to save.
                    self.state.save_what_is_left(self.trials.best(self.done))
                    raise
            self.parts.ranks.only_first(lambda: write_report(self.out))
        return self.out / "report.html"

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
            self.parts.phases.where = f" after {count_of(self.done, 'step')},"
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
        with self.parts.phases("checkpoint"):
            self.state.save(self.trials.best(self.done))

    # ----------------------------------------------------------------------------- one step

    def step(self, step: int) -> dict[str, float]:
        """Explore and learn from this rank's share of a step's groups, then update.

        There are ``inner_updates`` updates. Returned are the step's metrics.
        """
        parts = self.parts
        calls_before = parts.pipeline.generator.calls
        with parts.phases("total"):
            of_groups, learnt = self._first_pass(step)
            found = self._update(of_groups, last=self.config.inner_updates == 1)
            updates = [found | parts.agreement.take(parts.ranks)]
            if self.config.inner_updates > 1:
                updates += self._further_updates(step, learnt)
        metrics = all_updates(updates) | parts.phases.take()
        metrics["memory/peak_gib"] = take_peak(parts.device) / 2**30
        metrics["calls/generator"] = parts.pipeline.generator.calls - calls_before
        return metrics

    def _first_pass(self, step: int) -> tuple[dict[int, dict[str, float]], list[Learnt]]:
        """Explore this rank's groups and learn from each of them.

        Group by group, so that only one is held at a time. Where rewards are divided by the
        step's standard deviation, all groups must be explored before the first is learnt from.
        """
        parts = self.parts
        with parts.policy.for_groups():
            if self.config.advantages.std == "group":
                with parts.ranks.together():
                    return self._learn_all(step, self._explored(step), None)
            with parts.ranks.together():
                kept = list(self._explored(step))
            own = {group.index: group.variances for group in kept if group.variances is not None}
            spread = spread_of(parts.column.gather(own))
            with parts.ranks.together():
                return self._learn_all(step, kept, spread)

    def _explored(self, step: int) -> Iterator[Kept]:
        """This rank's groups of a step, explored and scored; prefixes side by side, as asked."""
        # A disk that is full is no reason to train on until the next checkpoint.
        self.state.saver.check()
        for part in self._side_by_side(list(self.parts.column.share(self.config.groups))):
            with self._saying(step, part):
                begun = self.parts.starts(step, part)
            for index in part:
                with self._saying(step, [index]):
                    found = self.group(step, index, begun.pop(0))
                yield found.slim() if self.config.keeps_groups else found
                del found  # before the next one is explored

    def _side_by_side(self, own: Sequence[int]) -> Iterator[list[int]]:
        """The groups whose prefixes are generated together: those of a few stories."""
        stories, size = self.config.stories, self.config.rollout.prefixes
        distinct = list(dict.fromkeys(i % stories for i in own))
        for first in range(0, len(distinct), size):
            yield [i for i in own if i % stories in distinct[first : first + size]]

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
        """Make the second to the last update on a step's groups.

        A signal waits until they are made: between them the weights are no step's.
        """
        found, n = [], self.config.inner_updates
        self.state.midway = True
        with not_now():
            for made in range(1, n):
                own = {}
                with self.parts.policy.for_groups(), self.parts.ranks.together():
                    for group in learnt:
                        own[group.index] = self._learn_again(step, made, group)
                found.append(self._update(own, last=made == n - 1))
        self.state.midway = False
        return found

    def _update(self, own: dict[int, dict[str, float]], last: bool) -> dict[str, float]:
        """Update once from the gradients of all ranks' groups.

        Returned are the mean of the groups' metrics, and the update's own.
        """
        parts = self.parts
        # The ranks of a row share a group, so its first rank alone speaks for it.
        gathered = parts.ranks.gather(own if parts.row.first else {})
        groups = [found for of_rank in gathered for found in of_rank.items()]
        of_groups = [metrics for _index, metrics in sorted(groups, key=lambda found: found[0])]
        self._refuse_silence([found.get("group/unmeasurable", 0.0) for found in of_groups])
        metrics = group_means(of_groups)
        with parts.phases("optimizer"):
            parts.policy.layout.add_gradients()
            metrics |= parts.updater.step(last)
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
        self.parts.phases.where = f" of {when},"
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

    def group(self, step: int, index: int, start: Start) -> Kept:
        """One script from its past on: explore, and score."""
        parts = self.parts
        config, embeddings = self.config, start.past.embeddings
        with parts.row.together():
            rollout, own, pixels = parts.explore(
                start.script, embeddings, ("train", step, index), start=start
            )
        rewards = all_rewards(parts.row, own)
        compared = config.advantages.std == "step" and measurable(rewards)
        shown = config.show_every and step % config.show_every == 0 and index == 0
        return Kept(
            index,
            rollout,
            embeddings,
            rewards,
            pixels if shown else None,
            variances(rewards) if compared else None,
            _group_metrics(rollout, pixels, parts.row),
        )

    def learn(
        self, step: int, group: Kept, spread: Spread | None
    ) -> tuple[dict[str, float], Learnt | None]:
        """Add a group's gradient to the step's; its metrics, and what a further update needs.

        A group that can not be measured adds nothing but the velocity penalty's gradient.
        """
        parts = self.parts
        try:
            advantage = parts.advantages(group.rewards, spread)
        except Unmeasurable as reason:
            self.progress.say(f"step {step}, group {group.index} is skipped: {reason}")
            metrics = {"group/unmeasurable": 1.0, "group/skipped": 1.0}
            return metrics | self._hold(group.rollout, group.embeddings) | group.metrics, None
        metrics = (
            {"group/unmeasurable": 0.0} | advantage.metrics | self._conflicts(group, advantage)
        )
        advantage = self._controlled(advantage, step, group.index)
        replay = self._replay(step, group)
        update = parts.updater.accumulate(replay, advantage, parts.phases)
        if parts.row.first:
            parts.agreement.note(group.index, update.sketch)
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
            update = self.parts.updater.accumulate(
                learnt.replay, learnt.advantage, self.parts.phases, learnt.update
            )
            return update.metrics | self._hold(learnt.replay.rollout, learnt.replay.embeddings)

    def _conflicts(self, group: Kept, advantage: Advantage) -> dict[str, float]:
        """Metrics of how far the rewards agree about the group's branches."""
        by_component = self.parts.advantages.by_component(advantage)
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

    def _replay(self, step: int, group: Kept) -> Replay:
        parts = self.parts
        config, factors = self.config, None
        if config.pairs.count:
            weights = config.energy.step_weights(parts.pipeline.geometry.sigmas)
            factors = config.pairs.factors(
                weights.repeat(group.rollout.window.blocks, 1),
                stream(config.seed, "train", step, group.index, "pairs"),
            )
        members = range(group.rollout.num_branches + (config.advantages.anchor and parts.row.last))
        return Replay(
            parts.pipeline,
            group.rollout,
            group.embeddings,
            CONTEXTS[config.context],
            config.energy,
            members,
            config.rows_per_pass,
            config.rollout.together,
            factors,
            config.seed,
            ("train", step, group.index),
        )

    def _show(self, step: int, group: Kept, advantage: Advantage, update: GroupUpdate) -> None:
        """Keep the group's videos and numbers for the report; all ranks of a row enter."""
        parts = self.parts
        plans, pixels = all_rows(parts.row, group.rollout, group.pixels)
        with parts.row.together():
            if parts.row.first:
                show_group(
                    self.out,
                    step,
                    parts.pipeline,
                    replace(group.rollout, plans=plans),
                    pixels,
                    group.rewards,
                    advantage,
                    update,
                    self.config.exploring,
                )

    def _hold(self, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Add the gradient of the velocity penalty on a group's held blocks."""
        parts = self.parts
        penalty = self.config.velocity_penalty

        def velocities() -> list[torch.Tensor]:
            return [
                held_velocities(parts.pipeline, rollout, embeddings, block, penalty.steps)
                for block in rollout.held
            ]

        with parts.row.together():
            return parts.updater.hold(penalty, velocities, parts.phases) if parts.row.first else {}


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
