"""`kvpo align`: align a generator to rewards by KVPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpo.api.defaults import OUT
from kvpo.commands.options import Positional
from kvpo.commands.settings import Settings
from kvpo.common.environment import pick_device
from kvpo.common.files import try_folder
from kvpo.common.progress import Progress
from kvpo.common.wording import count_of
from kvpo.distributed.local_processes import check_count, hand_over


@dataclass(frozen=True)
class Align:
    """Align a generator to rewards by KVPO.

    Every setting of the recipe can be given here, e.g. --optimizer.lr 1e-4.
    """

    recipe: Positional[str]
    """A shipped recipe (mini), a YAML file, or a run's folder, for its settings."""
    settings: Settings
    out: Path = OUT
    """Folder of the run; it must not hold another one."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint."""
    processes: int = 1
    """Processes that share the groups of every step, as torchrun --nproc-per-node would start them.
    One for every card; on a CPU one for every core or two, each with its share of the threads."""
    override: bool = False
    """Take settings that differ from the run's; with --resume only.
    They are patience, branch_parallel, policy.shard, and those of what is shown, evaluated and
    kept. steps needs no asking."""

    def __call__(self) -> None:
        if self.override and not self.resume:
            raise ValueError(
                "--override lets a resumed run take other settings, and without --resume a new run begins; give both, or leave it out"
            )
        check_count(self.processes)
        hand_over(self.processes)
        from kvpo.distributed.ranks import leave
        from kvpo.distributed.signals import Stopped, ending_at_once
        from kvpo.planning.missing import refuse_missing
        from kvpo.runs.state import check_place, restarted_here
        from kvpo.train import Alignment

        progress, run = Progress(self.out / "logs"), None
        with ending_at_once():
            try:
                try_folder(self.out)
                progress.log(self.plan())
                check_place(self.out, self.resume)
                refuse_missing(self.settings, self.out)
                run = Alignment(self.settings, self.out, progress)
                # torchrun counts on every node by itself
                again = run.parts.ranks.gather(restarted_here(self.out))
                report = run.run(self.resume or any(again), self.override)
                progress.say(f"report: {report.resolve()}")
            except Stopped as stop:
                if run is not None and run.state.begun:
                    progress.say(
                        f"stopped by {stop}; {run.done} steps are done and saved. Go on by the same command with --resume"
                    )
                else:
                    progress.say(f"stopped by {stop}; nothing was begun")
            finally:
                leave()

    def plan(self) -> str:
        """Say in one line what will be done."""
        s = self.settings
        work = f"{count_of(s.steps, 'step')} of {count_of(s.groups, 'group')} with {s.rollout.branches} branches, videos of {count_of(s.data.blocks, 'block')}"
        looks = (
            f"evaluated every {count_of(s.evaluate.every, 'step')}"
            if s.evaluate.every
            else "evaluated at the end"
        )
        return f"kvpo align {self.recipe} in {self.out} on {pick_device(s.device)}: {work}, {looks}, saved every {count_of(s.checkpoint.every, 'step')}"
