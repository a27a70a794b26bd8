"""Record of a run's surroundings: versions, commit, hardware, command; written before step 0."""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpo.common.late import Late
from kvpo.common.wording import count_of

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")

PACKAGES = (
    "kvpo",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pydantic",
)


def environment(device: torch.device) -> dict[str, Any]:
    """JSON-ready facts."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "git_commit": git_commit(),
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        "python": platform.python_version(),
        "packages": packages(),
        "hardware": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {count_of(torch.get_num_threads(), 'thread')}",
        "device": str(device),
    }


def packages() -> dict[str, str | None]:
    """Versions of the packages that decide what a run's numbers are."""
    return {name: version_of(name) for name in PACKAGES}


def command() -> str:
    """The command line, without the folders that lead to the program."""
    return " ".join(["kvpo", *sys.argv[1:]])


def pick_device(name: str) -> torch.device:
    """Device of that name; `auto` is a GPU if there is one.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a card for every process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device = {name!r} is unknown; use cpu, cuda, cuda:1 ... or auto"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but this torch sees no GPU; use cpu or auto")
    return device


def take_peak(device: torch.device) -> int:
    """Most bytes in use since the last call.

    They are those of a GPU's tensors; a CPU's process only knows its whole life.
    """
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def make_reproducible(device: torch.device) -> None:
    """Make the same run give the same numbers, bit for bit.

    A CPU's kernels do so by themselves; a GPU's must be told, before the first product.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def git_commit() -> str | None:
    """The commit of the source tree the package runs from; None for an installed one."""
    folder = Path(__file__).parent
    try:
        git = functools.partial(
            subprocess.run, capture_output=True, text=True, check=True, cwd=folder
        )
        # an environment inside some other repository is not its commit
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        found = git(["git", "rev-parse", "HEAD"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()
