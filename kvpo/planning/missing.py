"""Everything that a recipe names and that is not there, said at once with the commands that get it.

Rewards' packages, weights and environments, the pipeline folder, prompts and calibration clips:
each is looked for here, and none of them is loaded. A real model needs most of these, and who is
told of them one by one fetches them in as many evenings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kvpo.common.files import first_line, in_words
from kvpo.common.hub import hub_faults
from kvpo.common.trackers import check_installed
from kvpo.config import RunConfig
from kvpo.convert.import_released import FORMATS
from kvpo.generators.pipeline_folder import check_folder
from kvpo.generators.preview import check_there
from kvpo.rewards.isolated.environments import python_of
from kvpo.rewards.measured import require
from kvpo.rewards.pretrained.released import HUB_ID, find
from kvpo.rewards.registry import SHIPPED, RewardEntry, make_reward
from kvpo.runs.build import evaluation_scripts, script_source
from kvpo.runs.loading import start_of

FIELDS = ("weights", "base", "head")
"""Parameters by which shipped rewards name files: a path or a hub id."""

Fault = ValueError | OSError


def refuse_missing(config: RunConfig, run: Path | None = None) -> None:
    """The one thing that is missing, or ValueError with a line for each of several.

    ``run``: the folder of the run that goes on, if one does.
    """
    faults = missing(config, run=run)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        listed = "\n".join(numbered(faults))
        raise ValueError(f"{len(faults)} things are missing; see what gets each:\n{listed}")


def numbered(faults: list[Fault]) -> list[str]:
    return [f"  {number}. {in_words(fault)}" for number, fault in enumerate(faults, start=1)]


def missing(config: RunConfig, download: bool = True, run: Path | None = None) -> list[Fault]:
    """Faults of the things that a run needs and that are not there, each once.

    ``download``: weights on the hub count as there if it can be reached, because loading them
    fetches them. ``run``: as for `refuse_missing`.
    """
    checks: list[Callable[[], object]] = [partial(check_installed, t) for t in config.trackers]
    for entry in config.rewards:
        checks += _of_reward(entry, download)
    checks += [lambda: _pipeline(start_of(config.pipeline, run).folder)]
    checks += [lambda: _prompts(config.data.prompts, lambda: script_source(config))]
    evaluated = config.evaluate.prompts or config.data.prompts
    checks += [lambda: _prompts(evaluated, lambda: evaluation_scripts(config))]
    checks += [lambda: _clips(config.calibration_clips)]
    if config.score.preview:
        checks += [lambda: check_there(Path(config.score.preview))]
    found: dict[str, Fault] = {}
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as fault:
            found.setdefault(in_words(fault), fault)
    return list(found.values())


def _of_reward(entry: RewardEntry, download: bool) -> Iterator[Callable[[], object]]:
    """Only shipped rewards are made for it: what making another one does, nobody knows here."""
    if entry.isolation == "process":
        yield lambda: python_of(entry.environment)
    if entry.isolation != "inline" or entry.name not in SHIPPED:
        return
    try:
        reward = make_reward(entry.name, entry.params)
    except ValueError:  # said with the other settings, where the rewards are made to be used
        return
    yield lambda: require(reward.spec)
    for name in (getattr(reward, field, "") for field in FIELDS):
        if isinstance(name, str) and name:
            yield partial(_weights, reward.spec.name, name, download)


def _weights(reward: str, name: str, download: bool) -> None:
    """Raise an error where a reward's weights are neither here nor to be had."""
    if not re.fullmatch(HUB_ID, name) or Path(name).exists():
        find(reward, name, ())
        return
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot_download(name, local_files_only=True)
        return
    except hub_faults():
        reason = "they are downloaded when they are first used"
    if download:
        try:
            HfApi().model_info(name, timeout=10)
            return
        except hub_faults() as error:
            reason = f"the hub can not be asked for them: {first_line(error)}"
    raise ValueError(
        f"reward {reward!r}: weights {name} are not here ({reason}); "
        f"where there is a network: hf download {name} --local-dir FOLDER, then set weights: FOLDER"
    )


def _pipeline(folder: Path) -> None:
    """Raise an error where the pipeline folder is missing or lacks a part.

    It names the command that writes the folder, where the folder's name says which.
    """
    try:
        check_folder(folder)
    except FileNotFoundError as error:
        if folder.exists() or folder.name not in FORMATS:
            raise
        raise FileNotFoundError(
            f"{folder} is no pipeline folder: it is not there; kvpo import --format {folder.name} "
            f"FILE --base {FORMATS[folder.name].base} {folder} writes it from a file of {FORMATS[folder.name].source}"
        ) from error


def _prompts(path: str, read: Callable[[], object]) -> None:
    try:
        read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the prompts {path} are not there; write them, one prompt a line or JSONL "
            "(docs/prompts.md), or take a public set: kvpo prompts vbench --out FOLDER"
        ) from error


def _clips(folder: str) -> None:
    if folder and not (path := Path(folder) / "clips.csv").is_file():
        raise FileNotFoundError(
            f"calibration_clips: {path} is not there; list good clips in it, a line `file,prompt` each, or leave the setting out"
        )
