"""Every metric of a run, declared once: its name, unit, meaning, and which way is better.

`kvpo.common.metric_log` writes them to `metrics.jsonl` and the run's trackers.

To add a metric, add a line to `DECLARED` and write docs/metrics.md anew (``python -m
kvpo.common.metrics > docs/metrics.md``); logging a name that no line declares is an error. A
`{placeholder}` stands for the names in `PLACEHOLDERS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from kvpo.common.wording import nearest

T = TypeVar("T")

PHASES = (
    "prefix",
    "branches",
    "decode",
    "reward",
    "replay_old",
    "replay_grad",
    "hold",
    "optimizer",
    "checkpoint",
    "evaluate",
    "sentinels",
    "total",
)

MOST_INNER = 8
"""Optimizer updates on the groups of one step, at most."""
NAME = "[A-Za-z][A-Za-z0-9_.-]*"
"""Pattern of a component's name."""

PLACEHOLDERS: Mapping[str, tuple[str, ...]] = {
    "signal": ("local", "global"),
    "weights": ("online", "ema", "start"),
    "phase": PHASES,
    "update": tuple(str(i + 1) for i in range(MOST_INNER)),
    "component": (),
}
"""Placeholder -> the names it stands for; () = any name of letters, digits, `_`, `.` and `-`."""


@dataclass(frozen=True)
class Metric:
    """One declared metric, or a family of them."""

    pattern: str
    unit: str
    meaning: str
    better: Literal["higher", "lower", ""] = ""
    """Direction in which training should move it; "" = neither way is good as such."""


