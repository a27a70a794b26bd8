"""Load a generator by its name: a pipeline folder, `mini`, or the weights of a run.

A run's weights are named `RUN`, `RUN:ema`, `RUN:online`, `RUN:start` or `RUN:best`. A run may start
from those of another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from kvpo.common.finite import check_finite
from kvpo.config import RunConfig, from_dict
from kvpo.evaluation.goodhart import history, judge
from kvpo.generators.pipeline import Pipeline
from kvpo.mini import WEIGHTS
from kvpo.policy.checkpoint import at_step, checkpoints, read_tensors
from kvpo.policy.policy import Policy
from kvpo.runs.start_weights import FILE, Origin, merge_adapter, origin_of, put_kept

SETS = {"ema": "average", "online": "current", "start": "reference", "best": "average"}
"""Weights of a run -> their name in a checkpoint."""


@dataclass(frozen=True)
class RunWeights:
    """Weights of a run: which of its sets, in which of its checkpoints."""

    run: Path
    which: str
    checkpoint: Path

    @property
    def label(self) -> str:
        return f"{self.run.name}:{self.which} {self.checkpoint.name}"


@dataclass(frozen=True)
class Start:
    """The start of a run: a pipeline folder, or the weights of another run on top of one."""

    folder: Path
    """Pipeline folder that has everything, or everything but the transformer's weights."""
    weights: RunWeights | None = None
    """Weights of another run, which it takes."""
    kept: Path | None = None
    """Weights of another run, which it took and has kept (`kvpo.runs.start_weights`)."""

    @property
    def of_run(self) -> bool:
        """Whether these are weights of another run."""
        return self.weights is not None or self.kept is not None

    def put_into(self, pipeline: Pipeline) -> float:
        """Give the folder's pipeline these weights, an adapter merged.

        Returns the share of the adapter that rounding has lost (`merge_adapter`), 0 without one.
        """
        lost = 0.0
        if self.kept is not None:
            put_kept(pipeline, self.kept)
        if self.weights is not None:
            policy = put_weights(pipeline, self.weights)
            if policy.config.train == "lora":
                lost = merge_adapter(policy)
        return lost


def load_pipeline(
    name: str,
    device: torch.device | str = "cpu",
    vae_dtype: str = "float32",
    dtype: str = "float32",
) -> Pipeline:
    """A pipeline folder, or `mini`."""
    return Pipeline.load(folder_of(name), device, getattr(torch, dtype), getattr(torch, vae_dtype))


def folder_of(name: str) -> Path:
    """The folder of a pipeline that is no run's."""
    return Path(WEIGHTS if name == "mini" else name)


def load_generator(
    spec: str, device: torch.device | str = "cpu", vae_dtype: str = "float32", dtype: str = ""
) -> tuple[Pipeline, str]:
    """Load a generator; returns it and a label for it.

    ``dtype``: default the run's own, float32 for a folder. Raises a FileNotFoundError or ValueError
    that names what is missing.
    """
    if (weights := weights_of(spec)) is None:
        return load_pipeline(spec, device, vae_dtype, dtype or "float32"), spec
    folder = str(start_of_run(weights.run).folder)
    own = dtype or run_config(weights.run).dtype
    pipeline = load_pipeline(folder, device, vae_dtype, own)
    put_weights(pipeline, weights)
    return pipeline, weights.label


def weights_of(spec: str) -> RunWeights | None:
    """The weights that a generator's name names; None where it names a pipeline folder.

    Raises FileNotFoundError or ValueError where the run has no such weights.
    """
    folder, which = named(spec)
    if not is_run(folder):
        return None
    which = which or "ema"
    if which not in SETS:
        raise ValueError(
            f"{spec!r} names weights {which!r} of a run; choose one of {', '.join(SETS)}"
        )
    return RunWeights(folder, which, _checkpoint(folder, which))


