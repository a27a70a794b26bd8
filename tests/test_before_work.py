"""What is wrong is said before anything is loaded or made: prompts, options, names, places."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from test_align import settings, write_recipe
from tiny import BLUE, RED, Warmth

import kvpo
from kvpo.commands import main as cli
from kvpo.commands.vbench import Vbench
from kvpo.config import from_dict
from kvpo.rewards.base import RewardSpec
from kvpo.rewards.registry import RewardEntry
from kvpo.rewards.scorer import make_scorers
from kvpo.runs.loading import named, pipeline_folder


class Spaced(Warmth):
    """A reward whose name no metric can have."""

    def __init__(self):
        self.spec = RewardSpec("how warm/it is", "toy", needs_prompt=False)


@pytest.mark.parametrize(
    "package, message",
    [
        ("matplotlib", r"a run's report needs matplotlib: pip install 'kvpo\[report\]'"),
        ("wandb", "trackers: wandb is not installed; pip install wandb"),
    ],
)
def test_a_run_s_packages_are_looked_for_first(
    folder, tmp_path, monkeypatch, unloaded, package, message
):
    """Without matplotlib, or a tracker's package, `kvpo.align` refused a run only after rewards
    and generator had been loaded."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == package else found(name, *more),
    )
    with pytest.raises(ValueError, match=message):
        trackers = [package] if package == "wandb" else []
        kvpo.align(from_dict(settings(folder, trackers=trackers)), out=tmp_path / "run")


@pytest.fixture
def unloaded(monkeypatch):
    """No weights may be loaded.

    All modules that hold one of the names are imported before the first is replaced: one that was
    imported later kept the replacement, and the tests of the library behind it failed.
    """

    def load(*_, **__):
        raise AssertionError("weights were loaded before the input was checked")

    modules = (
        "api.functions",
        "api.shared",
        "runs.loading",
        "evaluation.ab_pairs",
        "evaluation.vbench",
        "generators.generate",
        "runs.parts",
    )
    for module in modules:
        importlib.import_module(f"kvpo.{module}")
    for module in modules:
        for name in ("load_generator", "load_pipeline", "load_with_texts"):
            monkeypatch.setattr(f"kvpo.{module}.{name}", load, raising=False)


def run(capsys, *argv) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(list(map(str, argv)))
    return code, capsys.readouterr().err.strip()


# --- Prompts ---


def test_every_prompt_of_a_batch_is_tokenised_before_the_first_video(
    capsys, folder, tmp_path, unloaded
):
    """The third story was longer than the encoder reads: it was refused after two videos had been
    made."""
    (tmp_path / "p.txt").write_text(f"{RED}\n{BLUE}\n{'red ' * 60}\n")
    code, err = run(
        capsys, "generate", folder, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "v"
    )
    assert (
        code == 1
        and "p.txt, line 3: the prompt has 61 tokens, but this generator reads 24" in err
        and not (tmp_path / "v").exists()
    )


def test_every_command_that_makes_videos_checks_its_prompts(capsys, folder, tmp_path, unloaded):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": RED})
        + "\n"
        + json.dumps({"prompts": [RED, "red " * 60], "id": "second"})
        + "\n"
    )
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(folder, data={"prompts": str(tmp_path / "p.jsonl"), "blocks": 6}),
    )
    for argv in (
        ("align", recipe, "--out", tmp_path / "v"),
        (
            "evaluate",
            folder,
            "--recipe",
            recipe,
            "--scripts",
            "2",
            "--out",
            tmp_path / "v" / "e.json",
        ),
        ("explore", recipe, "--script", "1", "--out", tmp_path / "v"),
        ("ab", folder, folder, "--recipe", recipe, "--scripts", "2", "--out", tmp_path / "v"),
    ):
        code, err = run(capsys, *argv)
        assert code == 1 and "p.jsonl, line 2, prompt 2: the prompt has 61 tokens" in err, (
            argv,
            err,
        )
    assert not (tmp_path / "v").exists()


def test_words_that_the_generator_does_not_know_are_named(capsys, folder, tmp_path):
    """`a cat walking on the beach` gave an empty wall, and nobody said why."""
    code, err = run(
        capsys,
        "generate",
        folder,
        "--prompt",
        "a red cat walking, on the beach",
        "--blocks",
        "1",
        "--out",
        tmp_path / "v",
    )
    warning = " ".join(err.split())
    assert (
        code == 0
        and "does not know 'cat', 'walking', 'beach'" in warning
        and "tokenizer" in warning
        and "docs/prompts.md" in warning
    )
    code, err = run(
        capsys,
        "generate",
        folder,
        "--prompt",
        RED,
        "Katzen schlafen",
        "--blocks",
        "2",
        "--out",
        tmp_path / "w",
    )
    assert (
        code == 1
        and "--prompt, prompt 2: the generator knows no word of the prompt 'Katzen schlafen'" in err
        and not (tmp_path / "w").exists()
    )


