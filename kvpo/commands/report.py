"""`kvpo report`: nothing heavy is imported for it before it has something to do.

So its help and its refusals come at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpo.commands.options import Positional


@dataclass(frozen=True)
class Report:
    """Write a run's report.html anew."""

    run: Positional[Path]
    strips: Path | None = None
    """File for a still picture (PNG) of the same stories before and after; default: none."""

    def __call__(self) -> None:
        if not (self.run / "config.resolved.yaml").exists():
            raise FileNotFoundError(
                f"{self.run} is no run folder: it has no config.resolved.yaml; give the folder that `kvpo align` wrote"
            )
        from kvpo.common.extras import require_extra
        from kvpo.common.files import write_atomic
        from kvpo.report.report import write_report
        from kvpo.report.samples import before_after

        require_extra("a report", "report", ("matplotlib",))
        print(f"report: {write_report(self.run).resolve()}")
        if self.strips is not None:
            print(f"strips: {write_atomic(self.strips, before_after(self.run)).resolve()}")