DECLARED: tuple[Metric, ...] = (
    Metric(
        "reward/{signal}/{component}/mean",
        "reward",
        "Mean over the branches; every step draws other scripts, so steps differ by more than training does.",
        "higher",
    ),
    Metric(
        "reward/{signal}/{component}/anchor",
        "reward",
        "The anchor's: the same story without routing.",
        "higher",
    ),
    Metric("reward/{signal}/{component}/best", "reward", "The best branch's.", "higher"),
    Metric(
        "reward/{signal}/{component}/std",
        "reward",
        "Standard deviation over branches and anchor; 0 leaves nothing to rank.",
    ),
    Metric(
        "advantage/std",
        "1",
        "Standard deviation of the fused, centred advantage over the group's members, before the clamp.",
    ),
    Metric(
        "advantage/above_anchor", "share", "Branches whose fused advantage is above the anchor's."
    ),
    Metric("advantage/clamped", "share", "Branches whose advantage the clamp changed."),
    Metric(
        "advantage/tied",
        "share",
        "Groups whose branches all earned the same: nothing to rank, so only the KL acts.",
        "lower",
    ),
    Metric("advantage/valid", "share", "Rows, anchor included, that have rewards.", "higher"),
    Metric(
        "advantage/{signal}/{component}",
        "1",
        "Mean over the branches of (reward - anchor's) / std, unweighted.",
    ),
    Metric(
        "advantage/step_std/{signal}/{component}",
        "reward",
        "With std `step`: what advantages were divided by, the root mean square over the step's groups of their standard deviation.",
    ),
    Metric(
        "conflict/{component}/rank",
        "1",
        "Rank correlation over the branches of two components' advantages, named A-B; below 0 they pull apart.",
    ),
    Metric(
        "conflict/{component}/sign",
        "share",
        "Branches that one of two components puts above the anchor and the other below.",
        "lower",
    ),
    Metric(
        "conflict/{component}/flat",
        "share",
        "Groups in which the component has no spread, and so no say.",
        "lower",
    ),
    Metric(
        "sentinel/{component}/start",
        "its own",
        "Mean of a sentinel over the watched prompts and seeds, start weights.",
    ),
    Metric("sentinel/{component}/value", "its own", "The same, current weights."),
    Metric(
        "sentinel/{component}/moved",
        "spreads",
        "Their difference, in standard deviations of the start weights' videos of one prompt over seeds.",
    ),
    Metric(
        "energy/mean",
        "latent^2",
        "Mean energy of the group's members under the current weights: squared velocity error per element (kernel_grpo, sde_grpo: surprise per element; denoised_distance: squared distance per element).",
    ),
    Metric(
        "energy/std",
        "latent^2",
        "Standard deviation of the energy over the group's members; pi is uniform where tau is far above it.",
    ),
    Metric("policy/tau", "latent^2", "Temperature of the Gibbs policy, logit = -energy / tau."),
    Metric("policy/entropy", "nats", "Entropy of the behaviour policy pi_old; log G = uniform."),
    Metric(
        "policy/evenness",
        "1",
        "Entropy of pi_old over log G; at 1 pi is uniform and neither clip nor KL can act.",
    ),
    Metric(
        "policy/top",
        "probability",
        "The largest probability pi_old gives a branch; of regression, its largest weight.",
    ),
    Metric(
        "policy/lag",
        "updates",
        "Updates since the behaviour weights were last set to the current ones.",
    ),
    Metric(
        "loss/policy",
        "1",
        "The objective's loss; of clipped ones about 0 on policy by construction, because advantages are centred.",
    ),
    Metric(
        "loss/from_start",
        "latent^2",
        "Objectives nft and rvm with kl_beta: mean squared distance of velocities from the start weights'.",
    ),
    Metric("loss/kl", "nats", "KL(pi_theta || pi_ref) over the group's members."),
    Metric(
        "hold/distance",
        "latent^2",
        "Mean squared distance from the start weights' velocities on held blocks of the opening; see velocity_penalty.",
    ),
    Metric(
        "hold/grad_norm",
        "1",
        "Norm of one group's gradient of the velocity penalty, before its clip.",
    ),
    Metric(
        "loss/weight",
        "1",
        "Factor on the whole loss of the group: below 1 where no branch beats the anchor.",
    ),
    Metric("loss/entropy", "nats", "Entropy of pi_theta; log G = uniform."),
    Metric("loss/clip_fraction", "share", "Branches whose ratio lies outside the clip range."),
    Metric(
        "loss/ratio_min",
        "1",
        "Smallest pi_theta / pi_old; exactly 1 on the first update after a sync.",
    ),
    Metric("loss/ratio_max", "1", "Largest pi_theta / pi_old."),
    Metric("loss/ratio_mean", "1", "Mean pi_theta / pi_old."),
    Metric("loss/approx_kl", "nats", "Mean of r - 1 - log r: drift from the behaviour policy."),
    Metric(
        "inner/{update}/clip_fraction",
        "share",
        "With several updates on one step's groups, of each: branches whose ratio lies outside the clip range. The names without `inner` are those of the last.",
    ),
    Metric("inner/{update}/ratio_min", "1", "Likewise: smallest pi_theta / pi_old."),
    Metric("inner/{update}/ratio_max", "1", "Likewise: largest pi_theta / pi_old."),
    Metric("inner/{update}/ratio_mean", "1", "Likewise: mean pi_theta / pi_old."),
    Metric(
        "inner/{update}/approx_kl",
        "nats",
        "Likewise: drift from the behaviour policy, mean of r - 1 - log r.",
    ),
    Metric("inner/{update}/step_norm", "1", "Likewise: norm of the step's gradient."),
    Metric("optim/lr", "1", "Learning rate of the update."),
    Metric("optim/grad_norm", "1", "Norm of a group's gradient before clipping."),
    Metric(
        "optim/grad_clipped",
        "share",
        "Groups whose gradient was clipped; with clip_of `step` 1 where the step's was.",
    ),
    Metric(
        "optim/step_norm",
        "1",
        "Norm of the step's gradient, all groups and the penalty added, before a clip of the step; groups may have been clipped.",
    ),
    Metric(
        "optim/drift",
        "1",
        "Distance of the current weights from the start: relative to their norm (full training), absolute (LoRA).",
    ),
    Metric(
        "agreement/cosine",
        "1",
        "Mean cosine between the gradients of two groups, before the clip, over the latest groups (agreement.window); noise has 0.",
        "higher",
    ),
    Metric("agreement/error", "1", "Its standard error."),
    Metric("agreement/groups", "groups", "How many groups it was measured over."),
    Metric(
        "agreement/needed",
        "groups",
        "1 / cosine: groups until their mean direction is more signal than noise; where the cosine is above its standard error.",
        "lower",
    ),
    Metric("group/fork", "block", "Block at which the branches leave the shared prefix."),
    Metric("group/safe", "share", "Groups in which some branch beats the anchor.", "higher"),
    Metric("group/skipped", "share", "Groups that gave no update."),
    Metric(
        "group/unmeasurable",
        "share",
        "Groups whose anchor, or over a quarter of whose rows, had no rewards; they are skipped.",
        "lower",
    ),
    Metric(
        "diversity/pixel", "1", "Mean squared difference of two branches' clips, pixels in [0, 1]."
    ),
    Metric(
        "time/{phase}",
        "s",
        "Wall clock of the phase since the last record; `total` is a step up to its update, `checkpoint` and `evaluate` come on top.",
        "lower",
    ),
    Metric(
        "memory/peak_gib",
        "GiB",
        "Peak memory: of a GPU's tensors since the last step; on a CPU resident, of the process so far.",
        "lower",
    ),
    Metric(
        "calls/generator", "calls", "Calls of the generator's network within this step.", "lower"
    ),
    Metric(
        "eval/{weights}/{component}/mean",
        "its own",
        "Mean over the evaluation's fixed scripts and seeds.",
    ),
    Metric(
        "eval/{weights}/{component}/diff",
        "its own",
        "Mean paired difference from the start weights, same scripts and seeds.",
    ),
    Metric(
        "eval/{weights}/{component}/low",
        "its own",
        "Lower end of the difference's 95 % bootstrap interval.",
    ),
    Metric(
        "eval/{weights}/{component}/high",
        "its own",
        "Upper end of the difference's 95 % bootstrap interval.",
    ),
    Metric(
        "eval/{weights}/{component}/win",
        "share",
        "Scripts that came out better than with the start weights, ties counted half.",
    ),
)

