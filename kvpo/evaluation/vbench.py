"""`kvpo vbench`: videos named as VBench wants them, its dimensions measured, and its totals.

The dimensions are measured in VBench's own environment.

    normalised d = (score - least) / (most - least)                      DIMENSIONS, from VBench's scripts/constant.py
    Quality      = weighted mean of the 7 quality dimensions             Semantic = of the 9 semantic ones
    Total        = (4 Quality + 1 Semantic) / 5

VBench's own script counts a dimension that was not measured as 0; here there is no total without
all 16. Huang et al., VBench: Comprehensive Benchmark Suite for Video Generative Models, CVPR 2024.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kvpo.common.progress import Progress
from kvpo.method.prompts import read_scripts
from kvpo.types import Script


class Dimension(NamedTuple):
    part: str
    least: float = 0.0
    most: float = 1.0
    weight: float = 1.0
    custom: bool = True
    """VBench measures it on any prompt, not on its own alone."""


DIMENSIONS = {
    "subject_consistency": Dimension("quality", 0.1462),
    "background_consistency": Dimension("quality", 0.2615),
    "temporal_flickering": Dimension("quality", 0.6293),
    "motion_smoothness": Dimension("quality", 0.7060, 0.9975),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "object_class": Dimension("semantic", custom=False),
    "multiple_objects": Dimension("semantic", custom=False),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic", custom=False),
    "spatial_relationship": Dimension("semantic", custom=False),
    "scene": Dimension("semantic", most=0.8222, custom=False),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855, custom=False),
    "temporal_style": Dimension("semantic", most=0.3640),
    "overall_consistency": Dimension("semantic", most=0.3640),
}
PARTS = {"quality": 4.0, "semantic": 1.0}
"""Weights of the total."""
INDEXES = 5
"""Videos of a prompt that VBench's own mode looks for."""
LONGEST = 240
"""Bytes of a video's name: file systems have 255, and it grows under a longer one."""

# Runs in VBench's environment.  Not by its command line, which starts whatever `python` comes first
# in PATH.
MEASURE = """
import json, os, sys, torch, vbench
job = json.loads(sys.argv[1])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
vbench.VBench(device, info, job["out"]).evaluate(job["videos"], job["dimension"], dimension_list=[job["dimension"]], mode=job["mode"])
"""


def named_scripts(prompts: Path, extended: Path | None, blocks: int) -> list[Script]:
    """Scripts whose id is the prompt that VBench reads from the file name.

    Their text is what is generated. A prompt that stands twice gets its videos once, as VBench has
    it: by its first line. Raises ValueError where a script has several prompts, where the files'
    lines do not belong together, or a prompt is no file name.
    """
    short = read_scripts(prompts, blocks)
    long = read_scripts(extended, blocks) if extended else short
    if len(short) != len(long):
        raise ValueError(
            f"{prompts} has {len(short)} scripts, {extended} has {len(long)}; line by line they must belong together"
        )
    if several := [s.id for s in (*short, *long) if len(s.texts) > 1]:
        raise ValueError(
            f"{several[0]} has several prompts, but VBench judges a video by one; take the `ab` or `evaluate` command for stories"
        )
    scripts: dict[str, Script] = {}
    for name, made in zip(short, long):
        video_name(name.texts[0], 0)
        scripts.setdefault(name.texts[0], replace(made, id=name.texts[0]))
    return list(scripts.values())


def video_name(prompt: str, index: int) -> str:
    """PROMPT-INDEX.mp4.  ValueError where no file can be called so."""
    name = f"{prompt}-{index}.mp4"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > LONGEST:
        raise ValueError(
            f"no file can be called {name!r} (at most {LONGEST} bytes, no /), and VBench reads the prompt from the name; put a short prompt into --prompts and this one into --extended"
        )
    return name


def measure(
    python: str,
    videos: Path,
    results: Path,
    dimensions: Sequence[str],
    mode: str,
    progress: Progress,
) -> dict[str, float]:
    """Scores of the dimensions that VBench could measure; of the others its last line is said.

    Each is a process of its own: one may lack a package (detectron2) or its weights, and hours of
    the others must not be lost. A result that is newer than the videos is not measured again.
    """
    newest, scores = max(v.stat().st_mtime for v in videos.glob("*.mp4")), {}
    with progress.bar("VBench", len(dimensions)) as bar:
        for dimension in dimensions:
            path = results / f"{dimension}_eval_results.json"
            job = {
                "videos": str(videos.resolve()),
                "out": str(results.resolve()),
                "dimension": dimension,
                "mode": mode,
            }
            if not path.exists() or path.stat().st_mtime < newest:
                path.unlink(missing_ok=True)
                done = subprocess.run(
                    [python, "-c", MEASURE, json.dumps(job)], capture_output=True, text=True
                )
                if done.returncode or not path.exists():
                    said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
                    progress.say(f"{dimension} could not be measured: {said[-1]}")
            if path.exists():
                scores[dimension] = read_score(path, dimension)
            bar.advance(dimension, log=True)
    if not scores:
        raise ValueError(
            f"VBench measured none of {', '.join(dimensions)} with {python}; see above what it said"
        )
    return scores


def read_score(path: Path, dimension: str) -> float:
    """Read the dimension's score in VBench's own result file, {dimension: [score, videos]}.

    Raises ValueError where it is none in [0, 1].
    """
    try:
        score = float(json.loads(path.read_text(encoding="utf-8"))[dimension][0])
    except (ValueError, KeyError, IndexError, TypeError):
        score = math.nan
    if not 0.0 <= score <= 1.0:
        raise ValueError(
            f"{path} holds no score of {dimension} in [0, 1]; delete it and measure again"
        )
    return score


def totals(scores: Mapping[str, float]) -> dict[str, float | None]:
    """quality, semantic and total in [0, 1]; None for what lacks a dimension."""
    found: dict[str, float | None] = {}
    for part in PARTS:
        members = {name: d for name, d in DIMENSIONS.items() if d.part == part}
        weighted = [
            d.weight * (scores.get(name, math.nan) - d.least) / (d.most - d.least)
            for name, d in members.items()
        ]
        mean = sum(weighted) / sum(d.weight for d in members.values())
        found[part] = None if math.isnan(mean) else mean
    there = {part: mean for part, mean in found.items() if mean is not None}
    whole = sum(PARTS[part] * mean for part, mean in there.items()) / sum(PARTS.values())
    return {**found, "total": whole if len(there) == len(PARTS) else None}


def table(scores: Mapping[str, float]) -> str:
    """Scores and totals in percent, as they are published."""
    lines = [
        f"{name:<24} {scores[name]:>8.2%}" if name in scores else f"{name:<24}        -"
        for name in DIMENSIONS
    ]
    sums = [
        f"{name:<24} {value:>8.2%}"
        if value is not None
        else f"{name:<24}        -  not all of its dimensions were measured"
        for name, value in totals(scores).items()
    ]
    return "\n".join([*lines, *sums])