def test_a_half_surrogate_of_the_command_line(capsys, folder):
    """Bytes that are no UTF-8 come in as half surrogates, and ended in the tokenizer's
    traceback."""
    code, err = run(capsys, "generate", folder, "--prompt", "a red \udce9 circle")
    assert code == 1 and "--prompt: the prompt" in err and "half of a surrogate pair" in err
    assert (
        "--prompt: a prompt must be text that is not blank"
        in run(capsys, "generate", folder, "--prompt", "\u200b")[1]
    )


# --- Options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", RED, "--at", "1"), "--at has 1 time for 1 prompt"),
        (("--prompt", RED, BLUE, "--at", "1", "2"), "--at has 2 times for 2 prompts"),
        (
            ("--prompt", RED, "--seeds", "0", "0"),
            "--seeds 0 0: give at least one seed and each once",
        ),
        (("--prompt", RED, "--seconds", "-1"), "--seconds -1 is no length"),
        (("--prompt", RED, "--seconds", "nan"), "--seconds nan is no length"),
        (("--prompt", RED, "--seconds", "2", "--blocks", "4"), "both say how long"),
        (("--prompt", RED, "--blocks", "0"), "at least one block"),
        (("--prompt", RED, "--lora-scale", "2"), "--lora-scale 2 scales the files of --lora"),
        (
            ("--prompt", RED, "--lora", "a", "--lora-scale", "nan"),
            "--lora-scale nan is no strength",
        ),
        (("--prompt", RED, "--lora", "nowhere.pt"), "nowhere.pt does not exist"),
        (("--prompt", RED, "--seconds", "1e6"), "this generator's positions end after 512"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    capsys, folder, tmp_path, unloaded, options, message
):
    """`--seeds 0 0` made one video twice, `--at` beyond the prompts and `--seconds -1` did
    nothing at all."""
    code, err = run(capsys, "generate", folder, *options, "--out", tmp_path / "v")
    assert code == 1 and message in err and not (tmp_path / "v").exists()


def test_a_time_that_no_story_of_a_file_uses_is_refused(capsys, folder, tmp_path, unloaded):
    (tmp_path / "p.txt").write_text(f"2,[{RED}],[{BLUE}]\n")
    code, err = run(
        capsys, "generate", folder, "--prompts", tmp_path / "p.txt", "--at", "0.5", "1.5"
    )
    assert code == 1 and "--at 1.5 would be passed over" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fork", "0"), "block 0 can not be a fork"),
        (("--fork", "99"), "block 99 can not be a fork"),
        (("--fork", "4", "--tries", "2"), "--tries 2 looks for a fork, and --fork 4 gives one"),
    ],
)
def test_a_fork_that_does_not_exist_is_refused_before_loading(
    capsys, folder, tmp_path, unloaded, options, message
):
    """Rewards and generator were loaded, minutes of a real model, and then the fork was refused;
    `--tries` beside `--fork` was passed over."""
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder))
    code, err = run(capsys, "explore", recipe, *options, "--out", tmp_path / "v")
    assert code == 1 and message in err and not (tmp_path / "v").exists()


