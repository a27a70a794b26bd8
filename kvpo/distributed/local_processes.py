"""Several processes of one command on this machine, as torchrun would start them.

What torchrun prints when a process fails, a table and a traceback of its own, is left out: the
process itself has said in one line what was wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INSIDE = "LOCAL_WORLD_SIZE"
"""Variable by which torchrun tells a process how many there are on its machine."""


def check_count(count: int) -> None:
    """Check a wish for ``count`` processes; ValueError for none, or for others than torchrun's."""
    if count < 1:
        raise ValueError(f"--processes {count} must be 1 or more")
    if INSIDE in os.environ and count not in (1, int(os.environ[INSIDE])):
        raise ValueError(
            f"--processes {count}, but torchrun has started {os.environ[INSIDE]} processes here; leave --processes out"
        )


def hand_over(count: int) -> None:
    """Let ``count`` processes run this process's command, and end with their exit code.

    It does nothing for one process, and in a process that was itself started so.
    """
    if count > 1 and INSIDE not in os.environ:
        raise SystemExit(start_processes(count, sys.argv[1:]))


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``python -m kvpo ARGUMENTS`` in ``count`` processes; the exit code of the whole.

    On a CPU each computes with its share of the cores, unless OMP_NUM_THREADS says otherwise. A
    signal goes to all of them, and is waited for.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"kvpo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "kvpo", *arguments)
    except ChildFailedError as failed:
        return failed.get_first_failure()[1].exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