CONSOLE = (
    ("reward/local/{component}/mean", "{component}", ".3f"),
    ("policy/tau", "tau", ".2g"),
    ("loss/entropy", "H", ".3f"),
    ("loss/kl", "KL", ".2g"),
    ("loss/clip_fraction", "clip", ".0%"),
    ("optim/grad_norm", "grad", ".2f"),
    ("time/total", "seconds", ".1f"),
)
"""The console line: pattern, label, number format."""


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    for i in range(1, len(parts), 2):
        parts[i] = f"(?P<{parts[i]}>{'|'.join(PLACEHOLDERS[parts[i]]) or NAME})"
    return re.compile("".join(parts))


@functools.cache
def declaration(name: str) -> Metric:
    """The declaration of a metric.

    Raises ValueError, with the nearest declared name, for a name that has none.
    """
    for metric in DECLARED:
        if _regex(metric.pattern).fullmatch(name):
            return metric
    near = nearest(name, (metric.pattern for metric in DECLARED), cutoff=0.3)
    raise ValueError(
        f"metric {name!r} is not declared{f' (nearest: {near})' if near else ''}; every metric has a line in kvpo.common.metrics.DECLARED: add one or correct the name"
    )


def pick(values: Mapping[str, T], pattern: str) -> dict[str, T]:
    """Pick the values whose names match ``pattern``.

    They are keyed by what its placeholders stand for ("VQ", "local/VQ").
    """
    found = ((_regex(pattern).fullmatch(name), value) for name, value in values.items())
    return {"/".join(match.groups()): value for match, value in found if match}


def console_line(step: int, values: Mapping[str, float], steps: int | None = None) -> str:
    """Format the main metrics as one line.

    An example: ``step 3/60  VQ 0.812  TA 0.500  tau 0.004  H 2.079  KL 0.01  clip 12%``.
    """
    parts = [f"step {step}" + (f"/{steps}" if steps is not None else "")]
    for pattern, label, spec in CONSOLE:
        parts += [
            f"{label.format(component=key)} {float(value):{spec}}"
            for key, value in pick(values, pattern).items()
        ]
    return "  ".join(parts)


def render_docs() -> str:
    """Text of docs/metrics.md."""
    rows = ["| metric | unit | better | meaning |", "|---|---|---|---|"]
    rows += [f"| `{m.pattern}` | {m.unit} | {m.better or '-'} | {m.meaning} |" for m in DECLARED]
    names = [
        f"- `{{{name}}}`: {', '.join(f'`{v}`' for v in values) or 'a reward component or an evaluator, e.g. `VQ`'}"
        for name, values in PLACEHOLDERS.items()
    ]
    return "\n".join([_DOCS_HEAD, *rows, "", "Placeholders:", "", *names, ""])


_DOCS_HEAD = """# Metrics

Generated from `kvpo.common.metrics.DECLARED` by `python -m kvpo.common.metrics > docs/metrics.md`; a test compares.

A run writes them to `metrics.jsonl`, one JSON object a line with `step` and `unix_time` beside the metrics, and to
its `trackers`: `tensorboard/` unless the recipe names others. Several lines may share a step (an evaluation follows its update); where they name the same metric, the last one holds.
Numbers that are not finite are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, so that every line is JSON.
The console shows a view of the same record. "Better" says where training should move a metric; `-` = neither way is good as such.
"""

if __name__ == "__main__":
    print(render_docs(), end="")
