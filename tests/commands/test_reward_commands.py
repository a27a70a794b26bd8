"""`kvpo rewards`: list, score, calibrate; and the clips that rewards are calibrated on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvpo.commands import main as cli
from kvpo.common.video import write_mp4
from kvpo.mini.rewards.world import MotionQuality, VisualQuality
from kvpo.mini.source import story_clips
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.calibration import (
    FLAWS,
    MAY_PASS,
    MUST_WIN,
    calibrate,
    miscaptioned,
    refuse_frozen,
)
from kvpo.rewards.clips import FRAMES, folder_clips
from kvpo.rewards.registry import SHIPPED

PROMPT = "a small red circle moves right slowly over white paper"


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = cli.main(["rewards", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two true clips as videos, with their prompts."""
    folder, batch = tmp_path_factory.mktemp("clips"), story_clips(2)[0]
    for i, video in enumerate(batch.frames):
        write_mp4(folder / f"{i}.mp4", video, factor=1)
    (folder / "clips.csv").write_text(
        "file,prompt\n" + "".join(f"{i}.mp4,{prompt}\n" for i, prompt in enumerate(batch.prompts))
    )
    return folder


def test_every_reward_is_listed(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(SHIPPED)
    assert (
        "kvpo[hpsv2]" in next(line for line in out.splitlines() if line.startswith("hpsv2"))
        or "needs its weights" in out
    )


def test_one_reward_on_a_video(capsys, folder):
    code, out, _ = run(capsys, "score", str(folder / "0.mp4"), "--reward", "world_vq")
    assert code == 0 and out.startswith("  0.00 s  VQ 0.") and "one " in out
    code, out, _ = run(
        capsys, "score", str(folder / "0.mp4"), "--reward", "world_vq", "--seconds", "1"
    )
    assert [line.split()[0] for line in out.splitlines()] == ["0.00", "1.00"]


def test_the_miniature_s_rewards_judge_the_miniature_s_videos(capsys, tmp_path):
    """A video is enlarged when it is written, and the rewards refused 256 x 256 pixels."""
    batch = story_clips(1)[0]
    write_mp4(tmp_path / "v.mp4", batch.frames[0])
    code, out, err = run(
        capsys,
        "score",
        str(tmp_path / "v.mp4"),
        "--reward",
        "world_ta",
        "--prompt",
        batch.prompts[0],
    )
    assert code == 0 and float(out.split("TA")[1].split()[0]) > 0.5, out + err


def test_parameters_are_given_as_yaml(capsys, folder):
    code, _, err = run(
        capsys,
        "score",
        str(folder / "0.mp4"),
        "--reward",
        "classic",
        "--params",
        "enough_motion=-1",
    )
    assert code == 1 and "enough_motion = -1 must be above 0" in err
    assert (
        "must be key=value"
        in run(capsys, "score", str(folder / "0.mp4"), "--reward", "classic", "--params", "x")[2]
    )


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--reward", "world_ta"], "give --prompt"),
        (["--reward", "hpsv4"], "is unknown; did you mean hpsv"),
    ],
)
def test_what_can_not_be_scored(capsys, folder, args, reason):
    code, _, err = run(capsys, "score", str(folder / "0.mp4"), *args)
    assert code == 1 and reason in err and len(err.splitlines()) == 1


def test_the_miniatures_recipe_passes_its_calibration(capsys, tmp_path):
    code, out, _ = run(
        capsys, "calibrate", "mini", "--count", "8", "--out", str(tmp_path / "c.json")
    )
    record = json.loads((tmp_path / "c.json").read_text())
    assert (
        code == 0
        and set(record["won_and_margin"]) == set(FLAWS)
        and all(
            row["all"][0] >= MUST_WIN
            for flaw, row in record["won_and_margin"].items()
            if flaw not in MAY_PASS
        )
    )
    assert out.splitlines()[0].split()[-4:] == ["VQ", "MQ", "TA", "all"]


def test_a_recipe_that_can_be_cheated_is_told(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("rewards: [{name: world_vq}]\n")
    code, _, err = run(
        capsys,
        "calibrate",
        str(tmp_path / "r.yaml"),
        "--count",
        "8",
        "--out",
        str(tmp_path / "c.json"),
    )
    assert code == 1 and "the combination does not see frozen, " in err


def test_clips_of_ones_own(capsys, folder, tmp_path):
    batches = folder_clips(folder)
    assert [len(b) for b in batches] == [1, 1] and all(
        b.length == FRAMES and b.fps == 16.0 for b in batches
    )
    assert [b.prompts for b in miscaptioned(batches, 0)] == [batches[1].prompts, batches[0].prompts]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "clips.csv is missing: list the clips"),
        ("a,b\n1,2\n", "must have each of the columns file and prompt once"),
        ("file,prompt\n", "lists no clip"),
        ("file,prompt\nno.mp4,x\n", "line 2: there is no file"),
    ],
)
def test_a_folder_that_is_wrong(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "clips.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        folder_clips(tmp_path)


def test_frozen_is_refused_by_weights_too():
    """Motion that hardly counts can not make up for what a still picture gains; nothing is
    refused where there is nothing to try."""
    batches = story_clips(8)
    rewards = [VisualQuality(), MotionQuality()]
    refuse_frozen(rewards, batches, {"VQ": 1.0, "MQ": 1.0})
    with pytest.raises(
        ValueError,
        match=r"won by a frozen picture: only \d+% of 8 good clips .* weights \{'VQ': 1.0, 'MQ': 0.0\}",
    ):
        refuse_frozen(rewards, batches, {"VQ": 1.0, "MQ": 0.0})
    refuse_frozen([VisualQuality()], [], {"VQ": 1.0})


def test_the_combination_has_no_units():
    """A reward in thousands outweighs none in hundredths: each counts by its spread, as in
    training."""
    batches = story_clips(8)

    class Thousands(VisualQuality):
        def measure(self, batch: VideoBatch):
            scores, parts = super().measure(batch)
            return 1000 * scores, parts

    big = Thousands()
    object.__setattr__(big, "spec", replace(big.spec, bounds=(0.0, 1000.0)))
    weights = {"VQ": 1.0, "MQ": 1.0}
    small, large = (
        calibrate([vq, MotionQuality()], batches, weights, flaws=("frozen",))["frozen"]["all"]
        for vq in (VisualQuality(), big)
    )
    assert small.won == large.won == 1.0 and torch.isclose(
        torch.tensor(small.margin), torch.tensor(large.margin), atol=1e-4
    )
