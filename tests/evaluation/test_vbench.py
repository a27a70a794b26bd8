"""VBench: its totals are the published ones, its videos are found by their names, and what it
cannot measure is never a zero."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from test_align import settings, write_recipe
from tiny import BLUE, GEOMETRY, RED

from kvpo.commands.vbench import Vbench
from kvpo.common.video import read_mp4
from kvpo.evaluation.vbench import DIMENSIONS, named_scripts, read_score, table, totals, video_name
from kvpo.method.prompts import read_scripts

PUBLISHED = {
    "VideoCrafter-2.0": (
        80.44,
        82.20,
        73.42,
        96.85,
        98.22,
        98.41,
        97.73,
        42.50,
        63.13,
        67.22,
        92.55,
        40.66,
        95.00,
        92.92,
        35.86,
        55.29,
        25.13,
        25.84,
        28.23,
    ),
    "CogVideoX-5B": (
        81.61,
        82.75,
        77.04,
        96.23,
        96.52,
        98.66,
        96.92,
        70.97,
        61.98,
        62.90,
        85.23,
        62.11,
        99.40,
        82.81,
        66.35,
        53.20,
        24.91,
        25.38,
        27.59,
    ),
    "CausVid": (
        84.27,
        85.65,
        78.75,
        97.53,
        97.19,
        96.24,
        98.05,
        92.69,
        64.15,
        68.88,
        92.99,
        72.15,
        99.80,
        80.17,
        64.65,
        56.58,
        24.27,
        25.33,
        27.51,
    ),
    "HunyuanVideo": (
        83.24,
        85.09,
        75.82,
        97.37,
        97.76,
        99.44,
        98.99,
        70.83,
        60.36,
        67.56,
        86.10,
        68.55,
        94.40,
        91.60,
        68.68,
        53.88,
        19.80,
        23.89,
        26.44,
    ),
}
"""Total, Quality, Semantic and the 16 dimensions in VBench's order, percent: the table of arXiv
2502.04896."""


# --- Totals ---


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_rows(model):
    """From the rounded dimensions to the published totals, a rounding of 0.01 away at most."""
    total, quality, semantic, *scores = PUBLISHED[model]
    found = totals({name: score / 100 for name, score in zip(DIMENSIONS, scores, strict=True)})
    assert (
        100 * found["quality"] == pytest.approx(quality, abs=0.0101)
        and 100 * found["semantic"] == pytest.approx(semantic, abs=0.0101)
        and 100 * found["total"] == pytest.approx(total, abs=0.0101)
    )
    assert total == pytest.approx(0.8 * quality + 0.2 * semantic, abs=0.0101)


def test_the_ends_of_the_scale():
    """Every dimension at its least gives 0, at its most 1; dynamic degree alone lifts quality by
    0.5 of 6.5."""
    least = {name: d.least for name, d in DIMENSIONS.items()}
    assert totals(least) == {"quality": 0.0, "semantic": 0.0, "total": 0.0}
    assert totals({name: d.most for name, d in DIMENSIONS.items()}) == pytest.approx(
        {"quality": 1.0, "semantic": 1.0, "total": 1.0}
    )
    assert totals(least | {"dynamic_degree": 1.0})["quality"] == pytest.approx(0.5 / 6.5)


def test_what_was_not_measured_is_no_zero():
    scores = {name: 0.9 for name, d in DIMENSIONS.items() if d.part == "quality"}
    found = totals(scores)
    assert found["quality"] is not None and found["semantic"] is None and found["total"] is None
    assert totals({name: 0.9 for name in DIMENSIONS if name != "color"})["total"] is None
    assert "not all of its dimensions" in table(scores) and f"{'color':<24}        -" in table(
        scores
    )


# --- Names ---


def test_names_are_vbenchs():
    assert (
        video_name("A 3D model of a 1800s victorian house.", 4)
        == "A 3D model of a 1800s victorian house.-4.mp4"
    )
    for prompt in ("half/half", "é" * 120):
        with pytest.raises(ValueError, match="no file can be called"):
            video_name(prompt, 0)


def test_short_prompts_name_what_long_ones_make(tmp_path):
    """The second `a cat` is the same video; it is made from the first line."""
    (tmp_path / "s.txt").write_text("a cat\na dog\na cat\n")
    (tmp_path / "l.txt").write_text("a long cat\na long dog\nanother cat\n")
    scripts = named_scripts(tmp_path / "s.txt", tmp_path / "l.txt", 5)
    assert [(s.id, s.texts, s.blocks) for s in scripts] == [
        ("a cat", ("a long cat",), 5),
        ("a dog", ("a long dog",), 5),
    ]
    assert [s.texts for s in named_scripts(tmp_path / "s.txt", None, 5)] == [("a cat",), ("a dog",)]


@pytest.mark.parametrize(
    ("short", "long", "message"),
    [
        ("a\nb\n", "a\n", "2 scripts"),
        ("2,[a],[b]\n", None, "several prompts"),
        ("a\n", "2,[a],[b]\n", "several prompts"),
        ("a/b\n", None, "no file can be called"),
    ],
)
def test_files_that_do_not_fit(tmp_path, short, long, message):
    (tmp_path / "s.txt").write_text(short)
    (tmp_path / "l.txt").write_text(long or "")
    with pytest.raises(ValueError, match=message):
        named_scripts(tmp_path / "s.txt", tmp_path / "l.txt" if long else None, 5)


# --- The command, with a stand-in for VBench that has its interface ---

STAND_IN = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.info, self.out = full_info_dir, output_path
        os.makedirs(output_path, exist_ok=True)
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False, mode="vbench_standard", **kwargs):
        if "human_action" in dimension_list:
            raise FileNotFoundError("no weights")
        print("noise on stdout", self.info)
        videos = sorted(os.listdir(videos_path))
        json.dump({d: [0.75, [{"video_path": v, "video_results": 0.75} for v in videos]] for d in dimension_list}, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
        open(os.path.join(self.out, "calls"), "a").write(f"{mode} {dimension_list} {len(videos)}\\n")
"""


