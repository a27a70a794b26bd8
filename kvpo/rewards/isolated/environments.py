"""Environments for rewards whose packages can not live beside kvpo's.

They are made from a locked list and found by name.

kvpo reward-env create hpsv3          from kvpo/rewards/isolated/envs/hpsv3/requirements.txt
kvpo reward-env create mine.txt       from any requirements file; the environment is called mine
kvpo reward-env list
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from kvpo.common.files import write_atomic

ENVS = Path(__file__).parent / "envs"
"""NAME/requirements.txt, and NAME/scorer.py where that environment comes with a reward."""
COMPLETE = "complete.json"
"""File that lists an environment's packages, written last: without it, it is half-made."""


def default_folder() -> Path:
    """Folder of the environments: KVPO_ENVS, else the user's cache; a run does not own them."""
    if given := os.environ.get("KVPO_ENVS"):
        return Path(given)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ValueError(
            f"there is no home folder for environments ({error}); name a folder by KVPO_ENVS or --folder"
        ) from None
    return cache / "kvpo" / "envs"


def python_of(environment: str) -> str:
    """Path of an environment's Python; "" is this one, and a path is taken for a Python.

    Raises ValueError with the way out where there is none.
    """
    if not environment:
        return sys.executable
    if os.sep in environment:
        if not os.access(environment, os.X_OK) or Path(environment).is_dir():
            raise ValueError(
                f"environment = {environment!r} is no Python that can be run; give the path of one, FOLDER/bin/python, or an environment's name"
            )
        return environment
    folder = default_folder() / environment
    if not (folder / COMPLETE).exists():
        raise ValueError(
            f"there is no environment {environment!r} in {folder.parent}; make it: kvpo reward-env create {environment}"
        )
    return str(folder / "bin" / "python")


def shipped() -> list[str]:
    return sorted(path.parent.name for path in ENVS.glob("*/requirements.txt"))


def table(folder: Path) -> list[str]:
    """One line for every environment that is shipped or made."""
    made = {
        path.parent.name: json.loads(path.read_text())["packages"]
        for path in folder.glob(f"*/{COMPLETE}")
    }
    state = {
        name: f"{len(made[name])} packages in {folder / name}"
        if name in made
        else f"not made; kvpo reward-env create {name}"
        for name in sorted({*shipped(), *made})
    }
    return [f"{name:<12} {text}" for name, text in state.items()]


def create(name: str, folder: Path, python: str = sys.executable) -> Path:
    """Make an environment; returns its folder, complete.

    A half-made one there is replaced, and an error leaves nothing. Raises ValueError for a name
    that is not shipped, or made already; OSError where installing fails.
    """
    requirements = Path(name) if name.endswith(".txt") else ENVS / name / "requirements.txt"
    if not name or not requirements.is_file():
        raise ValueError(
            f"there is no {requirements}; shipped environments are {', '.join(shipped())}, and any requirements file can be given, mine.txt"
        )
    target = folder / (requirements.stem if name.endswith(".txt") else name)
    if (target / COMPLETE).exists():
        raise ValueError(f"{target} is there already; remove the folder to make it anew")
    shutil.rmtree(target, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In its final place from the start: scripts in it name the place where they were made.
        for command in commands(target, requirements, python):
            _run(command)
        write_atomic(
            target / COMPLETE,
            json.dumps(
                {"requirements": requirements.read_text(), "packages": _packages(target)}, indent=1
            )
            + "\n",
        )
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def commands(target: Path, requirements: Path, python: str) -> list[list[str]]:
    """Commands that make an environment: uv where there is one, else venv and pip."""
    inside, uv = str(target / "bin" / "python"), shutil.which("uv")
    if uv:
        return [
            [uv, "venv", "--python", python, str(target)],
            [uv, "pip", "install", "--python", inside, "-r", str(requirements)],
        ]
    return [
        [python, "-m", "venv", str(target)],
        [inside, "-m", "pip", "install", "-r", str(requirements)],
    ]


def _run(command: list[str]) -> None:
    """Run a command and show its output; OSError where it fails."""
    code = subprocess.run(
        command,
        env={
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "PYTHONHOME")
        },
    ).returncode
    if code:
        raise OSError(
            f"`{' '.join(command)}` failed with exit code {code}, and nothing of the environment is left; see above"
        )


def _packages(target: Path) -> dict[str, str]:
    """Name -> version of every package that is installed in it."""
    query = "import importlib.metadata as m, json; print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    return json.loads(
        subprocess.run(
            [target / "bin" / "python", "-I", "-c", query],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
