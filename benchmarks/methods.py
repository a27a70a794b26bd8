"""Every legal pair of objective and explorer on the miniature, tuned alike, at equal FLOPs.

    python benchmarks/methods.py --list                      the pairs, and what is done of each
    python benchmarks/methods.py [--pairs nft-best_of ...]   all of it, a day of two cores
    python benchmarks/methods.py --quick                     one rate, half as long, on 64 scripts

    tuning    every learning rate, seed 0; the mean of the trained rewards decides, on stories that
              nothing else looks at
    final     the best rate with the seeds of SEEDS, evaluated on other stories
    control   the same with shuffled advantages, the first of the seeds

A pair gets as many updates as the counted FLOPs of that many updates of the recipe pay for
(`kvpo plan`), so a gain in the table is a gain per FLOP. Runs are folders of `kvpo align` and values
are kept: what is finished is not done again, what was stopped goes on, and after each run
OUT/methods.md has the table of what there is.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from claims import (
    Run,
    aligned,
    claimed_by,
    finished,
    interval_text,
    over_scripts,
    over_seeds,
    run_kvpo,
    values,
)

from kvpo.common.files import write_atomic
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, from_dict, load_config, recipe_path, to_dict
from kvpo.evaluation.intervals import TOTAL
from kvpo.method.objectives.kinds import OBJECTIVES
from kvpo.planning.amounts import amounts
from kvpo.planning.costs import costs, sizes_of
from kvpo.planning.work import work
from kvpo.runs.build import evaluation_scripts

EXPLORERS = ("kv_routing", "start_noise", "renoise", "sde", "best_of", "prompt")
SAMPLERS = {"sde": "ode"}
"""Explorer -> its sampler; the others have the recipe's. Gains are over the same sampler's start."""
GRADIENT = 0.002
"""Norm to which every group's gradient is clipped, below the smallest that an objective has here.

