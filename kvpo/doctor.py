"""`kvpo doctor`: the invariants of method.md section 6, measured on the user's own generator and recipe."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from kvpo.advantages import Advantage
from kvpo.align import Alignment
from kvpo.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from kvpo.config import RunConfig
from kvpo.exploration.base import Explorer
from kvpo.progress import Progress
from kvpo.replay import CONTEXTS, Replay
from kvpo.rng import normal
from kvpo.rollout import roll_out
from kvpo.timing import Phases
from kvpo.types import BranchPlan, Rollout


@dataclass(frozen=True)
class Finding:
    """One invariant, and what was measured."""

    name: str
    value: float
    rule: str
    holds: bool


@dataclass(frozen=True)
class _Empty:
    """An explorer whose every plan is the anchor's."""

    explorer: Explorer

    @property
    def window_blocks(self) -> int:
        return self.explorer.window_blocks

    def eligible_forks(self, blocks, geometry):
        return self.explorer.eligible_forks(blocks, geometry)

    def plan(self, window, geometry, num_branches, generator, resident=None):
        return (BranchPlan(),) * num_branches


def examine(config: RunConfig) -> bool:
    """Print every finding as it is made; True if all hold."""
    started, all_hold = time.perf_counter(), True
    for finding in findings(config):
        all_hold &= finding.holds
        print(f"{'ok' if finding.holds else 'FAILED':<7} {finding.name:<58} {finding.value:<12.4g} {finding.rule}", flush=True)
    print(f"{'all invariants hold' if all_hold else 'some invariants FAILED'}; {time.perf_counter() - started:.0f} s")
    return all_hold


def findings(config: RunConfig) -> Iterator[Finding]:
    """The checks, cheapest first, on one group of the recipe."""
    unclipped = replace(config.optimizer, clip=math.inf)  # a clip would hide a gradient that is wrong by a factor
    run = Alignment(replace(config, shuffle_advantages=False, optimizer=unclipped), Path("."), Progress())
    yield _one_block_is_stock(run)
    script = run.source.script(0, 0)
    embeddings = run.embed(script)

    def roll(explorer: Explorer) -> Rollout:
        with run.policy.using(run.policy.behaviour):
            return roll_out(run.pipeline, run.sampler, explorer, config.rollout, script, embeddings, config.seed, ("doctor",), Phases())

    def replay(rollout: Rollout, rows=None, size: int = 0, context: str = config.context) -> Replay:
        return Replay(run.pipeline, rollout, embeddings, CONTEXTS[context], config.energy, rows, size, config.rollout.together)

    yield _at_most("empty plans: every row is the anchor, bit for bit", _spread(roll(_Empty(config.exploring)).latents), 0.0)
    rollout = roll(config.exploring)
    yield _at_most("branches start from the same noise: first inputs differ by", _spread(rollout.trajectory.inputs[:, 0, 0]) if _routes(rollout) else 0.0, 0.0)
    G = rollout.num_branches
    yield _at_most("the anchor, replayed by the weights that made it: energy", float(replay(rollout, [G]).energies()), 1e-9 if run.pipeline.generator.dtype == torch.float32 else 1e-3)
    energy = replay(rollout).energies()
    yield _at_most("replay one velocity at a time against all at once, relative", _relative(replay(rollout, size=1).energies(), energy), 1e-4)
    yield Finding("energies of the branches: spread / mean", float(energy.std() / energy.mean()), "> 0: not all equal", float(energy.std()) > 0.0)
    yield from _gradients(run, replay, rollout)
    yield _resumed(run, replay, rollout)


