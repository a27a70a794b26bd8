"""Good clips to calibrate rewards on: the miniature's true ones, or a folder of anyone's own videos.

    folder/clips.csv    file,prompt      one line a video; paths from the folder
"""

from __future__ import annotations

import csv
from pathlib import Path

from kvpo.common.video import FPS, read_mp4
from kvpo.rewards.base import VideoBatch

FRAMES = 36
"""Of a clip: three blocks, as in training."""


def folder_clips(folder: Path, seconds: float = FRAMES / FPS) -> list[VideoBatch]:
    """A batch of one clip per line of ``folder/clips.csv``: the middle ``seconds`` of its video.  ValueError or FileNotFoundError that names file and line."""
    path = Path(folder) / "clips.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: list the clips in it, a line `file,prompt` each after the head line `file,prompt`")
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if not lines or {"file", "prompt"} - set(lines[0]):
        raise ValueError(f"{path} must have the columns file and prompt and at least one line; it has {sorted(lines[0]) if lines else 'no line'}")
    return [_middle(path.parent / line["file"], line["prompt"], seconds) for line in lines]


def _middle(path: Path, prompt: str, seconds: float) -> VideoBatch:
    video, fps = read_mp4(path)
    frames = min(len(video), round(seconds * fps))
    first = (len(video) - frames) // 2
    return VideoBatch(video[None, first : first + frames], fps, (prompt,))
