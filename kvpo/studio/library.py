"""The studio's folder: stories, saved videos, and what people preferred.

stories/NAME.json     trees of choices, written anew at every choice
videos/NAME.mp4       saved videos, what they are made of beside each
preferences.jsonl     picks and pairs, one a line, appended
clips/ID/ROW.mp4      the clips that they are about
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from kvpo.common.files import refusals, try_folder
from kvpo.common.video import write_mp4
from kvpo.preference.records import CREDIT, FILE, read_lines
from kvpo.studio.group import Group
from kvpo.studio.tree import Tree

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ANSWERS = tuple(CREDIT)


def check_name(name: object) -> str:
    """Return a story's name, which is a file's too.  ValueError for one that could lead elsewhere."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{str(name)[:80]!r} is no name for a story; use 1 to 64 letters, digits, - and _, the first a letter or digit"
        )
    return name


def no_link(path: Path) -> Path:
    if path.is_symlink():
        raise ValueError(
            f"{path.name} is a link, which may lead elsewhere; put the file itself there"
        )
    return path


class Library:
    """Folder of one studio; every file in it is whole, or the line of it that is not is passed over."""

    def __init__(self, folder: Path):
        try_folder(folder)
        self.folder = folder
        self._lock = threading.Lock()

    # --- Stories and videos ---

    def story(self, name: str) -> Path:
        return no_link(self.folder / "stories" / f"{check_name(name)}.json")

    def video(self, name: str) -> Path:
        return no_link(self.folder / "videos" / f"{check_name(name)}.mp4")

    def stories(self) -> list[str]:
        """Names of the stories, the latest written first."""
        found = [(p.stat().st_mtime, p.stem) for p in (self.folder / "stories").glob("*.json")]
        return [name for _, name in sorted(found, reverse=True) if NAME.fullmatch(name)]

    def new_name(self) -> str:
        """Name for a story that has none yet: when it began, and something random."""
        return f"story-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"

    def keep(self, tree: Tree) -> None:
        """Write a story; OSError with the way out where the disk refuses."""
        path = self.story(tree.name)
        with refusals(
            path, "the story goes on in the page; free disk space, then choose or name it again"
        ):
            tree.write(path)

    # --- Preferences ---

    def picked(self, rater: str, tree: Tree, group: Group, row: int, fps: float) -> dict[str, Any]:
        """Record that one of a group's rows was chosen to go on from; returns what was written."""
        pixels = torch.cat(group.pixels, dim=1)
        clips = self.clips(tree.name, pixels, fps)
        return self._append(rater, tree, group, {"kind": "pick", "rows": clips, "chosen": row})

    def compared(
        self, rater: str, tree: Tree, group: Group, rows: Sequence[int], answer: str, fps: float
    ) -> dict[str, Any]:
        """Record which of two rows, left and right, is better: ``left``, ``right`` or ``same``."""
        if answer not in ANSWERS:
            raise ValueError(f"{answer!r} is no answer; give one of {', '.join(ANSWERS)}")
        many = len(group.plans)
        whole = all(type(row) is int and 0 <= row < many for row in rows)
        if len(rows) != 2 or not whole or rows[0] == rows[1]:
            raise ValueError(
                f"{list(rows)} is no pair of rows 0 to {many - 1}; give two different ones"
            )
        pixels = torch.cat(group.pixels, dim=1)[list(rows)]
        clips = self.clips(tree.name, pixels, fps)
        pair = {"kind": "pair", "rows": clips, "row_numbers": list(rows), "answer": answer}
        return self._append(rater, tree, group, pair)

    def clips(self, story: str, pixels_RT3HW: torch.Tensor, fps: float) -> list[str]:
        """Write the clips of some rows; returns their paths within the folder."""
        name = Path("clips") / f"{check_name(story)}-{uuid.uuid4().hex[:12]}"
        paths = [name / f"{row}.mp4" for row in range(len(pixels_RT3HW))]
        with refusals(self.folder / name, "nothing was recorded; free disk space and choose again"):
            try:
                for path, pixels in zip(paths, pixels_RT3HW):
                    write_mp4(self.folder / path, pixels, fps)
            except OSError:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                raise
        return list(map(str, paths))

    def _append(
        self, rater: str, tree: Tree, group: Group, what: Mapping[str, Any]
    ) -> dict[str, Any]:
        fork = group.fork
        prompts = {b: t for b, t in tree.prompts(tree.at).items() if b <= fork.block}
        line = {
            **what,
            "rater": rater,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "story": tree.name,
            "generator": tree.generator,
            "sampler": tree.sampler,
            "seed": tree.seed,
            "prompts": prompts,
            "prompt": list(prompts.values())[-1],
            "fork": asdict(fork),
            "plans": [asdict(plan) for plan in group.plans],
        }
        path = self.folder / FILE
        with (
            self._lock,
            refusals(path, "the preference was not recorded; free disk space, choose again"),
        ):
            try:
                append_line(path, line)
            except OSError:
                shutil.rmtree((self.folder / what["rows"][0]).parent, ignore_errors=True)
                raise
        return line


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line, and wait until the disk has it.

    A line that a killed process left unfinished is closed first, so that it spoils no other. Where
    the disk refuses, nothing of the line stays, so that it can be appended again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        text = json.dumps(line).encode() + b"\n"
        if size:
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else b"\n" + text
        try:
            _write_all(file, text)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _write_all(file: FileIO, text: bytes) -> None:
    """Write all bytes; a disk that becomes full takes some of them first, and refuses then."""
    while text:
        text = text[file.write(text) :]


def read_preferences(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Read what people preferred: the lines, and how many unfinished ones were passed over."""
    lines, broken = read_lines(folder / FILE)
    return [value for _, value in lines], len(broken)
