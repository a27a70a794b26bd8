"""`kvpo bench`: what a generator's shape costs on this machine, by phase."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.common.files import write_atomic


@dataclass(frozen=True)
class Bench:
    """Measure one group, its update and a stream at a generator's shape, on random weights.

    The schedule of the paper's code, one branch at a time, is measured beside the batched one.
    """

    generator: Positional[str]
    """A size (tiny, wan-1.3b, wan-5b, wan-14b), or a generator for its shape: a folder, a run, mini."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU if there is one."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Precision; default: bfloat16 on a GPU, float32 on a CPU."""
    branches: int = 4
    """Branches of the group, besides the anchor."""
    window_blocks: int = 3
    """Blocks explored after the fork."""
    fork: int | None = None
    """Block to fork at; default: the first that can be, where the window is full already."""
    rank: int = 256
    """LoRA rank; 0 = all weights are trained."""
    attention: Literal["sdpa", "cudnn", "efficient", "math", "flash", "flash3"] = "sdpa"
    """Kernel of the generator's attention; `sdpa`: torch's choice."""
    rows_per_pass: int = 16
    """Most velocities replayed together in the batched schedule."""
    compile: bool | None = None
    """Measure the stream compiled as well; default: on a GPU only."""
    budget: float = 300.0
    """Seconds after which no further part is begun; what is left out is said."""
    out: Path | None = None
    """File to write everything to as JSON; default: none."""

    def __call__(self) -> None:
        from rich.console import Console

        from kvpo.bench.measure import Bench as Measurement
        from kvpo.bench.sizes import Load, named_sizes
        from kvpo.bench.table import lines, tables
        from kvpo.common.environment import pick_device

        device = pick_device(self.device)
        gpu = device.type == "cuda"
        progress = Console(stderr=True)
        measure = Measurement(
            named_sizes(self.generator),
            Load(
                self.branches,
                self.window_blocks,
                self.rank,
                self.rows_per_pass,
                self.attention,
                self.fork,
            ),
            device,
            self.dtype or ("bfloat16" if gpu else "float32"),
            gpu if self.compile is None else self.compile,
            self.budget,
            lambda doing: progress.print(f"{doing} ...", highlight=False),
        )
        result = measure()
        console = Console()
        head, *rest = lines(result)
        console.print(head, highlight=False, soft_wrap=True)
        for table in tables(result):
            console.print(table)
        console.print("\n".join(rest), highlight=False, soft_wrap=True)
        if self.out is not None:
            write_atomic(self.out, json.dumps(result, indent=1) + "\n")
