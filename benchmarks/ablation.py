"""Comparison of replay contexts, energies and temperatures by one step along each mean gradient.

All variants get the same groups.

Training runs of a few minutes differ by their noise more than by these choices. Here every variant
sees the same rollouts and rewards at the start weights, its groups' gradients are clipped and
averaged as an update would, weights are scaled by their root mean square over the groups as AdamW
would, and the step is as long as moves velocities by the same distance.

    python benchmarks/ablation.py [--groups 96] [--scripts 64]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kvpo.common.environment import environment
from kvpo.common.progress import Progress
from kvpo.config import load_config, recipe_path
from kvpo.evaluation.evaluate import Scored, compare, evaluate, kinds_of, table
from kvpo.method.advantages import UnsafePolicy
from kvpo.method.energies import DenoisedEnergy, Surrogate, Temperature, VelocityEnergy
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.routing import KVRouting
from kvpo.runs.parts import Parts
from kvpo.types import Rollout

EXPLORER = KVRouting(nearest=2, window_blocks=3)
"""Contexts differ from the window's second block on."""


@dataclass
class Variant:
    context: str = "branch"
    surrogate: Surrogate = VelocityEnergy()
    temperature: Temperature = Temperature()
    unsafe: UnsafePolicy = UnsafePolicy()
    advantages: dict = field(default_factory=dict)
    """Changes to the recipe's advantage rule."""
    total: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0
    """Sums over the groups of the gradient and of its square, [n]."""

    def direction(self, groups: int) -> torch.Tensor:
        """Downhill [n]."""
        rms = (self.squares / groups).sqrt()
        return -self.total / groups / (rms + rms.mean())


def variants() -> dict[str, Variant]:
    return {
        "default: context branch, velocity energy, tau auto": Variant(),
        "context anchor": Variant(context="anchor"),
        "context self": Variant(context="self"),
        "x0 energy": Variant(surrogate=DenoisedEnergy()),
        "tau 0.02": Variant(temperature=Temperature(0.02)),
        "local rewards only": Variant(advantages={"global_": 0.0}),
        "the anchor a member": Variant(advantages={"anchor": True}),
        "groups without a branch above the anchor skipped": Variant(unsafe=UnsafePolicy("skip")),
    }


def add_group(
    run: Parts, index: int, found: dict[str, Variant]
) -> tuple[Rollout, dict[str, torch.Tensor]]:
    """Add one group's gradient to every variant's sums; returns the group."""
    script = run.source.script(0, index)
    embeddings = run.embed(script)
    rollout, rewards, _ = run.explore(script, embeddings, ("train", 0, index))
    for v in found.values():
        advantage = replace(run.advantages, **v.advantages)(rewards)
        run.updater.temperature, run.updater.unsafe = v.temperature, v.unsafe
        run.updater.accumulate(
            Replay(
                run.pipeline,
                rollout,
                embeddings,
                CONTEXTS[v.context],
                v.surrogate,
                range(len(advantage.values)),
            ),
            advantage,
            run.phases,
        )
        gradient = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in run.policy.parameters
            ]
        )
        run.updater.optimizer.zero_grad(set_to_none=True)
        v.total, v.squares = v.total + gradient, v.squares + gradient.square()
    return rollout, embeddings


def moved(run: Parts, direction: torch.Tensor, length: float) -> list[torch.Tensor]:
    """The start weights, ``length`` times ``direction`` further."""
    parts = direction.split([p.numel() for p in run.policy.parameters])
    return [w + length * d.view_as(w) for w, d in zip(run.policy.reference, parts)]


def distance(run: Parts, weights: list[torch.Tensor], kept: list) -> float:
    """Mean squared change of the velocities on the anchors' windows.

    The start weights explain these exactly.
    """
    with run.policy.using(weights):
        energies = [
            Replay(
                run.pipeline, r, e, CONTEXTS["branch"], VelocityEnergy(), [r.num_branches]
            ).energies()
            for r, e in kept
        ]
    return float(torch.cat(energies).mean())


def step(run: Parts, direction: torch.Tensor, kept: list, wanted: float) -> list[torch.Tensor]:
    """The weights along ``direction`` at the wanted distance."""
    length = 1e-2 / float(direction.norm())
    for _ in range(6):
        length *= math.sqrt(wanted / distance(run, moved(run, direction, length), kept))
    return moved(run, direction, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=96)
    parser.add_argument("--scripts", type=int, default=64)
    parser.add_argument(
        "--distance", type=float, default=0.003, help="mean squared change of the velocities"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.json"))
    args = parser.parse_args()
    config = load_config(recipe_path("mini"))
    config = replace(
        config,
        groups=1,
        kv_routing=EXPLORER,
        evaluate=replace(config.evaluate, scripts=args.scripts, seed=2000, videos=0),
    )
    progress = Progress()
    run, found, kept = Parts(config, progress), variants(), []
    with progress.bar("groups", args.groups) as bar:
        for index in range(args.groups):
            group = add_group(run, index, found)
            kept = [*kept, group][:8]
            bar.advance()

    def scored(weights: list[torch.Tensor]) -> Scored:
        with run.policy.using(weights):
            return evaluate(
                run.pipeline, run.sampler, run.scripts, run.rewards, config.score, config.evaluate
            )

    start, results = scored(run.policy.reference), {}
    kinds = kinds_of(run.rewards, run.config.evaluate.seeds)
    for name, v in found.items():
        results[name] = compare(
            scored(step(run, v.direction(args.groups), kept, args.distance)), start, kinds
        )
        progress.say(f"\n{name}\n{table(results[name], 'step', 'start')}")
    record = {
        "environment": environment(run.device),
        "groups": args.groups,
        "scripts": args.scripts,
        "distance": args.distance,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
