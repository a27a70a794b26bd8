"""Evaluation: fixed scripts and seeds, two sets of weights, paired.

Both sets see the same scripts with the same noise, so a difference is the weights' doing; its
interval is a bootstrap over scripts, the unit that varies. Evaluators that were never trained on
stand in the same table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from kvpo.common.environment import git_commit
from kvpo.common.files import write_atomic
from kvpo.common.rng import stream
from kvpo.evaluation.intervals import TOTAL, bootstrap_interval
from kvpo.evaluation.power import sentence
from kvpo.evaluation.settings import EvaluateConfig
from kvpo.generators.generate import generate
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import Sampler
from kvpo.method.score import Clip, ScoreConfig, global_clips, pixel_diversity
from kvpo.rewards.base import Reward, VideoBatch
from kvpo.rewards.scorer import Scorer
from kvpo.types import Script, Window

DIVERSITY = "diversity"
"""Name of the guard that compares a script's videos over seeds.

It is the mean squared difference of two of them, pixels in [0, 1]. It falls where a policy
collapses, but noise has most of it.
"""


@dataclass(frozen=True)
class Scored:
    """Rewards of one set of weights on an evaluation's scripts."""

    components: tuple[str, ...]
    r_KN: torch.Tensor
    """r_KN float64: one number per component and script.

    NaN where a script has no clip the component could measure.
    """
    videos: tuple[torch.Tensor, ...]
    """uint8 [T, 3, H, W] of the first scripts."""


