"""Good clips to calibrate rewards on: the miniature's true ones, or a folder of anyone's own videos.

    folder/clips.csv    file,prompt      one line a video; paths from the folder
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from kvpo.mini.stories import write_story
from kvpo.mini.world import FPS, pixel_frames
from kvpo.rewards.base import VideoBatch, to_uint8
from kvpo.video import read_mp4

FRAMES = 36
"""Of a clip: three blocks, as in training."""


def story_clips(count: int, pillar: bool = False, seed: int = 7, frames: int = FRAMES) -> list[VideoBatch]:
    """``count`` true clips of the miniature's world, in batches of 8: the first ``frames`` of every prompt segment of stories that no training draws."""
    rows, i = [], 0
    while len(rows) < count:
        story = write_story(seed, "rewards", i, blocks=12, memory=pillar)
        video = to_uint8(story.render())
        for k in range(len(story.scenes)):
            first, stop = (pixel_frames(3 * block) for block in story.script.span(k))
            if first + frames <= stop and story.scenes[0].pillar == pillar:
                rows.append((video[first : first + frames], story.script.texts[k], story.script.texts[:k]))
        i += 1
    rows = rows[:count]
    groups = [rows[j : j + 8] for j in range(0, count, 8)]
    return [VideoBatch(torch.stack([r[0] for r in g]), FPS, tuple(r[1] for r in g), tuple(r[2] for r in g)) for g in groups]


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
