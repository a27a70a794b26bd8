"""`kvpo doctor`: the invariants of method.md section 6, measured on the user's own run.

They are measured on its generator and recipe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from kvpo.common.progress import Progress
from kvpo.config import RunConfig
from kvpo.doctor.finding import Finding, at_most, spread
from kvpo.doctor.routed_numbers import check_pages, denoise_steps
from kvpo.doctor.rows import EmptyPlans, Group, check_energies, check_rows
from kvpo.doctor.stock_forward import against_stock
from kvpo.doctor.updates import check_gradients, check_resuming
from kvpo.method.routing import KVRouting
from kvpo.runs.parts import Parts


def examine(config: RunConfig) -> bool:
    """Print every finding as it is made; True if all hold."""
    started, all_hold = time.perf_counter(), True
    for finding in findings(config):
        all_hold &= finding.holds
        print(
            f"{'ok' if finding.holds else 'FAILED':<7} {finding.name:<58} {finding.value:<12.4g} {finding.rule}",
            flush=True,
        )
    print(
        f"{'all invariants hold' if all_hold else 'some invariants FAILED'}; {time.perf_counter() - started:.0f} s"
    )
    return all_hold


def findings(config: RunConfig) -> Iterator[Finding]:
    """Yield what every check finds, cheapest first, on one group of the recipe."""
    # a clip would hide a gradient that is wrong by a factor
    unclipped = replace(config.optimizer, clip=math.inf)
    run = Parts(replace(config, shuffle_advantages=False, optimizer=unclipped), Progress())
    g = run.pipeline.geometry
    exact = run.pipeline.generator.dtype == torch.float32
    close, tolerance = (1e-4, 1e-9) if exact else (5e-2, 1e-3)
    yield at_most(
        "one block without a past == the stock model's forward", against_stock(run, 0), close
    )
    # the window has then moved on, and pages have been given up and used again
    rolled = 3 if g.window < 0 else g.window // g.block + 2
    yield at_most(
        "a block read through the cache == one uncached forward", against_stock(run, rolled), close
    )
    group = Group(run)
    yield at_most(
        "empty plans: every row is the anchor, bit for bit",
        spread(group.roll(EmptyPlans(config.exploring)).latents),
        0.0,
    )
    rollout = group.roll(config.exploring)
    yield from check_rows(group, rollout, tolerance)
    yield from check_energies(config.exploring, group.replay, rollout, tolerance)
    yield from check_gradients(run, group.replay, rollout)
    if isinstance(config.exploring, KVRouting):
        yield from denoise_steps(run, group.start, rollout, group.embeddings)
        yield from check_pages(run, rollout, group.embeddings)
    yield check_resuming(run, group.replay, rollout)
