"""Gain of alignment on unseen scripts, and of controls whose rewards say nothing.

It trains several seeds of the recipe and of its controls.

    python benchmarks/claims.py [--recipe mini] [--seeds 0 1 2] [--scripts 256] \\
        [--evaluation-seed 9000] [--out runs/claims]

Arms, each as long as the recipe:

    real           the recipe
    shuffled       advantages shuffled among the branches of each group: nothing to learn, everything else the same
    zero           advantages 0: only the penalty, the KL and the averaging act
    shuffled_free  shuffled, without the velocity penalty

Every arm and seed is a run of its own in OUT, begun, gone on with or left alone as it stands, and
then measured once; so the command can be stopped and given again. Intervals of one run are over
scripts. Those over several runs draw seeds and scripts anew (a bootstrap in two levels): training
seeds differ by more than scripts can tell.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvpo.api.shared import measured
from kvpo.common.environment import environment
from kvpo.common.files import write_atomic
from kvpo.common.progress import Progress
from kvpo.common.rng import stream
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.evaluation.evaluate import Scored, kinds_of, values_of
from kvpo.evaluation.intervals import RESAMPLES, TOTAL, bootstrap_interval
from kvpo.rewards.scorer import load_rewards
from kvpo.runs.build import evaluation_scripts
from kvpo.types import Script

ARMS = {
    "real": [],
    "shuffled": ["--shuffle-advantages"],
    "zero": ["--zero-advantages"],
    "shuffled_free": ["--shuffle-advantages", "--velocity-penalty.weight", "0"],
}


Run = Callable[[Sequence[str]], int]
"""Arguments of `kvpo` -> the exit status of the command."""


def run_kvpo(arguments: Sequence[str]) -> int:
    """Run a command of the package in a process of its own."""
    return subprocess.run([sys.executable, "-m", "kvpo", *arguments]).returncode


def finished(folder: Path) -> bool:
    """Whether a run has ended: its report is written last."""
    return (folder / "report.html").exists()


def aligned(folder: Path, recipe: str, options: Sequence[str], run: Run = run_kvpo) -> bool:
    """Train a recipe, or go on with it, unless the run is finished; False where it failed."""
    if finished(folder):
        return True
    resume = ["--resume"] if (folder / "config.resolved.yaml").exists() else []
    return run(["align", recipe, "--out", str(folder), *options, *resume]) == 0 and finished(folder)


def must_align(folder: Path, recipe: str, options: Sequence[str] = ()) -> None:
    """Train as `aligned` does; SystemExit, below the run's own error, where it failed."""
    if not aligned(folder, recipe, options):
        raise SystemExit(
            f"{folder}: this run has failed; what is finished stays, give the same again"
        )


def train(recipe: str, arm: str, seed: int, out: Path) -> None:
    """The run of an arm, if it is not there yet."""
    must_align(out, recipe, ["--seed", str(seed), "--evaluate.scripts", "2", *ARMS[arm]])


def claimed_by(recipe: RunConfig, scripts: int, seed: int) -> RunConfig:
    """The recipe as a claim evaluates it: so many scripts of this evaluation seed, no videos kept."""
    evaluate = replace(recipe.evaluate, scripts=scripts, seed=seed, videos=0)
    # What rewards see while training may be rounded; what is claimed is measured without.
    return replace(recipe, evaluate=evaluate, vae_dtype="float32")


def values(
    spec: str, config: RunConfig, scripts: Sequence[Script], path: Path, progress: Progress
) -> dict[str, torch.Tensor]:
    """Per-script values of every component, float64, kept in ``path``.

    The mean of the trained ones comes first.
    """
    if not path.exists():
        device = torch.device("cpu")
        rewards = load_rewards(config.rewards, device)
        scored, _ = measured(spec, config, scripts, rewards, device, progress)
        trained = [
            k for k, kind in enumerate(kinds_of(rewards, config.evaluate.seeds)) if kind == "train"
        ]
        total = Scored((TOTAL,), scored.r_KN[trained].mean(dim=0, keepdim=True), ())
        write_atomic(path, json.dumps(values_of(total) | values_of(scored), allow_nan=False) + "\n")
    found = json.loads(path.read_text())
    return {
        name: torch.tensor([math.nan if v is None else v for v in row], dtype=torch.float64)
        for name, row in found.items()
    }