@pytest.fixture
def vbench(tmp_path, folder, monkeypatch):
    """The command's options for two short videos; `vbench` and `torch` that the child imports
    are stand-ins."""
    (tmp_path / "site" / "vbench").mkdir(parents=True)
    (tmp_path / "site" / "vbench" / "__init__.py").write_text(STAND_IN)
    # the real one takes seconds to import
    (tmp_path / "site" / "torch.py").write_text(
        "class cuda: is_available = staticmethod(lambda: False)\ndevice = str\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "p.txt").write_text(f"{RED}\n{BLUE}\n")
    return {
        "generator": str(folder),
        "prompts": tmp_path / "p.txt",
        "recipe": write_recipe(tmp_path / "r.yaml", settings(folder)),
        "seeds": (5,),
        "blocks": 2,
        "out": tmp_path / "out",
        "device": "cpu",
    }


def calls(out: Path) -> list[str]:
    return (out / "results" / "custom_input" / "calls").read_text().splitlines()


def test_videos_then_scores(vbench, capsys):
    out = vbench["out"]
    Vbench(**vbench)()
    videos = sorted((out / "videos").iterdir())
    assert [v.name for v in videos] == sorted([f"{RED}-0.mp4", f"{BLUE}-0.mp4"]) and len(
        read_mp4(videos[0])[0]
    ) == GEOMETRY.pixel_frames(4)
    assert "2 videos in" in capsys.readouterr().out and not (out / "results").exists()
    before = [v.stat().st_mtime_ns for v in videos]

    ask = vbench | {
        "environment": sys.executable,
        "dimensions": ("temporal_flickering", "human_action"),
    }
    Vbench(**ask)()
    assert [v.stat().st_mtime_ns for v in videos] == before, "made once"
    assert calls(out) == ["custom_input ['temporal_flickering'] 2"]
    assert (
        "human_action could not be measured: FileNotFoundError: no weights"
        in capsys.readouterr().out
    )
    record = json.loads((out / "vbench.json").read_text())
    assert (
        record["scores"] == {"temporal_flickering": 0.75}
        and record["total"] is None
        and record["mode"] == "custom_input"
        and record["prompts"] == 2
    )

    Vbench(**ask)()
    assert len(calls(out)) == 1, "measured once"
    os.utime(videos[0], (4e9, 4e9))
    Vbench(**ask)()
    assert len(calls(out)) == 2, "a newer video makes the result old"


def test_other_videos_are_not_mixed_in(vbench):
    Vbench(**vbench)()
    with pytest.raises(ValueError, match="holds videos of another generator, or of other prompts"):
        Vbench(**vbench | {"seeds": (6,)})()


def test_nothing_measured_is_an_error(vbench):
    with pytest.raises(ValueError, match="measured none of human_action"):
        Vbench(**vbench | {"environment": sys.executable, "dimensions": ("human_action",)})()
    assert not (vbench["out"] / "vbench.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": ("color",)}, "color: not in mode custom_input"),
        ({"dimensions": ("beauty",)}, "beauty: not in mode"),
        ({"mode": "vbench_standard"}, "looks for 5 videos"),
        (
            {"mode": "vbench_standard", "seeds": (0, 1, 2, 3, 4)},
            "has 2 prompts, but VBench's own mode looks for its 944",
        ),
        ({"environment": "nowhere"}, "kvpo reward-env create nowhere"),
    ],
)
def test_bad_options_come_before_any_work(vbench, options, message):
    with pytest.raises(ValueError, match=message):
        Vbench(**vbench | options)()
    assert not vbench["out"].exists()


def test_dimensions_of_the_modes():
    def of(mode):
        return Vbench("mini", Path("p"), mode=mode).chosen()

    assert len(of("custom_input")) == 10 and of("vbench_standard") == list(DIMENSIONS)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"color": []}',
        '{"color": [1.5, []]}',
        '{"color": [NaN, []]}',
        '{"color": ["a"]}',
    ],
)
def test_results_that_are_none(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match="holds no score of color"):
        read_score(tmp_path / "r.json", "color")


def test_prompt_files_of_kvpo_prompts_are_read(tmp_path):
    (tmp_path / "vbench.jsonl").write_text('{"id": "vbench-0001", "prompts": ["a cat"]}\n')
    assert (
        read_scripts(tmp_path / "vbench.jsonl", 3)[0].id == "vbench-0001"
        and named_scripts(tmp_path / "vbench.jsonl", None, 3)[0].id == "a cat"
    )
