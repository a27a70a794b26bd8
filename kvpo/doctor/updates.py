"""Gradients and updates of one group: whole, exact in pieces, and the same after resuming."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from kvpo.common.rng import normal
from kvpo.common.timing import Phases
from kvpo.doctor.finding import Finding, at_most
from kvpo.method.advantages import Advantage
from kvpo.method.replay import Replay
from kvpo.policy.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from kvpo.runs.parts import Parts
from kvpo.types import Rollout


def check_gradients(run: Parts, replay, rollout: Rollout) -> Iterator[Finding]:
    """Check the gradient of a first update.

    Its ratios are 1, every trained tensor gets a gradient, and passes of any size give the same.
    ``replay``: `kvpo.doctor.rows.Group.replay` of the group.
    """
    advantage = _made_up_advantage(run, rollout)
    update = run.updater.accumulate(replay(rollout), advantage, Phases())
    together = _take_gradients(run)
    ends = ("loss/ratio_min", "loss/ratio_max")
    ratios = [update.metrics[end] for end in ends if end in update.metrics]
    if ratios:  # regressions have none
        worst = max(abs(ratio - 1.0) for ratio in ratios)
        yield at_most("ratio before the first update: distance from 1", worst, 0.0)
    dead = [name for name, g in zip(run.policy.names, together) if not g.any()]
    # B starts at zero, so A's gradient is zero until the first update
    if run.config.policy.train == "lora":
        dead = [name for name in dead if "lora_A" not in name]
    yield at_most(
        "trainable tensors without gradient" + (f", first {dead[0]}" if dead else ""),
        len(dead),
        0.0,
    )
    run.updater.accumulate(
        replay(rollout, size=len(run.pipeline.geometry.sigmas)), advantage, Phases()
    )
    apart = _take_gradients(run)
    norm = sum(float(g.square().sum()) for g in together) ** 0.5
    yield at_most(
        "gradient a few velocities at a time against all at once",
        sum(float((a - b).square().sum()) for a, b in zip(together, apart)) ** 0.5 / norm,
        1e-4,
    )


def check_resuming(run: Parts, replay, rollout: Rollout) -> Finding:
    """Compare two updates in one go with one update, a checkpoint read back, and the second."""
    advantage = _made_up_advantage(run, rollout)
    _update(run, replay(rollout), advantage)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_checkpoint(
            Path(folder), Snapshot.of(1, run.policy, run.updater.optimizer, {}), keep=1
        )
        _update(run, replay(rollout), advantage)
        straight = run.policy.snapshot()
        load_checkpoint(saved, run.policy, run.updater.optimizer)
    _update(run, replay(rollout), advantage)
    worst = max(float((a - b).abs().max()) for a, b in zip(straight, run.policy.snapshot()))
    return at_most("an update after resuming == without the interruption, bit for bit", worst, 0.0)


def _update(run: Parts, replay: Replay, advantage: Advantage) -> None:
    run.updater.accumulate(replay, advantage, Phases())
    run.updater.step()


def _made_up_advantage(run: Parts, rollout: Rollout) -> Advantage:
    """A random advantage of mean 0 of every branch: the checks need no rewards."""
    A_G = normal((rollout.num_branches,), run.config.seed, "doctor", "advantage").double()
    nothing = torch.zeros(0)
    return Advantage(
        A_G - A_G.mean(), A_G, nothing, nothing, torch.ones(len(A_G), dtype=torch.bool), True, {}
    )


def _take_gradients(run: Parts) -> list[torch.Tensor]:
    """The gradient of every trained tensor, taken away from it."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.policy.parameters]
    run.updater.optimizer.zero_grad(set_to_none=True)
    return taken
