"""The planner's answer for every shipped recipe, and for 14B, as docs/plans.md.

Also the two tables of docs/performance.md, which say what its switches save and what fits a card.

python benchmarks/plans.py > docs/plans.md
python benchmarks/plans.py --switches
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from kvpo.commands.main import _parse
from kvpo.commands.plan import Plan
from kvpo.common.wording import in_time
from kvpo.planning.plan import planned

COMMANDS = (
    "longlive",
    "longlive --card h200 --rollout.together 0 --rows-per-pass 16",
    "longlive_24gb --card rtx4090",
    "longlive_short",
    "memflow",
    "self_forcing",
    "causal_forcing",
    "longlive_nft --gpus 8 --nodes 6 --card h200",
    "longlive_kernel --gpus 8 --card h200",
    "self_forcing_arcopo",
    "longlive_2",
    "krea --card h200",
    "krea --gpus 8",
    "longlive --size 14b --policy.rank 64 --rollout.together 1 --rows-per-pass 2 --card h200",
    "krea --policy.train full --policy.shard --gpus 8 --card h200",
    "mini --card rtx3090",
    "mini_memory --card rtx3090",
    "mini_offline --card rtx3090",
)

HEAD = """# What the recipes cost

Written by `python benchmarks/plans.py` from `kvpo plan`, which runs a recipe's own network, cache, decoder and policy on tensors without memory. All of it is planned, nothing was measured on these weights. What was measured against it:

- The miniature's step on a CPU: 144, 154, 153 and 158 MiB above the run at rest in four steps (large blocks returned to the system, `MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/plan_check.py --steps 4`), 137 MiB planned at that time. The recipe is another one since; the decoded pixels, in main memory, are not in the plan of a card.
- Floating-point operations of one denoise pass at 1.3B: 31.3 T, the count of the paper's code from its shapes is 31.
- Time: 25 % of the card's rate is what one group of the paper's shape reached on an H200 ([results.md](results.md), claim 5), in every phase. No rewards are in it, and nothing of another card, of 14B or of 5B has been measured. The miniature's time is left out: on a card it is the host's between small kernels, 3.5 s a step of 2 groups on an H200.

By hand, for `longlive`: 1.419 G weights in bfloat16 are 2.64 GiB. Ten maps a block, of rank 256 in 30 blocks, are 350.0 M trained numbers: 18 bytes of each for master, behaviour, reference, average and the module's copy (5.87 GiB), 8 for AdamW's moments (2.61), 4 for a gradient (1.30). A latent frame of 1,560 tokens keeps keys and values of 1,536 numbers in 30 layers, 274 MiB: 33 frames are the shared past's 8.84 GiB, and 24 for each of 4 branches side by side 25.71. The same sums give 14B in full: 2 bytes of 14.29 G numbers are 26.61 GiB.

