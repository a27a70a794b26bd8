"""Every legal pair of objective and explorer on the miniature, tuned alike: which gains most.

Each pair is tuned on one seed by a grid of equal size (three learning rates times two values of its
own knob), judged by the trained rewards on stories of their own; its best setting then runs with
three seeds and is evaluated on others. Runs are folders of `kvpo align`: what is finished is not
run again, what was stopped goes on, so the benchmark may be killed at any time.

    python benchmarks/methods.py --out runs/methods --list      the grid, and what is done of it
    python benchmarks/methods.py --out runs/methods             all of it, hours; ends with compare.html

Pairs have equal numbers of updates, groups and branches, not of FLOPs: the table has the network
calls and the time of each, by which gains have to be read.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpo.config import from_dict, load_config, recipe_path, to_dict
from kvpo.evaluation.intervals import TOTAL
from kvpo.method.objectives.kinds import OBJECTIVES
from kvpo.report.compare import read_runs, text_table, write_comparison

EXPLORERS = ("kv_routing", "start_noise", "renoise", "sde")
"""Explorers that can have windows of one block anywhere: not `best_of` and `prompt`."""
SAMPLERS = {"sde": "ode"}
"""Explorer -> its sampler; the others have the recipe's. Gains are over the same sampler's start."""
RATES = (1.0e-4, 3.0e-4, 9.0e-4)
KNOBS: dict[str, tuple[str, tuple[float, float]]] = {
    "tve_ppo": ("kl_beta", (0.1, 1.0)),
    "regression": ("temperature", (0.3, 1.0)),
    "nft": ("beta", (0.3, 1.0)),
    "rvm": ("scale", (0.1, 0.3)),
    "kernel_grpo": ("clip", (0.001, 0.01)),
    "sde_grpo": ("clip", (0.001, 0.01)),
    "denoised_distance": ("kl_beta", (0.1, 1.0)),
}
"""Objective -> the setting of its own that is tuned, and its two values."""
SEEDS = (1, 2, 3)
"""Seeds of the final runs; tuning has seed 0."""
TUNING = {"steps": 40, "evaluate.scripts": 64, "evaluate.seed": 5000}
FINAL = {"steps": 100, "evaluate.scripts": 256, "evaluate.seed": 1000}

Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Setting:
    """One cell of a pair's grid."""

    objective: str
    explorer: str
    rate: float
    knob: float

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.explorer}-lr{self.rate:g}-{KNOBS[self.objective][0]}{self.knob:g}"

    def options(self) -> dict[str, str]:
        """Options of `kvpo align`; all explorers have windows of one block."""
        knob, _values = KNOBS[self.objective]
        return {
            "objective.kind": self.objective,
            f"objective.{knob}": str(self.knob),
            "explorer": self.explorer,
            f"{self.explorer}.window_blocks": "1",
            "optimizer.lr": str(self.rate),
        } | ({"sampler": SAMPLERS[self.explorer]} if self.explorer in SAMPLERS else {})


@functools.cache
def legal(objective: str, explorer: str) -> str:
    """Why a pair is refused; empty for a legal one."""
    recipe = to_dict(load_config(recipe_path("mini")))
    try:
        sampler = SAMPLERS.get(explorer, recipe["sampler"])
        pair = {"objective": {"kind": objective}, "explorer": explorer, "sampler": sampler}
        from_dict(recipe | pair)
    except ValueError as error:
        return str(error)
    return ""


def pairs() -> list[tuple[str, str]]:
    """All legal pairs, objective by objective."""
    return [p for p in itertools.product(OBJECTIVES, EXPLORERS) if not legal(*p)]


def grid(objective: str, explorer: str) -> Iterator[Setting]:
    """The settings that are tried for a pair, as many for each."""
    for rate, knob in itertools.product(RATES, KNOBS[objective][1]):
        yield Setting(objective, explorer, rate, knob)


def finished(folder: Path) -> bool:
    """Whether a run has ended: its report is written last."""
    return (folder / "report.html").exists()


def ensure(folder: Path, options: dict[str, str], run: Run) -> bool:
    """Run it, or go on with it, unless it is finished; False where it failed."""
    if finished(folder):
        return True
    argv = ["align", "mini", "--out", str(folder)]
    argv += [part for name, value in options.items() for part in (f"--{name}", value)]
    if (folder / "config.resolved.yaml").exists():
        argv.append("--resume")
    return run(argv) == 0 and finished(folder)


def gain(folder: Path) -> float:
    """Mean difference of the trained rewards; NaN where it was not measured."""
    found = sorted((folder / "evaluation").glob("ema-step-*.json"))
    rows = json.loads(found[-1].read_text(encoding="utf-8"))["rows"] if found else []
    values = [row["diff"] for row in rows if row["component"] == TOTAL]
    return float(values[0]) if values and values[0] is not None else math.nan


def best(out: Path, settings: Sequence[Setting]) -> Setting | None:
    """The setting of the highest gain in tuning; None where no run could be measured."""
    gains = [
        (gain(out / "tuning" / s.name), s) for s in settings if finished(out / "tuning" / s.name)
    ]
    known = [(g, s) for g, s in gains if g == g]
    return max(known, key=lambda found: found[0])[1] if known else None


def benchmark(out: Path, run: Run) -> list[Path]:
    """All that is left of the benchmark; returns the folders of the final runs that ended."""
    done = []
    for pair in pairs():
        settings = list(grid(*pair))
        for setting in settings:
            options = setting.options() | {k: str(v) for k, v in TUNING.items()} | {"seed": "0"}
            ensure(out / "tuning" / setting.name, options, run)
        chosen = best(out, settings)
        for seed in SEEDS if chosen else ():
            folder = out / "final" / f"{'-'.join(pair)}-seed{seed}"
            options = chosen.options() | {k: str(v) for k, v in FINAL.items()}
            if ensure(folder, options | {"seed": str(seed)}, run):
                done.append(folder)
    return done


def print_grid(out: Path) -> None:
    """Say what is run, what of it is finished, and which pairs are refused."""
    for objective, explorer in itertools.product(OBJECTIVES, EXPLORERS):
        reason = legal(objective, explorer)
        if reason:
            print(f"{objective:18} {explorer:12} refused: {reason}")
            continue
        settings = list(grid(objective, explorer))
        tuned = sum(finished(out / "tuning" / s.name) for s in settings)
        final = [out / "final" / f"{objective}-{explorer}-seed{seed}" for seed in SEEDS]
        ended = sum(map(finished, final))
        print(
            f"{objective:18} {explorer:12} tuned {tuned}/{len(settings)}, final {ended}/{len(final)}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the grid, or run what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--list", action="store_true", help="print the grid and run nothing")
    args = parser.parse_args(argv)
    if args.list:
        return print_grid(args.out)

    def run(command: Sequence[str]) -> int:
        return subprocess.run([sys.executable, "-m", "kvpo", *command]).returncode

    folders = benchmark(args.out, run)
    if len(folders) > 1:
        runs = read_runs(folders)
        print(text_table(runs))
        print(write_comparison(runs, args.out / "compare.html"))


if __name__ == "__main__":
    main()
