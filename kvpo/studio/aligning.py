"""The recipe by which a generator is aligned to a fitted preference, with a KL and guards.

What the studio's recipe trained on becomes held-out evaluators, of another family than the
preference: they must not fall while the choices rise. The KL to the start weights acts, and the
evaluators are looked at while the run trains, so that it ends where they show that the reward is
gamed (`kvpo.evaluation.goodhart`, which looks at held-out rows alone).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from kvpo.common.files import write_atomic
from kvpo.config import RunConfig, load_config, recipe_path, to_dict
from kvpo.method.loss import ClippedObjective
from kvpo.rewards.entry import RewardEntry
from kvpo.rewards.registry import PREFERENCE
from kvpo.runs.loading import is_run, named

LOOKS = 3
"""Evaluations of a run whose recipe asks for none on the way."""


def studio_recipe(recipe: str, generator: str) -> RunConfig:
    """Settings that a studio's generator is trained by.

    ``recipe`` where it is given; else those of the miniature, or of the run whose weights the
    generator are. It goes on from the weights that were judged, a run's too. Raises ValueError for
    a pipeline folder, which has none.
    """
    folder, _ = named(generator)
    own = "mini" if generator == "mini" else str(folder) if is_run(folder) else ""
    if not (recipe or own):
        raise ValueError(
            f"{generator} is a pipeline folder, which says nothing of how it is trained; start the studio with --recipe, a shipped recipe or a YAML file"
        )
    config = load_config(recipe_path(recipe or own))
    return dataclasses.replace(config, pipeline=generator)


def align_to(config: RunConfig, preference: Path) -> RunConfig:
    """Change a recipe so that it trains on a preference alone.

    Raises ValueError where nothing is left to guard it.
    """
    others = [entry for entry in config.rewards if not entry.name.startswith(PREFERENCE)]
    guards = [
        dataclasses.replace(entry, role="eval", weight=1.0) if entry.role == "train" else entry
        for entry in others
    ]
    if not guards:
        raise ValueError(
            "the recipe has no other reward that could guard what nobody chose by; give the studio a --recipe with rewards"
        )
    trained = RewardEntry(f"{PREFERENCE}{preference}")
    evaluate, objective = config.evaluate, config.objective
    if not evaluate.every:
        evaluate = dataclasses.replace(evaluate, every=-(-config.steps // LOOKS))
    if isinstance(objective, ClippedObjective) and not objective.kl_beta:
        objective = dataclasses.replace(objective, kl_beta=ClippedObjective.kl_beta)
    return dataclasses.replace(
        config, rewards=(trained, *guards), evaluate=evaluate, objective=objective
    )


def write_recipe(config: RunConfig, path: Path) -> Path:
    """Write settings as a recipe, every one of them, so that they stay as they were asked for."""
    return write_atomic(path, yaml.safe_dump(to_dict(config), sort_keys=False))
