"""`kvpo align`: align a generator to rewards by KVPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpo.api.functions import OUT
from kvpo.commands.options import Positional, Settings
from kvpo.common.progress import Progress
from kvpo.distributed.ranks import leave
from kvpo.distributed.signals import Stopped, ending_at_once
from kvpo.runs.state import restarted_here
from kvpo.train import Alignment


@dataclass(frozen=True)
class Align:
    """Align a generator to rewards by KVPO.  Every setting of the recipe can be given here, e.g. --optimizer.lr 1e-4."""

    recipe: Positional[str]
    """A shipped recipe (mini) or a YAML file."""
    settings: Settings
    out: Path = OUT
    """Folder of the run; it must not hold another one."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint."""
    override: bool = False
    """With --resume, take settings that differ from the run's: patience, branch_parallel, policy.shard, and those of what is shown, evaluated and kept.  steps needs no asking."""

    def __call__(self) -> None:
        progress, run = Progress(self.out / "logs"), None
        with ending_at_once():
            try:
                run = Alignment(self.settings, self.out, progress)
                again = run.ranks.gather(restarted_here(self.out))  # torchrun counts on every node by itself
                report = run.run(self.resume or any(again), self.override)
                progress.say(f"report: {report.resolve()}")
            except Stopped as stop:
                if run is not None and run.state.begun:
                    progress.say(f"stopped by {stop}; {run.done} steps are done and saved. Go on by the same command with --resume")
                else:
                    progress.say(f"stopped by {stop}; nothing was begun")
            finally:
                leave()
