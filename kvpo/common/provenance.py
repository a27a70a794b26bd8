"""Origin of a video file, written into it: prompts, seed, generator, and the code that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpo.common.environment import command, git_commit, packages
from kvpo.common.files import write_atomic
from kvpo.types import Script


def about_video(script: Script, seed: int, generator: str, **settings: Any) -> dict[str, Any]:
    """Record of a video's origin; `kvpo.common.video` writes it into an mp4.

    `write_beside` writes it beside the file.
    """
    story = {
        "prompts": list(script.texts),
        "starts": list(script.starts),
        "blocks": script.blocks,
        "script": script.id,
        "seed": seed,
    }
    return {
        **story,
        "generator": generator,
        **settings,
        "commit": git_commit(),
        "kvpo": packages().get("kvpo"),
        "command": command(),
    }


def write_beside(video: Path, about: Mapping[str, Any]) -> Path:
    """Write the record as a JSON file of the video's name."""
    return write_atomic(video.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