Gradients of `tve_ppo` have norms of 5 to 80 and those of `rvm` of 0.005. The recipe clips the first
to 1 and divides by their size plus `optimizer.eps`, which would make a small gradient a small
learning rate. With clip, eps and the penalty's weight smaller alike, `tve_ppo` is the recipe as it
stands, and the others are treated as it is.
"""
SEEDS = (1, 2, 3)
"""Seeds of the final runs; tuning has seed 0."""


@dataclass(frozen=True)
class Stage:
    """Length of a run in updates of the recipe, and the scripts it is measured on."""

    updates: int
    scripts: int
    evaluation_seed: int


@dataclass(frozen=True)
class Size:
    """Extent of the benchmark. One rate is not tuned: all steps are equally long then."""

    rates: tuple[float, ...]
    tuning: Stage
    final: Stage


FULL = Size((3.0e-4, 1.0e-3, 1.0e-4), Stage(20, 32, 5000), Stage(50, 128, 7000))
QUICK = Size((3.0e-4,), Stage(0, 0, 0), Stage(24, 64, 7000))

Pair = tuple[str, str]
Values = dict[str, torch.Tensor]
"""Component, the mean of the trained ones first -> its value for every script."""
Measure = Callable[[str, str, Stage, Path], Values]
"""(generator, sampler, stage, file that keeps them) -> values."""


@functools.cache
def recipe() -> RunConfig:
    return load_config(recipe_path("mini"))


@dataclass(frozen=True)
class Setting:
    """A pair at one learning rate."""

    objective: str
    explorer: str
    rate: float

    @property
    def pair(self) -> Pair:
        return self.objective, self.explorer

    @property
    def sampler(self) -> str:
        return SAMPLERS.get(self.explorer, recipe().sampler)

    def options(self) -> dict[str, str]:
        """Options of `kvpo align`; explorers with a window have one of one block."""
        smaller = GRADIENT / recipe().optimizer.clip
        options = {
            "objective.kind": self.objective,
            "explorer": self.explorer,
            "sampler": self.sampler,
            "optimizer.lr": f"{self.rate:g}",
            "optimizer.clip": f"{GRADIENT:g}",
            "optimizer.eps": f"{recipe().optimizer.eps * smaller:g}",
            "velocity_penalty.weight": f"{recipe().velocity_penalty.weight * smaller:g}",
        }
        if self.explorer != "best_of":  # whose window is the whole story
            options[f"{self.explorer}.window_blocks"] = "1"
        return options


def settings_of(options: dict[str, str]) -> RunConfig:
    """The recipe with options of the command line."""
    content = to_dict(recipe())
    content["objective"] = {}  # another kind has other settings
    for name, value in options.items():
        section, _, key = name.rpartition(".")
        (content[section] if section else content)[key] = value
    return from_dict(content)


@functools.cache
def legal(objective: str, explorer: str) -> str:
    """Why a pair is refused; empty for a legal one."""
    try:
        settings_of(Setting(objective, explorer, FULL.rates[0]).options())
    except ValueError as error:
        return str(error)
    return ""


def pairs() -> list[Pair]:
    """All legal pairs, objective by objective."""
    return [p for p in itertools.product(OBJECTIVES, EXPLORERS) if not legal(*p)]


@functools.cache
def flops(objective: str, explorer: str) -> float:
    """TFLOP of a group, rewards not counted."""
    config = settings_of(Setting(objective, explorer, FULL.rates[0]).options())
    sizes = sizes_of(config, "")
    cost = costs(config, sizes)
    counted = amounts(config, sizes.geometry, 1, cost.decoding(config).field)
    return sum(work(config, sizes, cost, counted).values()) / 1e12


def updates(pair: Pair, stage: Stage) -> int:
    """Updates that cost as much as those of the stage cost the recipe."""
    return max(round(stage.updates * flops("tve_ppo", "kv_routing") / flops(*pair)), 1)


class Bench:
    """The benchmark in a folder: its runs, their values, and the table of both."""

    def __init__(self, out: Path, size: Size, run: Run, measure: Measure):
        self.out, self.size, self.run, self.measure = out, size, run, measure

    def tuned(self, pair: Pair) -> Setting | None:
        """The pair at its best rate, None where no run of it came to an end."""
        gains: dict[Setting, float] = {}
        settings = [Setting(*pair, rate) for rate in self.size.rates]
        if len(settings) == 1:
            return settings[0]
        for setting in settings:
            folder = self.out / "tuning" / f"{'-'.join(pair)}-lr{setting.rate:g}"
            if self.ended(folder, setting, self.size.tuning, 0):
                gains[setting] = float(self.gains(folder, setting, self.size.tuning)[TOTAL].mean())
        known = {s: g for s, g in gains.items() if math.isfinite(g)}
        return max(known, key=lambda s: known[s]) if known else None

    def ended(self, folder: Path, setting: Setting, stage: Stage, seed: int, *more: str) -> bool:
        """Make a run, unless it is there; False where it failed. All are measured afterwards."""
        steps = updates(setting.pair, stage)
        options = ["--seed", str(seed), "--steps", str(steps), "--evaluate.scripts", "2"]
        options += ["--sentinels.every", "0", *more]
        options += [
            part for name, value in setting.options().items() for part in (f"--{name}", value)
        ]
        return aligned(folder, "mini", options, self.run)

    def gains(self, folder: Path, setting: Setting, stage: Stage) -> Values:
        """Per-script differences of a run's EMA weights to the start weights."""
        kept = self.out / f"values-{stage.evaluation_seed}-{stage.scripts}"
        kept.mkdir(parents=True, exist_ok=True)
        start = self.measure(
            recipe().pipeline, setting.sampler, stage, kept / f"start-{setting.sampler}.json"
        )
        found = self.measure(f"{folder}:ema", setting.sampler, stage, kept / f"{folder.name}.json")
        return {name: found[name] - start[name] for name in start}

    def final(self, setting: Setting, seed: int, shuffled: bool = False) -> Values | None:
        """Gains of a final run or of its control; None where it failed."""
        name = f"{'-'.join(setting.pair)}-{'shuffled' if shuffled else 'seed'}{seed}"
        more = ["--shuffle-advantages"] if shuffled else []
        folder = self.out / "final" / name
        if not self.ended(folder, setting, self.size.final, seed, *more):
            return None
        return self.gains(folder, setting, self.size.final)

    def all(self, chosen: Sequence[Pair]) -> None:
        """Whatever is left to do; seed by seed, so that what there is can be compared."""
        best = {pair: setting for pair in chosen if (setting := self.tuned(pair))}
        found: dict[Pair, dict[str, Values]] = {pair: {} for pair in best}
        for seed, shuffled in [(s, False) for s in SEEDS] + [(SEEDS[0], True)]:
            for pair, setting in best.items():
                gains = self.final(setting, seed, shuffled)
                if gains:
                    found[pair]["shuffled" if shuffled else f"seed {seed}"] = gains
                write_atomic(self.out / "methods.md", table(best, found, self.size.final))


