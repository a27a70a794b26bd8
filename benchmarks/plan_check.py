"""The planner against a measured run (Linux, CPU).

It compares the memory that steps of the miniature's recipe add to the run at rest.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/plan_check.py [--steps 3]

With that variable glibc gives large blocks back at once; without it the same steps leave holes that
count as used.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
from dataclasses import replace
from pathlib import Path

from schedule import resident_kib

from kvpo.common.progress import Progress
from kvpo.config import load_config, recipe_path
from kvpo.planning.costs import costs, sizes_of
from kvpo.planning.memory import stages
from kvpo.train import Alignment


def planned(config) -> float:
    """MiB of the largest stage above what is there between steps."""
    sizes = sizes_of(config)
    memory = stages(config, sizes, costs(config, sizes))
    at_rest = ("generator", "VAE", "text encoder", "trained copies", "optimizer")
    return (
        max(sum(v for k, v in parts.items() if k not in at_rest) for parts in memory.values())
        / 2**20
    )


def measured(config, steps: int) -> list[float]:
    """MiB that each step adds, after one that has made what stays."""
    run = Alignment(config, Path("."), Progress())
    run.step(0)
    found = []
    for step in range(1, steps + 1):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_kib("VmRSS")
        run.step(step)
        found.append((resident_kib("VmHWM") - before) / 1024)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        raise SystemExit(
            "set MALLOC_MMAP_THRESHOLD_=65536, else holes in the heap are measured with it"
        )
    config = replace(load_config(recipe_path("mini")), show_every=0, device="cpu")
    print(
        json.dumps({"planned MiB": planned(config), "measured MiB": measured(config, args.steps)})
    )


if __name__ == "__main__":
    main()
