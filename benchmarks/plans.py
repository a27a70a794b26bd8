"""The planner's answer for every recipe of a real generator, as docs/plans.md.

python benchmarks/plans.py > docs/plans.md
"""

from __future__ import annotations

import contextlib
import io

from kvpo.commands.plan import Plan
from kvpo.config import load_config, recipe_path

ON = {
    "longlive": "h100",
    "memflow": "h100",
    "self_forcing": "h100",
    "causal_forcing": "h100",
    "longlive_short": "h100",
    "longlive_24gb": "rtx4090",
}

HEAD = """# What the recipes cost

Written by `python benchmarks/plans.py` from `kvpo plan`, which runs a recipe's own network, cache, decoder and policy on tensors without memory. Nothing here was measured on weights; what was measured against it:

- The miniature's step on a CPU: 144, 154, 153 and 158 MiB above the run at rest in four steps (large blocks returned to the system, `MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/plan_check.py --steps 4`), 137 MiB planned; the decoded pixels, in main memory, are not in the plan of a card.
- Floating-point operations of one denoise pass at 1.3B: 31.3 T, the count of the paper's code from its shapes is 31.
- Time: 25 % of the card's rate is what one group of the paper's shape reached on an H200 ([results.md](results.md), claim 5). No rewards in it.
"""


def main() -> None:
    print(HEAD)
    for recipe, card in ON.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            Plan(recipe, load_config(recipe_path(recipe)), card=card)()
        print(f"## kvpo plan {recipe} --card {card}\n\n```text\n{said.getvalue().rstrip()}\n```\n")


if __name__ == "__main__":
    main()