Memory is what tensors take: the driver's part, fragments and scratch memory inside kernels are not counted, so a plan within 3 GiB of its card is one to doubt. Rewards count by their own account. How to make a plan fit, and cheaper, is in [performance.md](performance.md).
"""

TABLE = """| `kvpo plan` | trained, M | peak, GiB | card's, GiB | TFLOP a group | steps | a step | all steps | GPU-hours |
|---|---|---|---|---|---|---|---|---|"""


ONE_AFTER_ANOTHER = (
    "",
    "--score.segments 1",
    "--pairs.count 6",
    "--rollout.forks 2",
    "--score.lead 6",
    "--rollout.together 2 --rows-per-pass 4 --score.together 1",
    "--policy.merge-rollouts",
    "--objective.kl-beta 0 --objective.no-kl-watch",
)
"""Switches of docs/performance.md, each with those before it."""

FEWER = "--score.segments 1 --pairs.count 6 --rollout.forks 2 --score.lead 6"
NO_KL = "--objective.kl-beta 0 --objective.no-kl-watch"
BY_CARD = {
    "24 GB": (
        "longlive_24gb --card rtx4090",
        "longlive_24gb --card rtx4090 --score.segments 1 --pairs.count 4 --score.lead 6",
        f"longlive_24gb --card rtx4090 --score.segments 1 --pairs.count 4 --score.lead 6 {NO_KL}",
    ),
    "48 GB": (
        "longlive --card l40s --rollout.together 1 --rows-per-pass 4 --score.together 1 "
        "--score.segments 1 --pairs.count 6 --score.lead 6",
    ),
    "80 GB": (
        "longlive",
        f"longlive {FEWER}",
        f"longlive {FEWER} --policy.merge-rollouts {NO_KL}",
        "longlive_2",
        "longlive_2 --score.segments 1 --pairs.count 4 --score.lead 6",
    ),
    "141 GB": (
        "longlive --card h200 --rollout.together 0 --rows-per-pass 16",
        f"longlive --card h200 --rollout.together 0 --rows-per-pass 16 {FEWER}",
        "longlive --card h200 --policy.train full --rollout.together 2",
        "krea --card h200",
        "krea --card h200 --score.segments 1 --pairs.count 4 --score.lead 6",
    ),
}
"""Card -> the recipes and switches that docs/performance.md advises on it."""


def planned_by(plan: Plan) -> tuple[list[str], dict[str, Any]]:
    """Lines and record of a command."""
    return planned(
        plan.recipe,
        plan.settings,
        plan.gpus,
        plan.nodes,
        plan.card,
        plan.gpu_memory,
        plan.size,
        plan.price,
    )


def parsed(command: str) -> Plan:
    return _parse("plan", shlex.split(command))


def row(command: str, content: dict[str, Any], trained: str, steps: int) -> str:
    """The command's line of the table at the page's head."""
    peak, room, step = (content[key] for key in ("peak GiB", "room GiB", "s of a step"))
    fits = "" if peak <= room else ", does not fit"
    group = sum(content["TFLOP of a group"].values())
    known = step > 1.0  # the miniature's is the host's, which no operation counts
    times = (in_time(step), in_time(steps * step), number(content["GPU-hours"]))
    return (
        f"| `{command}` | {trained} | {peak:.1f}{fits} | {room:.1f} | {number(group)} | {steps:,} | "
        + " | ".join(times if known else ("", "", ""))
        + " |"
    )


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def recipes() -> None:
    """Print docs/plans.md."""
    rows, sections = [], []
    for command in COMMANDS:
        print(command, file=sys.stderr)
        plan = parsed(command)
        lines, content = planned_by(plan)
        trained = next(line for line in lines if "M trained numbers" in line).split()[0]
        rows.append(row(command, content, trained, plan.settings.steps))
        sections.append(f"## kvpo plan {command}\n\n```text\n" + "\n".join(lines) + "\n```\n")
    print(HEAD)
    print("\n".join([TABLE, *rows, ""]))
    print("\n".join(sections), end="")


def switches() -> None:
    """Print the tables of docs/performance.md."""
    command, first = "longlive", 0.0
    for added in ONE_AFTER_ANOTHER:
        command = f"{command} {added}".strip()
        _, content = planned_by(parsed(command))
        phases = content["TFLOP of a group"]
        together = sum(phases.values())
        first = first or together
        name = f"`{added}`" if added else "today's recipe"
        seconds = content["s of a step"] / parsed(command).settings.groups
        print(
            f"| {name} | {' | '.join(f'{x:,.0f}' for x in (*phases.values(), together))} "
            f"| {together / first:.1%} | {seconds:.0f} | {content['peak GiB']:.1f} |"
        )
    for card, commands in BY_CARD.items():
        for command in commands:
            plan = parsed(command)
            lines, content = planned_by(plan)
            trained = next(line for line in lines if "M trained numbers" in line).split()[0]
            print(f"| {card} {row(command, content, trained, plan.settings.steps)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--switches", action="store_true")
    if parser.parse_args().switches:
        switches()
    else:
        recipes()


if __name__ == "__main__":
    main()