def _one_block_is_stock(run: Alignment) -> Finding:
    """A block without a past, through our loop and through diffusers' own forward with its own attention."""
    pipeline, model = run.pipeline, run.pipeline.generator
    latents = normal(pipeline.latent_shape(pipeline.geometry.block), run.config.seed, "doctor", "block")[None].to(run.device)
    text = pipeline.encode_text(run.source.script(0, 0).texts[:1])
    ours = [b.attn1.processor for b in model.transformer.blocks], [b.attn2.processor for b in model.transformer.blocks]
    with torch.no_grad():
        v = model.velocity(latents, 0.5, text, list(range(latents.shape[1])))
        for block in model.transformer.blocks:
            block.attn1.set_processor(WanAttnProcessor())
            block.attn2.set_processor(WanAttnProcessor())
        stock = model.transformer(latents.transpose(1, 2).to(model.dtype), torch.tensor([500.0], device=run.device), text.to(model.dtype), return_dict=False)[0].transpose(1, 2)
    for block, self_attention, cross_attention in zip(model.transformer.blocks, *ours):
        block.attn1.set_processor(self_attention)
        block.attn2.set_processor(cross_attention)
    return _at_most("one block without a past == the stock model's forward", float((v - stock).abs().max()), 1e-4 if model.dtype == torch.float32 else 5e-2)


def _gradients(run: Alignment, replay, rollout: Rollout) -> Iterator[Finding]:
    advantage = _made_up_advantage(run, rollout)
    update = run.updater.accumulate(replay(rollout), advantage, Phases())
    together = _take_gradients(run)
    worst = max(abs(update.metrics["loss/ratio_min"] - 1.0), abs(update.metrics["loss/ratio_max"] - 1.0))
    yield _at_most("ratio before the first update: distance from 1", worst, 0.0)
    dead = [name for name, g in zip(run.policy.names, together) if not g.any()]
    if run.config.policy.train == "lora":  # B starts at zero, so A's gradient is zero until the first update
        dead = [name for name in dead if "lora_A" not in name]
    yield _at_most("trainable tensors without gradient" + (f", first {dead[0]}" if dead else ""), len(dead), 0.0)
    run.updater.accumulate(replay(rollout, size=len(run.pipeline.geometry.sigmas)), advantage, Phases())
    apart = _take_gradients(run)
    norm = sum(float(g.square().sum()) for g in together) ** 0.5
    yield _at_most("gradient a few velocities at a time against all at once", sum(float((a - b).square().sum()) for a, b in zip(together, apart)) ** 0.5 / norm, 1e-4)


def _resumed(run: Alignment, replay, rollout: Rollout) -> Finding:
    """Two updates in one go against one update, a checkpoint read back, and the second."""
    advantage = _made_up_advantage(run, rollout)

    def update() -> None:
        run.updater.accumulate(replay(rollout), advantage, Phases())
        run.updater.step()

    update()
    with tempfile.TemporaryDirectory() as folder:
        saved = save_checkpoint(Path(folder), Snapshot.of(1, run.policy, run.updater.optimizer, {}), keep=1)
        update()
        straight = run.policy.snapshot()
        load_checkpoint(saved, run.policy, run.updater.optimizer)
    update()
    worst = max(float((a - b).abs().max()) for a, b in zip(straight, run.policy.snapshot()))
    return _at_most("an update after resuming == without the interruption, bit for bit", worst, 0.0)


def _made_up_advantage(run: Alignment, rollout: Rollout) -> Advantage:
    A_G = normal((rollout.num_branches,), run.config.seed, "doctor", "advantage").double()
    nothing = torch.zeros(0)
    return Advantage(A_G - A_G.mean(), A_G, nothing, nothing, torch.ones(len(A_G), dtype=torch.bool), True, {})


def _take_gradients(run: Alignment) -> list[torch.Tensor]:
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.policy.parameters]
    run.updater.optimizer.zero_grad(set_to_none=True)
    return taken


def _routes(rollout: Rollout) -> bool:
    return any(plan.frames for plan in rollout.plans)


def _spread(x: torch.Tensor) -> float:
    """Largest difference of any row from the last."""
    return float((x - x[-1:]).abs().max())


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _at_most(name: str, value: float, limit: float) -> Finding:
    return Finding(name, value, f"<= {limit:g}", value <= limit)