def put_weights(pipeline: Pipeline, weights: RunWeights) -> Policy:
    """Give a run's pipeline its weights; returns the policy they are of, an adapter on the backbone.

    The pipeline is that of the run's own folder (`start_of_run`), and becomes what the run started
    from first. Nothing in it is left to be trained.
    """
    start_of_run(weights.run).put_into(pipeline)
    config, chosen = run_config(weights.run), SETS[weights.which]
    policy = Policy(pipeline.generator, config.policy, config.seed)
    tensors = read_tensors(weights.checkpoint, f"{chosen}.")
    check_finite(
        tensors.items(),
        str(weights.checkpoint),
        "go back to a checkpoint before it, or export RUN:start",
    )
    for name, p in zip(policy.names, policy.parameters):
        p.data.copy_(tensors[f"{chosen}.{name}"])
    policy.layout.refresh()
    pipeline.generator.requires_grad_(False)
    return policy


def start_of(spec: str, run: Path | None = None) -> Start:
    """The start that a recipe's `pipeline` names.

    ``run``: the folder of the run that goes on, if one does: what it has kept of the weights of
    another run is its start, whatever has become of those.
    """
    if run is not None and (run / FILE).is_file() and is_run(run):
        return start_of_run(run)
    return Start(pipeline_folder(spec), weights_of(spec))


def start_of_run(run: Path) -> Start:
    """The start of a run that was begun.

    Raises FileNotFoundError where that were weights of another run, and it does not have them.
    """
    kept = run / FILE
    if origin := origin_of_run(run):
        return Start(folder_of(origin.pipeline), kept=kept)
    pipeline = run_config(run).pipeline
    if is_run(named(pipeline)[0]):
        raise FileNotFoundError(
            f"{kept} is missing: the weights of {pipeline}, from which {run} started; copy it back"
        )
    return Start(folder_of(pipeline))


def origin_of_run(run: Path) -> Origin | None:
    """The origin of a run's start weights; None where a pipeline folder has them."""
    return origin_of(run / FILE) if (run / FILE).is_file() else None


def precision(spec: str, device: torch.device, dtype: str = "") -> str:
    """Precision to load a generator in; "" = its own.

    It is ``dtype`` where one is asked for, else a run's own, bfloat16 for a folder on a GPU, and a
    folder's own on a CPU.
    """
    return dtype or ("bfloat16" if device.type == "cuda" and not is_run(named(spec)[0]) else "")


def named(spec: str) -> tuple[Path, str]:
    """(folder, weights asked of it, "" for none) of a generator's name.

    A file or folder of the whole name wins. Else what follows the last colon names weights of a
    run; every other colon is the path's, as in runs/2026-01-01T12:30.
    """
    run, colon, which = spec.rpartition(":")
    if Path(spec).exists() or not colon or not (which in SETS or is_run(Path(run))):
        return Path(spec), ""
    return Path(run), which


def pipeline_folder(spec: str) -> Path:
    """The pipeline folder behind a generator's name: for a run, the one that is below its weights."""
    folder, _ = named(spec)
    return start_of_run(folder).folder if is_run(folder) else folder_of(spec)


def _checkpoint(run: Path, which: str) -> Path:
    """The newest; for `best` that of the best held-out evaluation."""
    found = checkpoints(run / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"{run} has no complete checkpoint; let the run go on until its first one"
        )
    if which != "best":
        return found[-1]
    best = judge(history(run / "evaluation", "ema")).best
    if at_step(run / "checkpoints", best) not in found:
        raise FileNotFoundError(
            f"{run} has no checkpoint of its best held-out evaluation (step {best})"
            + (
                "; take the start weights, which are the best: RUN:start"
                if not best
                else "; set evaluate.every, which keeps one"
            )
        )
    return at_step(run / "checkpoints", best)


def is_run(folder: Path) -> bool:
    return (folder / "config.resolved.yaml").is_file()


def run_config(run: Path) -> RunConfig:
    """The settings a run was made with."""
    return from_dict(yaml.safe_load((run / "config.resolved.yaml").read_text()))
