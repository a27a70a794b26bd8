"""`kvpo env`: versions, device and folders, to be pasted into a bug report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from kvpo.common.environment import environment, pick_device, version_of
from kvpo.common.files import first_line
from kvpo.rewards.isolated.environments import default_folder


@dataclass(frozen=True)
class Env:
    """Print versions, device and cache folders, for bug reports."""

    def __call__(self) -> None:
        found = facts()
        width = max(map(len, found))
        for key, value in found.items():
            print(f"{key:<{width}}  {value}")


def facts() -> dict[str, str]:
    """Facts that a maintainer asks first, in words."""
    import torch

    device = pick_device("auto")
    found = environment(device)
    commit = {"commit": found["git_commit"]} if found["git_commit"] else {}
    versions = {"kvpo": version_of("kvpo") or "not installed", **commit, "python": found["python"]}
    hardware = {"device": f"{device}, {found['hardware']}", "cuda": torch.version.cuda or "none"}
    return {**versions, **needed(), **hardware, **cards(), **folders()}


def needed() -> dict[str, str]:
    """The packages that kvpo needs, without its extras': the installed version of each."""
    try:
        lines = [line for line in requires("kvpo") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        lines = []
    return {wanted.name: _installed(wanted) for wanted in map(Requirement, lines)}


def _installed(wanted: Requirement) -> str:
    """The installed version of a package, and what is needed where that is another."""
    version = version_of(wanted.name)
    if version is None:
        return f"missing, {wanted.specifier} is needed"
    # a version with a local part, as 2.13.0+cpu, counts as the one without
    right = wanted.specifier.contains(version, prereleases=True)
    return version if right else f"{version}, but {wanted.specifier} is needed"


def cards() -> dict[str, str]:
    """Every GPU that this torch sees, with its memory."""
    import torch

    found = {}
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    return found


def folders() -> dict[str, str]:
    """Folders that keep files between runs, and the variable that decides each."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from kvpo.generators.cache_folder import cache_folder

    return {
        "prompt cache": _place(cache_folder, "KVPO_CACHE"),
        "environments": _place(default_folder, "KVPO_ENVS"),
        "released": _place(lambda: Path(HF_HUB_CACHE), "HF_HUB_CACHE"),
    }


def _place(find: Callable[[], Path], variable: str) -> str:
    """A folder in words; in a container there may be no home folder to have it."""
    try:
        folder = find()
    except (OSError, ValueError) as error:
        return f"none: {first_line(error)}"
    notes = [
        "" if folder.exists() else "not there yet",
        f"by ${variable}" * (variable in os.environ),
    ]
    said = ", ".join(filter(None, notes))
    return f"{folder} ({said})" if said else str(folder)
