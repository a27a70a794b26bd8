"""Numbers to know where branches come from KV routing.

They say what training's gradient leaves out, and what each denoise step does to the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from kvpo.doctor.finding import Finding, at_most
from kvpo.doctor.page_gradient import LeftOut, known, left_out, on_a_tiny_generator
from kvpo.doctor.step_effects import step_effects
from kvpo.method.prefix import Start
from kvpo.runs.parts import Parts
from kvpo.types import Rollout

SMALL = 10_000_000
"""Trained weights up to which the whole window's graph is built on the user's own generator."""


def denoise_steps(
    run: Parts, start: Start, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    """Give one line a denoise step, which is no rule.

    It is what there is to know before `velocity_energy.weights` is chosen.
    """
    effects = step_effects(
        run.pipeline,
        start,
        rollout,
        embeddings,
        known(run.config),
        run.config.energy,
        run.config.rollout.together,
    )
    for s, e in enumerate(effects):
        name = f"denoise step {s}, sigma {e.sigma:.3f}, weight {e.weight:.3g}: share of the energy"
        yield Finding(
            name,
            e.says,
            f"routed alone it moves the window by {e.does:.3f} of all",
            math.isfinite(e.says) and math.isfinite(e.does),
        )


def check_pages(
    run: Parts, rollout: Rollout, embeddings: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    """Compare training's gradient with the one through the whole window.

    It does so on a tiny generator in float64, also on this generator where it is small.
    """
    tiny, P = on_a_tiny_generator(run.config, run.pipeline), run.config.exploring.window_blocks
    yield at_most(
        "tiny: gradient through all pages against finite differences", tiny.difference, 1e-5
    )
    yield _left_out("tiny", tiny, P)
    if run.policy.num_trainable <= SMALL and not run.config.gradient_checkpointing:
        found = left_out(
            run.pipeline,
            rollout,
            embeddings,
            known(run.config),
            run.config.energy,
            run.policy.layout.computing,
            run.config.seed,
        )
        yield _left_out("this generator", found, P)


def _left_out(whose: str, found: LeftOut, P: int) -> Finding:
    """Judge what training's gradient leaves out: at P = 1 a rule, beyond it a number to know."""
    exact = f"relative error {found.relative:.2g}"
    rule = f"1 at P = 1; {exact}" if P == 1 else f"at P = {P}, 1 = pages leave nothing out; {exact}"
    return Finding(
        f"{whose}: cosine of training's gradient with the exact one",
        found.cosine,
        rule,
        found.cosine > 0.9999 if P == 1 else math.isfinite(found.cosine),
    )