def test_the_folder_of_a_run_is_looked_at_before_loading(capsys, folder, tmp_path, unloaded):
    """`--resume` without a run, and a second run in the folder of the first, were refused after
    everything had been loaded."""
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder))
    asked = ("align", recipe, "--out", tmp_path / "run")
    assert "holds no run to resume" in run(capsys, *asked, "--resume")[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.resolved.yaml").write_text("steps: 1\n")
    assert "already holds a run" in run(capsys, *asked)[1]


def test_a_video_is_looked_for_before_its_reward_is_loaded(capsys, tmp_path, monkeypatch):
    """20 GiB of weights were loaded for a file that was not there, and it was then called no
    readable video, to be written again."""

    def load(*_):
        raise AssertionError("the reward was loaded before its input was looked for")

    monkeypatch.setattr("kvpo.rewards.scorer.load_rewards", load)
    missing = tmp_path / "v.mp4"
    code, err = run(capsys, "rewards", "score", missing, "--reward", "world_vq", "--prompt", RED)
    assert code == 1 and f"{missing} is no file; give the path of a video" in err
    code, err = run(capsys, "rewards", "calibrate", "mini", "--clips", tmp_path)
    assert code == 1 and "clips.csv is missing" in err


def test_only_the_setting_that_is_wrong_is_named(capsys, tmp_path):
    """`kvpo ab --scripts 0` answered with five settings, and the wrong one was the last."""
    code, err = run(capsys, "ab", "mini", "mini", "--scripts", "0", "--out", tmp_path / "ab")
    assert code == 1 and err == "kvpo ab: evaluate.scripts = 0 must be 2 or more"


def test_equal_seeds_of_vbench_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--seeds 0 0: give at least one seed and each once"):
        Vbench("mini", tmp_path / "p.txt", seeds=(0, 0)).chosen()


def test_other_commands_refuse_what_they_would_pass_over(capsys, tmp_path):
    assert (
        "--override lets a resumed run take other settings"
        in run(capsys, "align", "mini", "--override", "--out", tmp_path / "run")[1]
    )
    assert (
        "--seconds -1 is no length of a clip"
        in run(
            capsys,
            "rewards",
            "score",
            tmp_path / "v.mp4",
            "--reward",
            "world_vq",
            "--seconds",
            "-1",
        )[1]
    )
    assert (
        "--count 3 is of the miniature's clips"
        in run(capsys, "rewards", "calibrate", "mini", "--clips", tmp_path, "--count", "3")[1]
    )


# --- Names and places ---


def test_a_reward_s_name_is_checked_when_it_is_read(monkeypatch):
    """A name with a blank or a slash fits no metric: the first step was made, and lost when it
    was logged."""
    with pytest.raises(
        ValueError, match="reward 'how warm/it is' can not be logged under that name"
    ):
        make_scorers([RewardEntry("test_before_work:Spaced")])


@pytest.mark.parametrize("command", ["generate", "evaluate", "explore", "ab"])
def test_output_folders_are_tried_first(capsys, folder, tmp_path, unloaded, command):
    """A file where the folder should be was found out after the first video had been made."""
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder))
    (tmp_path / "file").write_text("")
    argv = {
        "generate": (folder, "--prompt", RED),
        "evaluate": (folder, "--recipe", recipe, "--scripts", "2"),
        "explore": (recipe,),
        "ab": (folder, folder, "--recipe", recipe, "--scripts", "2"),
    }[command]
    code, err = run(capsys, command, *argv, "--out", tmp_path / "file" / "v")
    assert (
        code == 1
        and f"nothing can be written into {tmp_path / 'file'}" in err
        and "is no folder" in err
        and "--out" in err
    )


# --- Colons ---


def test_a_colon_in_a_run_s_name(tmp_path):
    """RUN:WEIGHTS was cut at the first colon: a run named by its time could not be loaded, and a
    folder `a:ema` not at all."""
    stamp, plain, odd = (tmp_path / name for name in ("2026-01-01T12:30", "run", "run:ema"))
    for folder in (stamp, plain):
        folder.mkdir()
        (folder / "config.resolved.yaml").write_text("pipeline: mini\n")
    assert named(f"{stamp}:ema") == (stamp, "ema") and named(str(stamp)) == (stamp, "")
    assert named(f"{plain}:ema") == (plain, "ema") and named(f"{plain}:emma") == (plain, "emma")
    odd.mkdir()
    assert named(f"{plain}:ema") == (odd, ""), "a folder of the whole name wins"
    assert pipeline_folder(f"{stamp}:ema") == pipeline_folder("mini")


# --- The terminal ---


def made_with(stdout, folder, out, **environment) -> subprocess.CompletedProcess:
    """`kvpo generate` of two videos in a process of its own, its prints going to ``stdout``."""
    argv = [
        sys.executable,
        "-m",
        "kvpo",
        "generate",
        str(folder),
        "--prompt",
        RED,
        "it turns blue \u732b",
        "--blocks",
        "2",
        "--seeds",
        "0",
        "1",
        "--out",
        str(out),
    ]
    return subprocess.run(
        argv, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment, text=True
    )


@pytest.mark.slow
def test_a_terminal_of_another_encoding_does_not_end_a_batch(folder, tmp_path):
    """The first video was written, then the print of its prompt failed, and the second was not
    made."""
    done = made_with(subprocess.PIPE, folder, tmp_path, PYTHONIOENCODING="ascii")
    assert (
        done.returncode == 0 and len(list(tmp_path.glob("*.mp4"))) == 2 and "\\u732b" in done.stdout
    ), done.stderr


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_does_not_end_a_batch(folder, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = made_with(write, folder, tmp_path)
    os.close(write)
    assert (
        done.returncode == 0
        and len(list(tmp_path.glob("*.mp4"))) == 2
        and "Traceback" not in done.stderr
    )
