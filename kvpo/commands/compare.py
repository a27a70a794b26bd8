"""`kvpo compare`: several runs side by side, as a table and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpo.commands.options import Positional


@dataclass(frozen=True)
class Compare:
    """Compare runs: what each gained and what it cost, settings that differ, same-seed videos."""

    runs: Positional[tuple[Path, ...]]
    """Folders that `kvpo align` wrote, two or more."""
    out: Path = Path("runs/compare.html")
    """The page, one HTML file."""

    def __call__(self) -> None:
        from kvpo.report.compare import read_runs, text_table, warnings, write_comparison

        runs = read_runs(self.runs)
        print(text_table(runs))
        for line in warnings(runs):
            print(f"note: {line}")
        print(f"written to {write_comparison(runs, self.out).resolve()}")
