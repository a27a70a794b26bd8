"""Stage 8: save and resume everything a run needs to go on as if it had never stopped.

    checkpoints/step-000010/  tensors.safetensors   current, behaviour, EMA, reference weights, optimizer moments
                              state.json            counters, the config they belong to

A checkpoint is written beside its final place and renamed: it is there completely or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvpo.policy import Policy

SETS = ("current", "behaviour", "average", "reference")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Newest checkpoints that stay, beside that of the best held-out evaluation."""

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every = {self.every} and checkpoint.keep = {self.keep} must be 1 or more")


def save_checkpoint(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], keep: int, best: int = 0) -> Path:
    """``folder``/step-..., complete, and all but the ``keep`` newest and that of step ``best`` removed.  OSError with the way out where the disk refuses; nothing is lost then."""
    target = at_step(folder, step)
    part = folder / f".{target.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(_tensors(policy, optimizer), part / "tensors.safetensors")
        state = {"step": step, "updates": policy.updates, "lag": policy.lag, "optimizer_steps": _optimizer_steps(optimizer), "config": config}
        (part / "state.json").write_text(json.dumps(state))
        _flush(part)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"checkpoint {target} could not be written ({error}); the ones before it are untouched. Free disk space, then go on with --resume") from None
    for old in checkpoints(folder)[:-keep]:
        if old != at_step(folder, best):
            shutil.rmtree(old)
    return target


def at_step(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies, if there is one."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        missing = [key for key in ("step", "updates", "lag", "optimizer_steps", "config") if key not in state]
        if missing:
            raise ValueError(f"it has no {missing}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(_broken(path, error)) from None
    return state


def load_checkpoint(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Put everything back; the step to go on with.  ValueError naming the file where it is broken or of another policy."""
    state, tensors = read_state(checkpoint), read_tensors(checkpoint)
    wanted = {f"{s}.{n}": p.shape for s in SETS for n, p in zip(policy.names, policy.parameters)}
    wrong = [n for n, shape in wanted.items() if n not in tensors or tensors[n].shape != shape]
    if wrong:
        raise ValueError(f"{checkpoint} belongs to another policy: {len(wrong)} of its tensors are missing or misshapen, first {wrong[0]}; resume with the run's own config")
    for s, weights in zip(SETS, (policy.parameters, policy.behaviour, policy.average, policy.reference)):
        for name, w in zip(policy.names, weights):
            w.data.copy_(tensors[f"{s}.{name}"])
    policy.layout.refresh()
    policy.updates, policy.lag = state["updates"], state["lag"]
    for name, p in zip(policy.names, policy.parameters):
        if f"exp_avg.{name}" in tensors:
            moments = {m: tensors[f"{m}.{name}"].to(p.device) for m in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(state["optimizer_steps"])), **moments}
    return state["step"]


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    path = checkpoint / "tensors.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(_broken(path, error)) from None


def _broken(path: Path, error: Exception) -> str:
    return f"{path} is broken or missing ({error}); delete {path.parent} to go on from the checkpoint before it"


def _tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    sets = zip(SETS, ([p.detach() for p in policy.parameters], policy.behaviour, policy.average, policy.reference))
    tensors = {f"{s}.{name}": w.contiguous() for s, weights in sets for name, w in zip(policy.names, weights)}
    for name, p in zip(policy.names, policy.parameters):
        tensors |= {f"{m}.{name}": optimizer.state[p][m].contiguous() for m in MOMENTS if p in optimizer.state}
    return tensors


def _optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    return max((int(s["step"]) for s in optimizer.state.values()), default=0)


def _flush(folder: Path) -> None:
    """On disk before the rename makes it count."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
