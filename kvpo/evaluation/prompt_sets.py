"""`kvpo prompts`: public prompt sets as prompt files of `kvpo.method.prompt_files`.

Each has a record of where it is from and under which licence.

    OUT/NAME.jsonl         one script a line, {"id": "vbench-0001", "prompts": [...]}; ids name the noise, so they do not depend on the file
    OUT/NAME.source.json   source, address or file, its SHA-256, licence

The sets themselves are not part of this project: they are read from their authors' repository, or
from a file downloaded there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvpo.common.files import write_atomic

TIMEOUT = 30.0
"""Seconds without an answer after which an address counts as out of reach."""


@dataclass(frozen=True)
class PublicSet:
    """A prompt set that others use."""

    what: str
    source: str
    """Repository of its authors, and the file there."""
    url: str
    """Address of that file; empty where no lasting one is known."""
    licence: str
    scripts: int
    """Number of scripts; a file with another number is not the set."""
    read: Callable[[str], list[list[str]]]
    """Text of the file -> prompts of every script."""


def _full_info(text: str) -> list[list[str]]:
    """Read VBench's list of prompts with the dimensions they are for.

    Two of the 946 prompts stand in it twice.
    """
    return [[prompt] for prompt in dict.fromkeys(row["prompt_en"] for row in json.loads(text))]


def _lines(text: str) -> list[list[str]]:
    return [[line.strip()] for line in text.splitlines() if line.strip()]


def _jsonl(text: str) -> list[list[str]]:
    return [json.loads(line)["prompts"] for line in text.splitlines() if line.strip()]


def _csv(text: str) -> list[list[str]]:
    return [[row["prompt"]] for row in csv.DictReader(io.StringIO(text))]


GITHUB = "https://raw.githubusercontent.com"
SETS = {
    "vbench": PublicSet(
        "VBench's 946 prompts, 944 different ones, for its 16 dimensions",
        "Vchitect/VBench, VBench_full_info.json (also in the vbench wheel)",
        f"{GITHUB}/Vchitect/VBench/master/VBench_full_info.json",
        "Apache-2.0",
        944,
        _full_info,
    ),
    "moviegen": PublicSet(
        "Movie Gen Video Bench, 1003 prompts; long videos are often judged on the first 128",
        "facebookresearch/MovieGenBench, benchmark/MovieGenVideoBench.txt",
        f"{GITHUB}/facebookresearch/MovieGenBench/main/benchmark/MovieGenVideoBench.txt",
        "CC-BY-NC-4.0",
        1003,
        _lines,
    ),
    "interactive": PublicSet(
        "100 stories of 6 prompts, 10 s each",
        "KlingTeam/MemFlow, interactive_100x6.jsonl",
        "",
        "Apache-2.0",
        100,
        _jsonl,
    ),
    "ta_hard": PublicSet(
        "72 prompts that are hard for text alignment",
        "KwaiVGI/VideoAlign, ta_hard.csv",
        "",
        "MIT",
        72,
        _csv,
    ),
}


def write_set(name: str, source: str, out: Path) -> Path:
    """Write the prompt file of a set; returns its path.

    Raises ValueError where ``source`` is not the set; OSError where it cannot be had.
    """
    wanted = SETS[name]
    place = source or wanted.url
    if not place:
        raise ValueError(
            f"no lasting address of {name} is known; download it from {wanted.source} and give --source FILE"
        )
    raw = _fetch(place, wanted.source)
    scripts = _parse(raw, name, place)
    lines = [
        json.dumps({"id": f"{name}-{number:04d}", "prompts": prompts}, ensure_ascii=False)
        for number, prompts in enumerate(scripts, start=1)
    ]
    record = {
        "set": name,
        "what": wanted.what,
        "source": wanted.source,
        "from": place,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "licence": wanted.licence,
        "scripts": len(scripts),
    }
    write_atomic(out / f"{name}.source.json", json.dumps(record, indent=1) + "\n")
    return write_atomic(out / f"{name}.jsonl", "\n".join(lines) + "\n")


def _fetch(place: str, source: str) -> bytes:
    if not place.startswith(("https://", "http://")):
        return Path(place).read_bytes()
    try:
        with urllib.request.urlopen(place, timeout=TIMEOUT) as answer:
            return answer.read()
    except OSError as error:
        raise OSError(
            f"{place} cannot be reached ({error}); download the set where there is a network, from {source}, and give --source FILE"
        ) from None


def _parse(raw: bytes, name: str, place: str) -> list[list[str]]:
    """Prompts of every script.  ValueError where the file is another one, or not whole."""
    wanted = SETS[name]
    try:
        scripts = wanted.read(raw.decode("utf-8-sig"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place} does not read as {name} ({type(error).__name__}: {error}); give the file of {wanted.source}"
        ) from None
    if len(scripts) != wanted.scripts:
        raise ValueError(
            f"{place} holds {len(scripts)} scripts, but {name} has {wanted.scripts}: numbers on it would not compare; give the file of {wanted.source}"
        )
    return scripts