def table(best: dict[Pair, Setting], found: dict[Pair, dict[str, Values]], final: Stage) -> str:
    """Markdown: a line a pair, the highest mean gain first."""
    lines = [
        "| objective | explorer | rate | updates | gain of each seed | all seeds | control | parts | fell |",
        "|---" * 9 + "|",
    ]
    rows = [(pair, runs) for pair, runs in found.items() if _seeds(runs)]
    rows.sort(key=lambda row: -float(torch.stack([g[TOTAL] for g in _seeds(row[1])]).mean()))
    for pair, runs in rows:
        seeds = _seeds(runs)
        diff_SN = torch.stack([gains[TOTAL] for gains in seeds])
        control = ""
        if "shuffled" in runs:
            control = interval_text(*over_scripts(runs["shuffled"][TOTAL], "methods", "control"))
        cells = [
            *(f"`{name}`" for name in pair),
            f"{best[pair].rate:g}",
            str(updates(pair, final)),
            ", ".join(f"{float(d.mean()):+.3f}" for d in diff_SN),
            interval_text(*over_seeds(diff_SN, "-".join(pair))),
            control,
            ", ".join(f"{n} {_mean(seeds, n):+.3f}" for n in ("VQ", "MQ", "TA") if n in seeds[0]),
            ", ".join(_fell(seeds)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _seeds(runs: dict[str, Values]) -> list[Values]:
    return [gains for name, gains in runs.items() if name != "shuffled"]


def _mean(seeds: Sequence[Values], name: str) -> float:
    return float(torch.stack([gains[name] for gains in seeds]).nanmean())


def _fell(seeds: Sequence[Values]) -> Iterator[str]:
    """The components whose mean over the seeds lies below 0, with its interval over scripts."""
    for name in seeds[0]:
        diff_N = torch.stack([gains[name] for gains in seeds]).mean(dim=0)
        mean, _low, high = over_scripts(diff_N, "methods", name)
        if high < 0.0:
            yield f"{name} {mean:+.3f}"


def print_pairs(out: Path, size: Size) -> None:
    """Say what is run, what of it is finished, and which pairs are refused."""
    for pair in itertools.product(OBJECTIVES, EXPLORERS):
        if reason := legal(*pair):
            print(f"{pair[0]:18} {pair[1]:12} refused: {reason}")
            continue
        tuned = len([f for f in out.glob(f"tuning/{'-'.join(pair)}-lr*") if finished(f)])
        final = len([f for f in out.glob(f"final/{'-'.join(pair)}-s*") if finished(f)])
        print(
            f"{pair[0]:18} {pair[1]:12} {updates(pair, size.final):3} updates, "
            f"tuned {tuned}/{len(size.rates)}, final {final}/{len(SEEDS) + 1}"
        )


def by_scripts() -> Measure:
    """Measure generators on unseen scripts, all components of the recipe's rewards."""
    progress = Progress()

    def measure(generator: str, sampler: str, stage: Stage, path: Path) -> Values:
        config = claimed_by(recipe(), stage.scripts, stage.evaluation_seed)
        config = replace(config, sampler=sampler)
        return values(generator, config, evaluation_scripts(config), path, progress)

    return measure


def main(argv: Sequence[str] | None = None) -> None:
    """Print the pairs, or run what is left of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument(
        "--pairs", nargs="+", help="objective-explorer; all legal ones if not given"
    )
    parser.add_argument("--quick", action="store_true", help="one rate, shorter, fewer scripts")
    parser.add_argument("--list", action="store_true", help="print the pairs and run nothing")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    if args.list:
        return print_pairs(args.out, size)
    names = {"-".join(pair): pair for pair in pairs()}
    if unknown := set(args.pairs or ()) - set(names):
        parser.error(f"--pairs {' '.join(sorted(unknown))}: legal are {' '.join(names)}")

    Bench(args.out, size, run_kvpo, by_scripts()).all([names[n] for n in args.pairs or names])
    print((args.out / "methods.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
