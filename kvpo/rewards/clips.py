"""Good clips to calibrate rewards on.

They are the miniature's true ones, or a folder of anyone's own videos.

folder/clips.csv    file,prompt      one line a video; paths from the folder
"""

from __future__ import annotations

from pathlib import Path

from kvpo.common.video import FPS, read_mp4
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.clip_list import clip_rows

FRAMES = 36
"""Frames of a clip: three blocks, as in training."""


def folder_clips(folder: Path, seconds: float = FRAMES / FPS) -> list[VideoBatch]:
    """Make a batch of one clip per line of ``folder/clips.csv``: its video's middle ``seconds``.

    Raises ValueError or FileNotFoundError that names file and line.
    """
    path = Path(folder) / "clips.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: list the clips in it, a line `file,prompt` each after the head line `file,prompt`"
        )
    rows = clip_rows(path)
    if absent := next((row for row in rows if not (path.parent / row.file).is_file()), None):
        raise FileNotFoundError(
            f"{path}, line {absent.line}: there is no file {path.parent / absent.file}; correct the name, or take the line out"
        )
    return [_middle(path.parent / row.file, row.prompt, seconds) for row in rows]


def _middle(path: Path, prompt: str, seconds: float) -> VideoBatch:
    video, fps = read_mp4(path, original=True)
    frames = min(len(video), round(seconds * fps))
    first = (len(video) - frames) // 2
    return VideoBatch(video[None, first : first + frames], fps, (prompt,))
