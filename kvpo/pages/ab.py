"""The A/B page: pairs of videos, with four questions each.

Answers are kept in the browser and saved as a file.

It opens from a file without a network: style, script and, up to `EMBED`, the videos are inside it.
What makes it is not told whose video is on which side, so it cannot give it away.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvpo.common.files import write_atomic
from kvpo.pages.render import render

if TYPE_CHECKING:  # the network's libraries, for which nobody who counts answers should wait
    from kvpo.generators.geometry import Geometry
    from kvpo.types import Script

EMBED = 48 * 2**20
"""Bytes of video up to which the page is a single file; beyond, the videos lie beside it."""
QUESTIONS = {
    "VQ": "Which picture is better: clean, sharp, free of artefacts?",
    "MQ": "Which motion is better: lively, smooth, plausible?",
    "TA": "Which shows better what the prompts ask, each at its time?",
    "overall": "Which video is better, all in all?",
}


def write_page(
    page: Path, study: str, scripts: Sequence[Script], geometry: Geometry, apart: bool = False
) -> None:
    """Write page/index.html from page/000-left.mp4, page/000-right.mp4 and so on.

    There is a pair for every script. Videos that went into the page are removed; with ``apart``
    all stay beside it.
    """
    videos = list(page.glob("*.mp4"))
    embed = not apart and sum(video.stat().st_size for video in videos) <= EMBED
    shown = {
        "study": study,
        "questions": QUESTIONS,
        "pairs": [
            _shown(number, script, page, embed, geometry) for number, script in enumerate(scripts)
        ],
    }
    data = json.dumps(shown).replace("<", "\\u003c")  # a prompt may hold </script>
    text = render("ab.html", title="Which video is better?", data=data)
    write_atomic(page / "index.html", text)
    for video in videos:
        if embed:
            video.unlink()
        else:
            # one generator made all of its videos before the other: times would tell
            os.utime(video, (0, 0))


def _shown(number: int, script: Script, page: Path, embed: bool, geometry: Geometry) -> dict:
    """Content of a pair for a rater: two videos, the prompts, and each prompt's first second."""
    paths = {side: page / f"{number:03d}-{side}.mp4" for side in ("left", "right")}
    videos = {
        side: f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
        if embed
        else path.name
        for side, path in paths.items()
    }
    at = [
        round(geometry.pixel_frames(start * geometry.block) / geometry.fps, 3)
        for start in script.starts
    ]
    return {**videos, "prompts": script.texts, "at": at}
