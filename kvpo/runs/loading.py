"""Load a generator by its name: a pipeline folder, `mini`, or the weights of a run.

A run's weights are named `RUN`, `RUN:ema`, `RUN:online`, `RUN:start` or `RUN:best`.
"""

from __future__ import annotations

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

SETS = {"ema": "average", "online": "current", "start": "reference", "best": "average"}
"""Weights of a run -> their name in a checkpoint."""


def load_pipeline(
    name: str,
    device: torch.device | str = "cpu",
    vae_dtype: str = "float32",
    dtype: str = "float32",
) -> Pipeline:
    """A pipeline folder, or `mini`."""
    return Pipeline.load(folder_of(name), device, getattr(torch, dtype), getattr(torch, vae_dtype))


def folder_of(name: str) -> Path:
    """Folder of a pipeline that a recipe names."""
    return Path(WEIGHTS if name == "mini" else name)


def load_generator(
    spec: str, device: torch.device | str = "cpu", vae_dtype: str = "float32", dtype: str = ""
) -> tuple[Pipeline, str]:
    """Load a generator; returns it and a label for it.

    ``dtype``: default the run's own, float32 for a folder. Raises a FileNotFoundError or ValueError
    that names what is missing.
    """
    folder, which = named(spec)
    if not is_run(folder):
        return load_pipeline(spec, device, vae_dtype, dtype or "float32"), spec
    run, which = str(folder), which or "ema"
    if which not in SETS:
        raise ValueError(
            f"{spec!r} names weights {which!r} of a run; choose one of {', '.join(SETS)}"
        )
    checkpoint = _checkpoint(Path(run), which)
    config = run_config(Path(run))
    pipeline = load_pipeline(config.pipeline, device, vae_dtype, dtype or config.dtype)
    policy = Policy(pipeline.generator, config.policy, config.seed)
    tensors = read_tensors(checkpoint, f"{SETS[which]}.")
    check_finite(
        tensors.items(), str(checkpoint), "go back to a checkpoint before it, or export RUN:start"
    )
    for name, p in zip(policy.names, policy.parameters):
        p.data.copy_(tensors[f"{SETS[which]}.{name}"])
    policy.layout.refresh()
    pipeline.generator.requires_grad_(False)
    return pipeline, f"{Path(run).name}:{which} {checkpoint.name}"


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
    """The pipeline folder behind a generator's name: for a run, the one that it started from."""
    folder, _ = named(spec)
    return folder_of(run_config(folder).pipeline if is_run(folder) else spec)


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
