"""`kvpo evaluate`: a generator on fixed scripts and seeds, alone or against another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kvpo.api.defaults import SCRIPTS
from kvpo.commands.options import Positional
from kvpo.common.environment import command, pick_device
from kvpo.common.files import say_replaced, try_file, unused
from kvpo.common.progress import Progress
from kvpo.config import load_config, recipe_path
from kvpo.evaluation.settings import EvaluateConfig


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
    recipe = load_config(recipe_path(args.recipe))
    from kvpo.api.shared import measured
    from kvpo.evaluation.evaluate import (
        compare,
        enough_scripts,
        kinds_of,
        means,
        means_table,
        table,
        write_comparison,
        write_means,
    )
    from kvpo.generators.readable import check_prompts
    from kvpo.rewards.scorer import load_rewards
    from kvpo.runs.build import evaluation_scripts, trained_families, unseen
    from kvpo.runs.loading import pipeline_folder

    config = replace(
        recipe,
        evaluate=replace(
            recipe.evaluate,
            scripts=args.scripts,
            seeds=args.seeds,
            seed=args.seed,
            videos=0,
            prompts=args.prompts or recipe.evaluate.prompts,
        ),
    )
    if args.blocks:
        config = replace(config, data=replace(config.data, blocks=args.blocks))
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
    if args.against:
        a, b = scored
        rows = compare(a, b, kinds)
        progress.say(table(rows, "A", "B"))
        progress.say(f"A = {labels[0]}, B = {labels[1]}, {_measured_on(args, len(scripts))}")
        progress.say(enough_scripts(rows))
        write_comparison(
            out,
            rows,
            labels[0],
            labels[1],
            scripts,
            config.evaluate,
            command(),
            unseen(config),
            (a, b),
        )
    else:
        rows = means(scored[0], kinds)
        progress.say(means_table(rows))
        progress.say(f"{labels[0]}, {_measured_on(args, len(scripts))}")
        write_means(
            out, rows, labels[0], scripts, config.evaluate, command(), unseen(config), scored[0]
        )
    progress.say(f"written to {out}")


def _measured_on(args: Evaluate, scripts: int) -> str:
    return (
        f"{scripts} scripts, {args.seeds} video{'s' * (args.seeds > 1)} of each, seed {args.seed}"
    )
