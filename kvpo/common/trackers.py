"""Trackers of a run by name: TensorBoard, wandb, trackio, through accelerate's classes for them.

    tensorboard   RUN/tensorboard
    wandb         project kvpo; offline and server by wandb's own variables, WANDB_MODE=offline
    trackio       project kvpo

Each gets the run's settings, its metrics and its videos.  A resumed run goes on in the same run of
the tracker, whose id is in RUN/trackers.json.  Nothing of a tracker is imported before a run that
names it begins.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kvpo.common.files import first_line, write_atomic

Name = Literal["tensorboard", "wandb", "trackio"]
PROJECT, IDS = "kvpo", "trackers.json"
FRAMES, PIXELS = 48, 512
"""Most frames and longest side of a video in TensorBoard, which shows it as a GIF."""


def check_installed(name: Name) -> None:
    """Raise ValueError where a tracker's package is missing."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"trackers: {name} is not installed; pip install {name}, or leave it out of trackers"
        )


class Trackers:
    """The trackers of one run."""

    def __init__(
        self,
        names: Sequence[Name],
        folder: Path,
        settings: Mapping[str, Any],
        resume_after: int | None,
    ):
        """Open the trackers, or go on with them.

        ``resume_after``: the last step to keep, None for a new run. Raises ValueError where a
        package is missing.
        """
        for name in names:
            check_installed(name)
        ids = _ids(folder, names)
        self._open = {name: _opened(name, folder, ids[name], resume_after) for name in names}
        if resume_after is None:
            for tracker in self._open.values():
                tracker.store_init_configuration(flat(settings))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for tracker in self._open.values():
            tracker.log(dict(numbers), step=step)

    def show(self, step: int, videos: Mapping[str, Path]) -> None:
        """Show video files, by name."""
        for name, tracker in self._open.items():
            for title, path in videos.items():
                if name == "tensorboard":
                    _add_video(tracker.tracker, title, path, step)
                else:
                    package = importlib.import_module(name)
                    tracker.log({title: package.Video(str(path))}, step=step)

    def close(self) -> None:
        for tracker in self._open.values():
            tracker.finish()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as ``section.key`` -> number or text, the values that every tracker takes."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            found[f"{prefix}{key}"] = value
        else:
            found[f"{prefix}{key}"] = json.dumps(value)
    return found


def _ids(folder: Path, names: Sequence[Name]) -> dict[str, str]:
    """Id of the run in each tracker: that of before, or a new one, which is then kept."""
    path = folder / IDS
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found: dict[str, str] = {name: there.get(name) or uuid.uuid4().hex[:8] for name in names}
    if set(found) - set(there):
        write_atomic(path, json.dumps(there | found, indent=1) + "\n")
    return found


def _opened(name: Name, folder: Path, id: str, resume_after: int | None) -> Any:
    """accelerate's tracker of that name, begun."""
    from accelerate import tracking

    # Its own logger, and its decorator, ask process groups of accelerate's, which nobody has here:
    # only the first rank of a run makes a tracker at all.
    tracking.logger = logging.getLogger("accelerate.tracking")
    title = folder.resolve().name
    kinds: dict[Name, tuple[type, str, dict[str, Any]]] = {
        "tensorboard": (
            tracking.TensorBoardTracker,
            "tensorboard",
            {
                "logging_dir": str(folder),
                "purge_step": None if resume_after is None else resume_after + 1,
            },
        ),
        "wandb": (
            tracking.WandBTracker,
            PROJECT,
            {"name": title, "id": id, "resume": "allow", "dir": str(folder)},
        ),
        "trackio": (
            tracking.TrackioTracker,
            PROJECT,
            {"name": f"{title}-{id}", "resume": "allow"},
        ),
    }
    kind, run, given = kinds[name]
    if name == "tensorboard" and resume_after is not None:
        _wait_for_a_later_name(folder)
    tracker = type(kind.__name__, (kind,), {"main_process_only": False})(run, **given)
    try:
        tracker.start()
    except Exception as error:  # each tracker has errors of its own, for networks, keys and disks
        raise OSError(
            f"trackers: {name} could not be begun ({first_line(error)}); set WANDB_MODE=offline "
            "where wandb has no network or key, or leave it out of trackers"
        ) from error
    return tracker


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new file of events sorts behind those of ``folder``; at most a second.

    TensorBoard reads a run's files in the order of their names, which hold the second they were
    begun in and then numbers without leading zeros: of two of one second the later may come first,
    and the steps it takes back would stay.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("tensorboard/*tfevents*")]
    while seconds and int(time.time()) <= max(seconds):
        time.sleep(0.05)


def _add_video(board: Any, title: str, path: Path, step: int) -> None:
    """Add a video to TensorBoard as a GIF.

    The writer's own `add_video` needs another package for no more than that.
    """
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    from kvpo.common.video import read_mp4

    frames, fps = read_mp4(path)
    every = -(-len(frames) // FRAMES)
    pictures = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in frames[::every]]
    for picture in pictures:
        picture.thumbnail((PIXELS, PIXELS))
    written = io.BytesIO()
    pictures[0].save(
        written,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=1000 * every / fps,
        loop=0,
    )
    image = Summary.Image(
        height=pictures[0].height,
        width=pictures[0].width,
        colorspace=3,
        encoded_image_string=written.getvalue(),
    )
    board._get_file_writer().add_summary(
        Summary(value=[Summary.Value(tag=title, image=image)]), step
    )
    board.flush()
