"""A small resumable training loop, shared by the stages of ``kvpo pretrain``."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvpo.common.files import beside, first_line, refusals, write_atomic
from kvpo.common.progress import Progress

AGAIN = "free disk space, then the same command goes on"
MATRIX_RATE = 5.0
"""Learning rate of Muon over that of AdamW, both in AdamW's units.

The unit is an update of about one rate per weight. Measured: 600 steps of stage 2 with Muon are
worth 1,100 with AdamW alone.
"""


class Stage:
    """Training of ``modules`` on ``loss(step) -> (loss, {name: value})``.

    It leaves their averaged weights in place.

    Everything random comes from streams named by the step, and the state file is replaced whole or
    not at all, so a stage that was killed at any instant goes on from its last state and ends bit
    for bit as if it had not been.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        modules: Mapping[str, nn.Module],
        loss: Callable,
        *,
        steps: int,
        lr: float,
        warmup: int = 50,
        weight_decay: float = 0.01,
        ema: float = 0.99,
        save_every: int = 100,
        clip: float = 1.0,
        matrix_rate: float = MATRIX_RATE,
    ):
        self.name = name
        self.folder = Path(folder)
        self.modules = nn.ModuleDict(dict(modules))
        self.loss = loss
        self.steps = steps
        self.lr = lr
        self.warmup = warmup
        self.ema_decay = ema
        self.save_every = save_every
        self.clip = clip
        self.matrix_rate = matrix_rate
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.kernels = Kernels(self.modules)
        self.optimizers = optimizers(self.modules, self.kernels, lr, weight_decay)
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.seconds = 0, 0.0

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.state.pt"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def resume(self) -> bool:
        """Go on from the state file, if there is one."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True, map_location=self.parameters[0].device)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for mine, saved in zip(self.average, state["average"]):
            mine.copy_(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        forget(self.log, self.step)
        return True

    def finished(self) -> bool:
        """Whether the state file is of the last step, so that nothing is left to train."""
        if not self.path.exists():
            return False
        return torch.load(self.path, weights_only=True, map_location="cpu")["step"] == self.steps

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
        }
        save_whole({**state, "step": self.step, "seconds": self.seconds}, self.path)

    def rate(self) -> float:
        if self.step < self.warmup:
            return self.lr * (self.step + 1) / self.warmup
        done = (self.step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def update(self) -> dict[str, float]:
        loss, metrics = self.loss(self.step)
        # not the optimizers': kernels are theirs only as matrices
        self.modules.zero_grad(set_to_none=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate() * (
                    self.matrix_rate if isinstance(optimizer, torch.optim.Muon) else 1.0
                )
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"{self.name}: gradient norm is {norm} at step {self.step}; nothing was updated. Lower the learning rate ({self.rate():.2g})"
            )
        self.kernels.take_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.step += 1
        return {"loss": float(loss.detach()), "grad_norm": norm, "lr": self.rate(), **metrics}

    def run(self, progress: Progress, until: int | None = None) -> None:
        """Train to the end and take the averaged weights, or train only to the step ``until``.

        A second call goes on from there.
        """
        until = self.steps if until is None else min(until, self.steps)
        if self.step == 0 and self.resume():
            progress.say(f"{self.name}: goes on after step {self.step} of {self.steps}")
        self.modules.train()
        self.folder.mkdir(parents=True, exist_ok=True)
        with progress.bar(self.name, self.steps, self.step) as bar:
            while self.step < until:
                began = time.monotonic()
                metrics = self.update()
                self.seconds += time.monotonic() - began
                bar.advance(f"loss {metrics['loss']:.4f}")
                if self.step % 10 == 0 or self.step == self.steps:
                    self.note(metrics)
                if self.step % self.save_every == 0 or self.step == until:
                    self.save()
        if self.step == self.steps:
            self.take_average()

    def note(self, metrics: Mapping[str, float]) -> None:
        """A line of the log."""
        with refusals(self.log, AGAIN), self.log.open("a") as file:
            file.write(
                json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **metrics}) + "\n"
            )

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights into the modules."""
        for p, mean in zip(self.parameters, self.average):
            p.copy_(mean)
        self.modules.eval()


class Kernels:
    """The convolutions inside stacks of blocks as matrices [out, in x places], which Muon wants.

    They share the weights' memory.
    """

    def __init__(self, modules: nn.Module):
        kinds = (nn.Conv2d, nn.Conv3d)
        self.weights = [
            layer.weight for layer in stacked(modules, kinds) if layer.weight.requires_grad
        ]
        self.matrices = [nn.Parameter(_matrix(weight.detach())) for weight in self.weights]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if weight.data_ptr() != matrix.data_ptr():
                raise ValueError(
                    f"a kernel {list(weight.shape)} is not stored channels-last, so its matrix would be a copy; call use_channels_last first"
                )

    def take_gradients(self) -> None:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else _matrix(weight.grad)


def _matrix(kernel: torch.Tensor) -> torch.Tensor:
    """[out, in, *places] -> [out, places x in]; of what is stored channels-last it is a view."""
    return kernel.movedim(1, -1).flatten(1)


def stacked(modules: nn.Module, kinds) -> list[nn.Module]:
    """The layers of these kinds that lie in stacks of blocks.

    First and last layers are none of them.
    """
    found = [
        layer
        for stack in modules.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack.modules()
        if isinstance(layer, kinds)
    ]
    return list(dict.fromkeys(found))


def optimizers(
    modules: nn.Module, kernels: Kernels, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Make Muon for weights inside stacks of blocks, and AdamW for all other parameters.

    Muon gets the weights of linear layers and convolutions; only trainable ones count.
    """
    linear = [layer.weight for layer in stacked(modules, nn.Linear) if layer.weight.requires_grad]
    chosen = {*linear, *kernels.weights}
    others = [p for p in modules.parameters() if p.requires_grad and p not in chosen]
    matrices = [*linear, *kernels.matrices]
    muon = (
        [
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        ]
        if matrices
        else []
    )
    return [*muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]


def forget(log: Path, step: int) -> None:
    """Drop the log's lines after ``step``, and a last line cut off in the middle.

    Those steps are done again.
    """
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_atomic(log, "".join(kept))


def save_whole(state: Mapping[str, Any], path: Path) -> None:
    """Save ``path`` by torch.save, there completely or not at all.

    Raises OSError with the way out where the disk refuses.
    """
    with beside(path, AGAIN) as part:
        with part.open(
            "wb"
        ) as file:  # of a path torch.save would not say why it could not be written
            try:
                torch.save(state, file)
            # how it says what the disk said; a device's errors have classes of their own
            except RuntimeError as error:
                if type(error) is not RuntimeError:
                    raise
                raise (
                    error.__context__
                    if isinstance(error.__context__, OSError)
                    else OSError(first_line(error))
                ) from None
        os.replace(part, path)