def over_seeds(diff_SN: torch.Tensor, name: str) -> tuple[float, float, float]:
    """Mean of differences [training seeds, scripts] and its 95 % interval.

    Seeds and scripts are drawn anew.
    """
    S, N = diff_SN.shape
    g = stream(0, "claims", name)
    seeds = torch.randint(S, (RESAMPLES, S), generator=g)
    scripts = torch.randint(N, (RESAMPLES, N), generator=g)
    means = diff_SN[seeds[:, :, None], scripts[:, None, :]].mean(dim=(1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return float(diff_SN.mean()), low, high


def over_scripts(diff_N: torch.Tensor, *name: int | str) -> tuple[float, float, float]:
    """Mean of one run's differences, where both were measured, and its 95 % interval.

    Scripts are drawn anew, from the stream of this name.
    """
    known = diff_N[diff_N.isfinite()]
    return float(known.mean()), *bootstrap_interval(known, stream(0, *name))


def interval_text(mean: float, low: float, high: float) -> str:
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def tables(
    start: dict[str, torch.Tensor], runs: dict[str, dict[int, dict[str, torch.Tensor]]]
) -> str:
    """Markdown: every run against the start weights, then every control against the recipe."""
    lines = []
    for arm, seeds in runs.items():
        lines += [
            f"\n### {arm}\n",
            "| component | start | " + " | ".join(f"seed {s}" for s in seeds) + " | all seeds |",
            "|---" * (3 + len(seeds)) + "|",
        ]
        for name in start:
            diff_SN = torch.stack([run[name] - start[name] for run in seeds.values()])
            diff_SN = diff_SN[:, diff_SN.isfinite().all(dim=0)]
            cells = []
            for seed, d in zip(seeds, diff_SN):
                text = interval_text(*over_scripts(d, "claims", arm, seed, name))
                cells.append(
                    f"{text}, {float((d > 0).double().mean()):.0%}" if name == TOTAL else text
                )
            lines.append(
                f"| {name} | {float(start[name].nanmean()):.3f} | "
                + " | ".join(cells)
                + f" | {interval_text(*over_seeds(diff_SN, arm + name))} |"
            )
    for arm in [a for a in runs if a != "real" and "real" in runs]:
        both = sorted(set(runs[arm]) & set(runs["real"]))
        diff_SN = torch.stack([runs["real"][s][TOTAL] - runs[arm][s][TOTAL] for s in both])
        lines.append(
            f"\nreal minus {arm}, {TOTAL}, {len(both)} seeds: {interval_text(*over_seeds(diff_SN, 'minus' + arm))}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scripts", type=int, default=256)
    parser.add_argument("--evaluation-seed", type=int, default=9000)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    args = parser.parse_args()
    recipe, progress = load_config(recipe_path(args.recipe)), Progress()
    config = claimed_by(recipe, args.scripts, args.evaluation_seed)
    scripts = evaluation_scripts(config)
    kept = args.out / f"values-{args.evaluation_seed}-{args.scripts}"
    start = values(config.pipeline, config, scripts, kept / "start.json", progress)
    runs: dict[str, dict[int, dict[str, torch.Tensor]]] = {arm: {} for arm in args.arms}
    for seed in args.seeds:  # seed by seed, so that what there is can be compared at any time
        for arm in args.arms:
            out = args.out / f"{arm}-{seed}"
            train(args.recipe, arm, seed, out)
            path = kept / f"{arm}-{seed}.json"
            runs[arm][seed] = values(f"{out}:ema", config, scripts, path, progress)
            said = f"{args.scripts} scripts of evaluation seed {args.evaluation_seed}, EMA weights\n{tables(start, {a: r for a, r in runs.items() if r})}\n"
            write_atomic(args.out / "claims.md", said)
    write_atomic(
        args.out / "environment.json", json.dumps(environment(torch.device("cpu")), indent=1) + "\n"
    )
    print((args.out / "claims.md").read_text())


if __name__ == "__main__":
    main()
