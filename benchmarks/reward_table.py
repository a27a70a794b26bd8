"""docs/rewards.md: every shipped reward, and what it can be cheated with.

It is measured on the rewards that run here.

    python benchmarks/reward_table.py --clips FOLDER --write       FOLDER/clips.csv (file, prompt): real videos, for what judges real videos

A reward falls for a flaw where it prefers fewer than three of four good clips to their spoilt
copies. What judges the miniature's world is shown its true clips, everything else the real ones
(the committed run: the six generated clips of VideoAlign, 320 pixels wide; for niqe, which needs
192 rows, 448). A reward whose weights or packages are not here, or that found nothing in the clips
to look at, is called "not measured".
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from kvpo.common.extras import missing_modules
from kvpo.common.files import write_atomic
from kvpo.common.progress import Progress
from kvpo.mini.source import story_clips
from kvpo.rewards.base import RewardSpec, VideoBatch
from kvpo.rewards.calibration import FLAWS, calibrate
from kvpo.rewards.clips import folder_clips
from kvpo.rewards.registry import SHIPPED, RewardEntry, find
from kvpo.rewards.scorer import load_rewards

OUT = Path("docs/rewards.md")
RESULTS = Path("benchmarks/results/rewards.json")
SEEN = 0.75
"""Share of good clips preferred from which on a flaw counts as seen."""
OF_THE_WORLD = (
    "world_vq",
    "world_mq",
    "world_ta",
    "world_facts",
    "attributes",
    "identity",
    "flow_motion",
)


@dataclass
class Row:
    name: str
    spec: RewardSpec
    won: dict[str, float] = field(default_factory=dict)
    clips: int = 0

    @property
    def falls_for(self) -> str:
        if not self.won:
            return "not measured here"
        lost = [flaw for flaw, share in self.won.items() if share < SEEN]
        return ", ".join(lost) or "none of them"


def measured(row: Row, batches: list[VideoBatch]) -> None:
    (scorer,) = load_rewards([RewardEntry(row.name)], "cpu")
    usable = [
        flaw
        for flaw in FLAWS
        if flaw != "wrong_caption" or (row.spec.needs_prompt and sum(map(len, batches)) > 1)
    ]
    table = calibrate([scorer], batches, {scorer.spec.name: 1.0}, flaws=usable)
    if any(
        math.isfinite(verdicts["all"].margin) for verdicts in table.values()
    ):  # none of the clips may have what it looks at: text, for one
        row.won, row.clips = (
            {flaw: verdicts["all"].won for flaw, verdicts in table.items()},
            sum(map(len, batches)),
        )


def page(rows: list[Row]) -> str:
    lines = [
        "| reward | looks at | falls for | licence | memory | needs |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        needs = (
            f"`kvpo[{r.spec.extra}]`"
            if r.spec.packages
            else "its weights"
            if r.spec.memory_gb
            else "nothing"
        )
        lines.append(
            f"| `{r.name}` | {r.spec.looks_at} | {r.falls_for} | {r.spec.licence} | {f'{r.spec.memory_gb:g} GiB' if r.spec.memory_gb else 'hardly any'} | {needs} |"
        )
    return HEAD + "\n".join(lines) + "\n" + FOOT


HEAD = f"""# Rewards

Written by `benchmarks/reward_table.py`; a test compares everything but the measured column with the code.
"Falls for": spoilt copies of good clips (`kvpo.rewards.calibration`) that a reward prefers, or cannot tell, in more than {1 - SEEN:.0%} of the pairs.
Nearly every single reward falls for something: what must not be won by cheating is the combination, `kvpo rewards calibrate RECIPE`.

"""
FOOT = """
Families (`kvpo rewards list`): rewards of one family see alike and fail alike, so an evaluator of a trained family is refused.
Rewards in an environment of their own: [isolated_rewards.md](isolated_rewards.md). Your own: [own_reward.md](own_reward.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=Path, help="folder of real videos with clips.csv")
    parser.add_argument("--count", type=int, default=16, help="true clips of the miniature")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--write", action="store_true", help=f"write {OUT} and {RESULTS}")
    args = parser.parse_args()
    real = folder_clips(args.clips) if args.clips else []
    rows = [Row(name, find(name).spec) for name in SHIPPED if not args.only or name in args.only]
    with Progress().bar("rewards", len(rows)) as bar:
        for row in rows:
            batches = story_clips(args.count) if row.name in OF_THE_WORLD else real
            if (
                batches
                and not missing_modules(row.spec.packages)
                and (not row.spec.memory_gb or row.spec.extra == "offline")
            ):
                measured(row, batches)
            bar.advance(row.name)
    print(page(rows))
    if args.write:
        write_atomic(OUT, page(rows))
        write_atomic(
            RESULTS,
            json.dumps({row.name: {"clips": row.clips, "won": row.won} for row in rows}, indent=1)
            + "\n",
        )


if __name__ == "__main__":
    main()