def evaluate(
    pipeline: Pipeline,
    sampler: Sampler,
    scripts: Sequence[Script],
    rewards: Sequence[Reward],
    clips: ScoreConfig,
    config: EvaluateConfig,
    progress: Callable[[int], None] = lambda done: None,
) -> Scored:
    """Evaluate the weights now in the pipeline on all scripts.

    A script's number is the mean over its seeds of the mean over its segments' clips.
    """
    columns, apart = [], []
    videos: list[torch.Tensor] = []
    alike: list[torch.Tensor] = []
    jobs = [(script, seed) for script in scripts for seed in range(config.seeds)]
    for first in range(0, len(jobs), config.batch):
        part = jobs[first : first + config.batch]
        pixels = generate(
            pipeline, sampler, [s for s, _ in part], config.seed, [noise_name(*job) for job in part]
        )
        columns.append(_score(pixels, [s for s, _ in part], pipeline, rewards, clips))
        videos += [video for video, (_, seed) in zip(pixels, part) if seed == 0][
            : config.videos - len(videos)
        ]
        alike += pixels if config.seeds > 1 else []
        while len(alike) >= config.seeds > 1:  # all videos of the next script are there
            apart.append(pixel_diversity(torch.stack(alike[: config.seeds])))
            del alike[: config.seeds]
        progress((first + len(part)) // config.seeds)
    components = tuple(c for r in rewards for c in r.spec.columns)
    # a rank's share of fewer scripts than ranks
    nothing = torch.empty(len(components), 0, dtype=torch.float64)
    r_KN = (
        torch.cat([nothing, *columns], dim=1)
        .view(len(components), len(scripts), config.seeds)
        .nanmean(dim=-1)
    )
    if config.seeds > 1:
        components = (*components, DIVERSITY)
        r_KN = torch.cat([r_KN, torch.tensor([apart], dtype=r_KN.dtype)])
    return Scored(components, r_KN, tuple(videos))


def noise_name(script: Script, seed: int) -> tuple[int | str, ...]:
    """Names the noise of a script's video number ``seed``."""
    return ("evaluate", script.id, *((seed,) if seed else ()))


def _score(
    pixels: torch.Tensor,
    scripts: Sequence[Script],
    pipeline: Pipeline,
    rewards: Sequence[Reward],
    clips: ScoreConfig,
) -> torch.Tensor:
    """r_KN of some videos: mean over the clips of each video's segments.

    Clips that a component can not tell are left out. Clips of one length are scored together,
    whatever video they come from.
    """
    by_length: dict[int, list[tuple[int, Clip]]] = {}
    for i, script in enumerate(scripts):
        for clip in global_clips(script, Window(0, 1), pipeline.geometry, clips):
            by_length.setdefault(clip.stop - clip.first, []).append((i, clip))
    columns: list[list[torch.Tensor]] = [[] for _ in scripts]
    for found in by_length.values():
        frames = torch.stack([pixels[i, clip.first : clip.stop] for i, clip in found])
        texts = [scripts[i].texts[: clip.segment + 1] for i, clip in found]
        batch = VideoBatch(
            frames, pipeline.geometry.fps, tuple(t[-1] for t in texts), tuple(t[:-1] for t in texts)
        )
        for (i, _), column in zip(
            found, torch.cat([_columns(reward, batch) for reward in rewards]).T
        ):
            columns[i].append(column)
    # of a script whose segments are all too short
    nothing = torch.full((sum(len(r.spec.columns) for r in rewards),), float("nan"))
    return torch.stack(
        [torch.stack(column or [nothing]).double().nanmean(dim=0) for column in columns], dim=1
    )


def _columns(reward: Reward, batch: VideoBatch) -> torch.Tensor:
    """Score and reported parts, r_KB in the order of `RewardSpec.columns`.

    NaN for what a clip can not tell.
    """
    output = reward.score(batch)
    nothing = torch.full_like(output.scores, float("nan"))
    return torch.stack(
        [output.scores, *(output.parts.get(part, nothing) for part in reward.spec.report)]
    )


ROLES = {"train": "train", "eval": "heldout", "guard": "guard"}
"""Role of a recipe's reward -> what its rows are called in a table."""


def kinds_of(scorers: Sequence[Scorer], seeds: int, trained_on: Collection[str] = ()) -> list[str]:
    """The kind of every component; parts of a trained reward are no reward of their own.

    ``trained_on``: families of the rewards that made the weights which are measured, where
    another recipe measures them: an evaluator of one of these is `related`, not held out."""
    return [_kind(s, column, trained_on) for s in scorers for column in s.spec.columns] + [
        "guard"
    ] * (seeds > 1)


def _kind(scorer: Scorer, column: str, trained_on: Collection[str]) -> str:
    if scorer.entry.role == "train":
        return "train" if column == scorer.spec.name else "part"
    return (
        "related"
        if scorer.entry.role == "eval" and scorer.spec.family in trained_on
        else ROLES[scorer.entry.role]
    )


def compare(a: Scored, b: Scored, kinds: Sequence[str], seed: int = 0) -> list[dict]:
    """Rows of the table A against B: means, paired difference, its interval, win rate (ties half).

    The interval is at 95 % over scripts (BCa bootstrap).
    """
    total = [k for k, kind in enumerate(kinds) if kind == "train"]
    rows = [
        _row(name, kind, a.r_KN[k], b.r_KN[k], seed)
        for k, (name, kind) in enumerate(zip(a.components, kinds, strict=True))
    ]
    return [_row(TOTAL, "train", a.r_KN[total].mean(dim=0), b.r_KN[total].mean(dim=0), seed), *rows]


def _row(component: str, kind: str, a_N: torch.Tensor, b_N: torch.Tensor, seed: int) -> dict:
    both = a_N.isfinite() & b_N.isfinite()
    a, b = a_N[both], b_N[both]
    n = int(both.sum())
    if n < 2:
        return {
            "component": component,
            "kind": kind,
            **dict.fromkeys(("a", "b", "diff", "low", "high", "win", "sd")),
            "n": n,
        }
    low, high = bootstrap_interval(a - b, stream(seed, "bootstrap", component))
    win = float(((a > b).double() + 0.5 * (a == b).double()).mean())
    return {
        "component": component,
        "kind": kind,
        "a": float(a.mean()),
        "b": float(b.mean()),
        "diff": float((a - b).mean()),
        "low": low,
        "high": high,
        "win": win,
        "sd": float((a - b).std()),
        "n": n,
    }


def means(scored: Scored, kinds: Sequence[str], seed: int = 0) -> list[dict]:
    """Rows of one set of weights alone: the mean over scripts of every component.

    Each has its 95 % interval over scripts.
    """
    total = [k for k, kind in enumerate(kinds) if kind == "train"]
    rows = [_mean(*row, seed) for row in zip(scored.components, kinds, scored.r_KN, strict=True)]
    return [_mean(TOTAL, "train", scored.r_KN[total].mean(dim=0), seed)] * bool(total) + rows


def _mean(component: str, kind: str, r_N: torch.Tensor, seed: int) -> dict:
    found = r_N[r_N.isfinite()]
    row, n = {"component": component, "kind": kind}, len(found)
    if n < 2:
        mean = float(found.mean()) if n else None
        return {**row, "mean": mean, "low": None, "high": None, "sd": None, "n": n}
    low, high = bootstrap_interval(found, stream(seed, "bootstrap", component))
    return {
        **row,
        "mean": float(found.mean()),
        "low": low,
        "high": high,
        "sd": float(found.std()),
        "n": n,
    }


def means_table(rows: Sequence[dict]) -> str:
    """The means as text."""
    lines = [f"{'component':<20} {'kind':<9} {'mean':>9} {'95 % interval':>19} {'n':>5}"]
    for r in rows:
        begin = f"{r['component']:<20} {r['kind']:<9}"
        if r["low"] is None:
            lines.append(f"{begin} {'could not be measured on enough scripts':>29} {r['n']:>5}")
        else:
            lines.append(
                f"{begin} {r['mean']:>9.4f}   [{r['low']:>7.4f}, {r['high']:>7.4f}] {r['n']:>5}"
            )
    return "\n".join(lines)


def values_of(scored: Scored) -> dict[str, list[float | None]]:
    """Component -> its number on every script, in the order of the scripts.

    None where it could not be measured.
    """
    return {
        name: [value if math.isfinite(value) else None for value in r_N.tolist()]
        for name, r_N in zip(scored.components, scored.r_KN)
    }


def table(rows: Sequence[dict], label_a: str, label_b: str) -> str:
    """The comparison as text."""
    lines = [
        f"{'component':<20} {'kind':<9} {label_a:>9} {label_b:>9} {'diff':>8} {'95 % interval':>19} {'win':>6} {'n':>5}"
    ]
    for r in rows:
        if r["diff"] is None:
            lines.append(
                f"{r['component']:<20} {r['kind']:<9} {'could not be measured on enough scripts':>53} {r['n']:>5}"
            )
        else:
            lines.append(
                f"{r['component']:<20} {r['kind']:<9} {r['a']:>9.4f} {r['b']:>9.4f} {r['diff']:>+8.4f}   [{r['low']:>+7.4f}, {r['high']:>+7.4f}] {r['win']:>6.1%} {r['n']:>5}"
            )
    return "\n".join(lines)


def enough_scripts(rows: Sequence[dict]) -> str:
    """Say whether there were enough scripts for the difference in the trained rewards' mean.

    "" where that was not measured.
    """
    row = next((r for r in rows if r["component"] == TOTAL and r["diff"] is not None), None)
    return sentence(TOTAL, row["n"], row["diff"], row["sd"]) if row else ""


def write_comparison(
    path: Path,
    rows: Sequence[dict],
    label_a: str,
    label_b: str,
    scripts: Sequence[Script],
    config: EvaluateConfig,
    command: str,
    unseen: bool = True,
    scored: tuple[Scored, Scored] | None = None,
) -> Path:
    """The record of A against B that `kvpo.report.report` reads.

    ``unseen``: the scripts are not those that were trained on. ``scored``: A's and B's numbers
    script by script, which the record then holds as `values` and `values_against`.
    """
    values = dict(zip(("values", "values_against"), map(values_of, scored or ())))
    record = {"label_a": label_a, "label_b": label_b, "unseen": unseen, "rows": list(rows)}
    return _write(path, record, scripts, config, command, values)


def write_means(
    path: Path,
    rows: Sequence[dict],
    label: str,
    scripts: Sequence[Script],
    config: EvaluateConfig,
    command: str,
    unseen: bool,
    scored: Scored,
) -> Path:
    """The record of one set of weights alone; ``rows`` as `means` makes them."""
    record = {
        "label": label,
        "unseen": unseen,
        "means": {row["component"]: row["mean"] for row in rows},
        "rows": list(rows),
    }
    return _write(path, record, scripts, config, command, {"values": values_of(scored)})


def _write(
    path: Path,
    record: dict,
    scripts: Sequence[Script],
    config: EvaluateConfig,
    command: str,
    values: dict,
) -> Path:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {
        "scripts": [s.id for s in scripts],
        "seed": config.seed,
        "videos": config.seeds,
        "created": created,
        "command": command,
        "commit": git_commit(),
    }
    return write_atomic(path, json.dumps(record | facts | values, indent=1, allow_nan=False) + "\n")
