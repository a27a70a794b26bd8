"""Evaluations of a run while it trains, sentinels, and the decision to stop it early.

A run stops where its rewards are being gamed: by `kvpo.evaluation.goodhart`, or by a sentinel
beyond its limit. Everything is decided from the run's own files and fixed seeds, so a resumed run
decides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.common.environment import command
from kvpo.common.metric_log import MetricLog, NoLog
from kvpo.evaluation import goodhart
from kvpo.evaluation.evaluate import (
    Scored,
    compare,
    enough_scripts,
    evaluate,
    kinds_of,
    table,
    write_comparison,
)
from kvpo.evaluation.sentinels import Verdict, Watch, recent_kl
from kvpo.report.samples import show_samples
from kvpo.runs.build import unseen
from kvpo.runs.parts import Parts


class Trials:
    """Evaluations, sentinels and stop rules of one run."""

    def __init__(self, parts: Parts, out: Path):
        self.config, self.progress, self.phases = parts.config, parts.progress, parts.phases
        self.ranks, self.pipeline, self.policy = parts.ranks, parts.pipeline, parts.policy
        self.scripts, self.judges, self.sampler = parts.scripts, parts.judges, parts.sampler
        self.out = out
        self.watch = Watch(
            self.pipeline,
            self.sampler,
            self.policy,
            self.scripts,
            self.config.sentinels,
            self.config.evaluate.seed,
        )

    def due(self, done: int) -> bool:
        """True where training pauses to be evaluated; the last evaluation follows the training."""
        return (
            self.config.evaluate.every > 0
            and 0 < done < self.config.steps
            and done % self.config.evaluate.every == 0
        )

    def missing(self, done: int) -> bool:
        # as the first rank sees it: shared folders lag
        return self.due(done) and not self.ranks.gather(self._comparison("ema", done).exists())[0]

    def best(self, done: int) -> int:
        """Step of the best held-out evaluation so far; 0 = the start weights."""
        return goodhart.judge(self._history(done)).best

    def evaluate(self, done: int) -> dict[str, float]:
        """Compare EMA weights, and online ones where asked, with the start weights.

        Scripts and noise are the same for all. Returned are the metrics of the comparison.
        """
        sets = {"start": self.policy.reference, "ema": self.policy.average}
        if self.config.evaluate.online:
            sets["online"] = self.policy.snapshot()
        scored = {which: self._scored(which, weights) for which, weights in sets.items()}
        metrics: dict[str, float] = {}
        self.ranks.only_first(
            lambda: metrics.update(
                self._compared(done, scored, kinds_of(self.judges, self.config.evaluate.seeds))
            )
        )
        return metrics | self.phases.take()

    def _scored(self, which: str, weights: list[torch.Tensor]) -> Scored:
        """One set of weights on all scripts, this rank's share of them here."""
        share = self.ranks.stretch(len(self.scripts))
        scripts = [self.scripts[i] for i in share]
        with (
            self.policy.using(weights),
            self.phases("evaluate"),
            self.progress.bar(f"evaluate {which}", len(scripts)) as bar,
            self.ranks.together(),
        ):
            own = evaluate(
                self.pipeline,
                self.sampler,
                scripts,
                self.judges,
                self.config.score,
                self.config.evaluate,
                bar.move_to,
            )
        found = self.ranks.gather(
            (own.r_KN, own.videos[: max(0, self.config.evaluate.videos - share.start)])
        )
        return replace(
            own,
            r_KN=torch.cat([r_KN for r_KN, _ in found], dim=1),
            videos=tuple(video for _, videos in found for video in videos),
        )

    def _compared(
        self, done: int, scored: Mapping[str, Scored], kinds: Sequence[str]
    ) -> dict[str, float]:
        """Samples, tables and metrics of an evaluation."""
        metrics: dict[str, float] = {}
        for which, found in scored.items():
            show_samples(
                self.out,
                0 if which == "start" else done,
                which,
                self.scripts,
                found.videos,
                self.config.evaluate.seed,
            )
            if which == "start":
                continue
            rows = compare(found, scored["start"], kinds)
            self.progress.say(f"{table(rows, which, 'start')}\n{enough_scripts(rows)}")
            write_comparison(
                self._comparison(which, done),
                rows,
                f"{which} step {done}",
                "start",
                self.scripts,
                self.config.evaluate,
                command(),
                unseen(self.config),
                (found, scored["start"]),
            )
            for row in rows:
                slug = row["component"].replace(" ", "_")
                metrics |= {
                    f"eval/{which}/{slug}/{k}": row[k]
                    for k in ("diff", "low", "high", "win")
                    if row[k] is not None
                }
                if row["a"] is not None:
                    metrics |= {
                        f"eval/{which}/{slug}/mean": row["a"],
                        f"eval/start/{slug}/mean": row["b"],
                    }
        return metrics

    def must_stop(self, done: int, log: MetricLog | NoLog) -> bool:
        """True where evaluations or sentinels say that the rewards are being gamed.

        The user is then told the reason, and which weights are the best.
        """
        reason = self._gamed(done) or self._drifted(done, log)
        if reason:
            best = self.best(done)
            self.progress.say(
                f"stopped after {done} steps: {reason}. Best held-out weights: {f'{self.out}:best, of step {best}' if best else 'those of the start'}"
            )
        return bool(reason)

    def _gamed(self, done: int) -> str:
        if not self.config.evaluate.stop_when_gamed or not self.due(done):
            return ""
        verdict = self.ranks.gather(goodhart.judge(self._history(done)))[0]
        return (
            f"trained rewards rose while {', '.join(verdict.fallen)} fell, in {goodhart.SUCCESSIVE} evaluations on end"
            if verdict.fallen
            else ""
        )

    def _drifted(self, done: int, log: MetricLog | NoLog) -> str:
        every = self.config.sentinels.every
        if not every or not done or done % every:
            return ""
        with (
            self.phases("sentinels"),
            self.policy.at_hand(self.policy.reference),
            self.progress.bar("sentinels", self.config.sentinels.scripts) as bar,
        ):
            found = Verdict()
            with self.ranks.together():
                if self.ranks.first:
                    found = self.watch(self._kl(done, every), bar.move_to)
        verdict = self.ranks.gather(found)[0]
        log.write(done - 1, verdict.metrics | self.phases.take())
        for line in verdict.warnings:
            self.progress.say(f"sentinel after {done} steps: {line}")
        return f"beyond the stop limit: {'; '.join(verdict.stops)}" if verdict.stops else ""

    def _kl(self, done: int, steps: int) -> float:
        """Mean KL to the start policy; 0 where the run measures its KL to another one."""
        return recent_kl(self.out, done, steps) if self.config.objective.watches_kl else 0.0

    def _history(self, done: int) -> dict[int, goodhart.Rows]:
        """Evaluations of the EMA weights, by step, up to step ``done``.

        The folder may hold later ones, where a run was killed and resumed from before them.
        """
        return {
            step: rows
            for step, rows in goodhart.history(self.out / "evaluation", "ema").items()
            if step <= done
        }

    def _comparison(self, which: str, done: int) -> Path:
        return self.out / "evaluation" / f"{which}-step-{done:06d}.json"
