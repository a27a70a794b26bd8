"""`kvpo evaluate`: a generator on fixed scripts and seeds, alone or against another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvpo.api.defaults import SCRIPTS
from kvpo.commands.options import Positional
from kvpo.common.environment import command, pick_device
from kvpo.common.files import say_replaced, try_file, unused
from kvpo.common.progress import Progress
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.evaluation.settings import EvaluateConfig

if TYPE_CHECKING:
    from kvpo.evaluation.evaluate import Scored
    from kvpo.types import Script


@dataclass(frozen=True)
class Evaluate:
    """Measure a generator on fixed scripts and seeds, all with 95 % intervals.

    With --against it gives paired differences.
    """

    generator: Positional[str] = "mini"
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    against: str = ""
    """The generator to compare with, on the same scripts and noise."""
    recipe: str = "mini"
    """Recipe that rewards, evaluators, sampler and scripts are taken from."""
    prompts: str = ""
    """Prompt file to measure on; default: what the recipe evaluates on."""
    scripts: int = SCRIPTS
    seeds: int = EvaluateConfig.seeds
    """Videos of every script, each with noise of its own.
    From 2 on their diversity is measured too."""
    seed: int = EvaluateConfig.seed
    """Names the scripts' and the noise's streams."""
    blocks: int = 0
    """Length of the videos, blocks; 0 = the recipe's."""
    out: Path = Path("runs/evaluate.json")
    device: str = "auto"

    def __call__(self) -> None:
        evaluate_command(self)


def evaluate_command(args: Evaluate) -> None:
    """Measure as the options say; what may be wrong in them is found before anything is loaded."""
    config = _asked(args)
    from kvpo.api.shared import measured
    from kvpo.evaluation.evaluate import kinds_of
    from kvpo.generators.readable import check_prompts
    from kvpo.rewards.scorer import load_rewards
    from kvpo.runs.build import evaluation_scripts, trained_families
    from kvpo.runs.loading import pipeline_folder

    device, scripts, progress = pick_device(args.device), evaluation_scripts(config), Progress()
    out = unused(args.out) if args.out == Evaluate.out else args.out
    try_file(out)
    generators = list(filter(None, (args.generator, args.against)))
    for spec in generators:
        check_prompts(pipeline_folder(spec), scripts, progress.warn)
    say_replaced([out], progress.say)
    progress.log(
        f"kvpo evaluate {' against '.join(generators)} on {device}: {_measured_on(args, len(scripts))}, into {out}"
    )
    with progress.timed("loading the rewards"):
        rewards = load_rewards(config.rewards, device)
    kinds = kinds_of(
        rewards, args.seeds, trained_families(args.generator) | trained_families(args.against)
    )
    scored, labels = zip(
        *(measured(spec, config, scripts, rewards, device, progress) for spec in generators),
        strict=True,
    )
    for line in _written(
        out, config, scripts, scored, labels, kinds, _measured_on(args, len(scripts))
    ):
        progress.say(line)
    progress.say(f"written to {out}")


def _asked(args: Evaluate) -> RunConfig:
    """The recipe, with what the options say of its evaluation."""
    recipe = load_config(recipe_path(args.recipe))
    asked = replace(
        recipe.evaluate,
        scripts=args.scripts,
        seeds=args.seeds,
        seed=args.seed,
        videos=0,
        prompts=args.prompts or recipe.evaluate.prompts,
    )
    config = replace(recipe, evaluate=asked)
    if args.blocks:
        config = replace(config, data=replace(config.data, blocks=args.blocks))
    return config


def _written(
    out: Path,
    config: RunConfig,
    scripts: Sequence[Script],
    scored: Sequence[Scored],
    labels: Sequence[str],
    kinds: Sequence[str],
    measured_on: str,
) -> list[str]:
    """Write the numbers of one generator, or of two side by side; returns what to say of them."""
    from kvpo.evaluation import evaluate as tables
    from kvpo.runs.build import unseen

    facts = (scripts, config.evaluate, command(), unseen(config))
    if len(scored) == 1:
        rows = tables.means(scored[0], kinds)
        tables.write_means(out, rows, labels[0], *facts, scored[0])
        return [tables.means_table(rows), f"{labels[0]}, {measured_on}"]
    a, b = scored
    rows = tables.compare(a, b, kinds)
    tables.write_comparison(out, rows, labels[0], labels[1], *facts, (a, b))
    return [
        tables.table(rows, "A", "B"),
        f"A = {labels[0]}, B = {labels[1]}, {measured_on}",
        tables.enough_scripts(rows),
    ]


def _measured_on(args: Evaluate, scripts: int) -> str:
    return (
        f"{scripts} scripts, {args.seeds} video{'s' * (args.seeds > 1)} of each, seed {args.seed}"
    )
