"""The whole loop on the tiny generator: reproducible, resumable bit for bit, and stopped by
nothing half-way."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import BLUE, RED, Warmth, story

from kvpo.commands import main as cli
from kvpo.common.files import only_writer
from kvpo.common.metric_log import read_metrics
from kvpo.common.progress import Progress
from kvpo.config import from_dict
from kvpo.method.update import Updater
from kvpo.policy.checkpoint import checkpoints, read_tensors
from kvpo.rewards.base import RewardSpec
from kvpo.rewards.measured import scored
from kvpo.runs.build import evaluation_scripts, script_source, unseen
from kvpo.runs.monitor import Trials
from kvpo.runs.parts import Parts
from kvpo.train import Alignment

CLOCK = ("unix_time", "time/", "memory/")


def settings(folder: Path, **changes) -> dict:
    """A recipe of seconds; videos and TensorBoard, which take longer than the training, by asking."""
    return {
        "pipeline": str(folder),
        "steps": 4,
        "groups": 1,
        "show_every": 0,
        "device": "cpu",
        "rewards": [{"name": "tiny:Warmth"}, {"name": "tiny:Change", "weight": 0.5}],
        "data": {"blocks": 6},
        "rollout": {"branches": 3, "cache_frames": 12},
        "kv_routing": {"window_blocks": 2},
        "score": {"clip_frames": 8, "min_frames": 4},
        "evaluate": {"scripts": 2, "batch": 2, "videos": 0},
        "trackers": [],
        "checkpoint": {"every": 1, "keep": 2},
        "optimizer": {"lr": 1e-3, "warmup": 2},
        "policy": {"train": "full", "sync_interval": 2},
    } | changes


def write_recipe(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_stories_have_as_many_prompts_as_asked():
    config = from_dict({"data": {"segments": 4}, "evaluate": {"scripts": 16}})
    assert {len(script_source(config).script(0, i).texts) for i in range(6)} == {4}
    assert {len(s.texts) for s in evaluation_scripts(config)} == {4}, "what is trained is measured"


@pytest.fixture
def recipe(folder, tmp_path):
    return write_recipe(tmp_path / "tiny.yaml", settings(folder))


def align(recipe: str, out: Path, *options: str, drawn: bool = False) -> int:
    """Run `kvpo align` in this process.

    The report has all its charts, but only where they are ``drawn`` are there curves in them: to
    draw them takes longer than to train the tiny generator.
    """
    with pytest.MonkeyPatch.context() as patched:
        if not drawn:
            patched.setattr("kvpo.report.curves.svg", lambda picture, label: "<svg></svg>")
        return cli.main(["align", recipe, "--out", str(out), *options])


def final(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoints(out / "checkpoints")[-1])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(out: Path, evaluations: bool = True) -> list[dict[str, float]]:
    """The log without what a clock or the operating system decides."""
    kept = [
        r
        for r in read_metrics(out / "metrics.jsonl")
        if evaluations or not any(k.startswith("eval/") for k in r)
    ]
    return [{k: v for k, v in r.items() if not k.startswith(CLOCK)} for r in kept]


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """An uninterrupted run of 4 steps, its recipe, and the seconds of a step."""
    home = tmp_path_factory.mktemp("straight")
    path = write_recipe(home / "tiny.yaml", settings(folder))
    assert align(path, home / "run") == 0
    return home / "run", path, read_metrics(home / "run" / "metrics.jsonl")[1]["time/total"]


# --- What a run leaves behind ---


def test_a_run_leaves_everything(folder, tmp_path):
    """Its report has curves and videos, and TensorBoard has them too."""
    evaluate = {"scripts": 2, "batch": 2, "videos": 1, "online": True}
    shown = {"show_every": 3, "evaluate": evaluate, "trackers": ["tensorboard"]}
    out = tmp_path / "run"
    assert align(write_recipe(tmp_path / "r.yaml", settings(folder, **shown)), out, drawn=True) == 0
    assert "<path" in (out / "report.html").read_text() and any(out.glob("tensorboard/*tfevents*"))
    for name in (
        "config.resolved.yaml",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "groups/step-000003/group.json",
        "groups/step-000000/grid.mp4",
        "evaluation/ema-step-000004.json",
    ):
        assert (out / name).stat().st_size > 0, name
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-000003", "step-000004"]
    assert sorted(p.name for p in (out / "samples" / "step-000004").iterdir()) == [
        "ema-00.mp4",
        "index.json",
        "online-00.mp4",
    ]
    assert not list(out.rglob("*.part"))
    log = records(out)
    assert [r["step"] for r in log] == [0, 1, 2, 3, 3] and any(
        k.startswith("eval/ema/") for k in log[-1]
    )
    assert all(
        {
            "loss/policy",
            "optim/grad_norm",
            "policy/tau",
            "reward/local/Warmth/mean",
            "calls/generator",
        }
        <= r.keys()
        for r in log[:4]
    )
    moved = final(out)
    assert any(
        not torch.equal(moved[k], moved[k.replace("current.", "reference.")])
        for k in moved
        if k.startswith("current.")
    )
    assert [r["policy/lag"] for r in log[:4]] == [0, 1, 0, 1] and log[1][
        "loss/ratio_min"
    ] < 1.0 < log[1]["loss/ratio_max"]


def test_resume_is_the_uninterrupted_run(straight, tmp_path):
    """Two steps, then two more in another process's memory, against four in one go: the same
    seed, the same run, bit for bit."""
    out, recipe, _ = straight
    assert align(recipe, tmp_path / "run", "--steps", "2") == 0
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(out))
    assert records(tmp_path / "run", evaluations=False) == records(out, evaluations=False)
    assert records(tmp_path / "run")[-1] == records(out)[-1], "and the last evaluation"
    assert yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())["steps"] == 4, (
        "the folder says what was asked last"
    )


def test_a_renamed_prompt_file_is_asked_for_by_its_name(folder, tmp_path, capsys):
    """Its ids hold its name, so it is refused; the error was two digests that differ. Where every
    prompt has an id, the name is nobody's matter."""
    for name, text in (
        ("p.txt", f"{RED}\n{BLUE}\n"),
        ("q.jsonl", "".join(f'{{"id": "{i}", "prompt": "{RED}"}}\n' for i in range(2))),
    ):
        path = tmp_path / name
        out = tmp_path / f"run-{path.stem}"
        path.write_text(text)
        content = settings(folder, steps=2, data={"prompts": str(path), "blocks": 6})
        recipe = write_recipe(tmp_path / "r.yaml", content)
        assert align(recipe, out, "--steps", "1") == 0
        new = path.rename(tmp_path / f"new-{name}")
        again = ("--resume", "--data.prompts", str(new))
        if name == "p.txt":
            assert f"{new} is the prompt file of {out} by another name, and prompts without" in (
                said := refused(recipe, out, capsys, *again)
            )
            assert "call it p.txt again" in said
        else:
            assert align(recipe, out, *again) == 0


@pytest.mark.parametrize("old", [False, True], ids=["run", "run before digests of files"])
def test_a_run_whose_prompt_file_moved_resumes(folder, tmp_path, capsys, old):
    """The same file in another folder was another run: `data.prompts: a/p.txt -> b/p.txt`."""
    for name, text in (
        ("a", f"{RED}\n{BLUE}\n"),
        ("b", f"{RED}\n{BLUE}\n"),
        ("c", f"{RED}\n{RED}\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text(text)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(folder, steps=2, data={"prompts": str(tmp_path / "a" / "p.txt"), "blocks": 6}),
    )
    assert align(recipe, tmp_path / "run", "--steps", "1") == 0
    if old:
        facts = tmp_path / "run" / "environment.json"
        facts.write_text(
            json.dumps(
                {k: v for k, v in json.loads(facts.read_text()).items() if k != "prompt_files"}
            )
        )
    (tmp_path / "a" / "p.txt").unlink()
    assert (
        align(recipe, tmp_path / "run", "--resume", "--data.prompts", str(tmp_path / "c" / "p.txt"))
        == 1
    )
    assert "was run with other settings, data.prompts" in capsys.readouterr().err
    assert (
        align(recipe, tmp_path / "run", "--resume", "--data.prompts", str(tmp_path / "b" / "p.txt"))
        == 0
    )
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step-000002"


def test_a_run_that_is_older_than_a_setting_resumes(straight, tmp_path):
    """Every new setting once made all runs before it unresumable, although its default is what
    they did."""
    out, recipe, _ = straight
    assert align(recipe, tmp_path / "run", "--steps", "2") == 0
    for path, read, write in (
        (tmp_path / "run" / "config.resolved.yaml", yaml.safe_load, yaml.safe_dump),
        (checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json", json.loads, json.dumps),
    ):
        content = read(path.read_text())
        del (
            content.get("config", content)["dtype"],
            content.get("config", content)["score"]["segments"],
        )
        path.write_text(write(content))
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(out))
    assert align(recipe, tmp_path / "run", "--resume", "--dtype", "bfloat16") == 1, (
        "and is refused where the new setting has another value"
    )


@pytest.mark.parametrize("train", ["lora", "full"])
def test_in_half_precision_weights_move_and_resume(folder, tmp_path, train):
    """bf16 computes, float32 is trained: at lr 1e-6 no bf16 weight would move, and a resumed run
    has the masters back, not their roundings."""
    changes = {
        "dtype": "bfloat16",
        "policy": {"train": train, "rank": 2},
        "optimizer": {"lr": 1e-6, "warmup": 1},
    }
    recipe = write_recipe(tmp_path / "half.yaml", settings(folder, steps=3, **changes))
    assert align(recipe, tmp_path / "straight") == 0
    assert align(recipe, tmp_path / "run", "--steps", "1") == 0
    assert align(recipe, tmp_path / "run", "--resume") == 0
    tensors = final(tmp_path / "straight")
    assert equal(final(tmp_path / "run"), tensors)
    moved = [
        n
        for n in tensors
        if n.startswith("current.")
        and not torch.equal(tensors[n], tensors[n.replace("current.", "reference.")])
    ]
    assert {t.dtype for t in tensors.values()} == {torch.float32} and len(moved) > 0.3 * sum(
        n.startswith("current.") for n in tensors
    )
    if train == "full":
        same = [
            (tensors[n].bfloat16() == tensors[n.replace("current.", "reference.")].bfloat16())
            .float()
            .mean()
            for n in moved
        ]
        assert sum(same) / len(same) > 0.9, "in bf16 almost nothing would have"


def test_checkpointed_activations_give_the_same_run(straight, recipe, tmp_path):
    """The setting once switched the flag alone, without the function that does it: the first
    gradient failed."""
    out, *_ = straight
    assert align(recipe, tmp_path / "run", "--gradient-checkpointing", "--steps", "2") == 0
    assert records(tmp_path / "run", evaluations=False) == records(out, evaluations=False)[:2]


def test_more_evaluations_and_rewards_change_no_draw(straight, folder, tmp_path):
    """An evaluation after every step, an evaluator beside the rewards, a reward of weight 0,
    pictures: the weights stay the same numbers."""
    out, *_ = straight
    rewards = [
        {"name": "tiny:Warmth"},
        {"name": "tiny:Change", "weight": 0.5},
        {"name": "test_align:Constant", "weight": 0.0},
        {"name": "test_align:Judge", "role": "eval"},
    ]
    evaluate = {"scripts": 2, "batch": 2, "videos": 0, "every": 1, "seed": 5}
    path = write_recipe(
        tmp_path / "more.yaml", settings(folder, steps=2, rewards=rewards, evaluate=evaluate)
    )
    assert align(path, tmp_path / "run") == 0
    few = records(out, evaluations=False)[:2]
    for a, b in zip(records(tmp_path / "run", evaluations=False), few, strict=True):
        assert {k: v for k, v in a.items() if "Constant" not in k} == b


@dataclass
class Constant(Warmth):
    """Says the same of everything."""

    spec: RewardSpec = RewardSpec("Constant", "toy", needs_prompt=False)

    def score(self, batch):
        return scored(self.spec, batch, lambda b: (torch.full((len(b),), 0.5), {}))


@dataclass
class Judge(Warmth):
    """An evaluator with a name of its own."""

    spec: RewardSpec = RewardSpec("Judge", "other", needs_prompt=False)


# --- Killed, interrupted, out of disk ---


def forked(
    recipe: str,
    out: Path,
    *options: str,
    kill_when: Callable[[], bool] | None = None,
    delay: float = 0.0,
) -> int:
    """A real process: its exit code, -9 where it was killed, ``delay`` seconds after
    ``kill_when`` came true."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = align(recipe, out, *options)
        finally:
            os._exit(code)
    done, status = (0, 0) if kill_when else os.waitpid(pid, 0)
    while not done and not kill_when():
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        time.sleep(delay)
        # a process that has just ended by itself is there until it is waited for
        os.kill(pid, signal.SIGKILL)
        done, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def killed_again_and_again(recipe: str, out: Path, instants: list[tuple[int, float]]) -> int:
    """Kill at each instant (records in the log, seconds after the last of them), go on, and let
    the last one through; how often a kill really hit."""

    def logged(count: int) -> bool:
        path = out / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    hits = 0
    for count, delay in [*instants, (None, 0.0)]:
        options = ["--resume"] if (out / "config.resolved.yaml").exists() else []
        code = forked(
            recipe,
            out,
            *options,
            kill_when=None if count is None else lambda: logged(count),  # noqa: B023, called at once
            delay=delay,
        )
        hits += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
    return hits


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_instant_and_resumed(straight, tmp_path):
    """Before the first checkpoint is through, and before the last but one is."""
    out, recipe, _ = straight
    assert killed_again_and_again(recipe, tmp_path / "run", [(1, 0.0), (3, 0.0)]) == 2
    assert equal(final(tmp_path / "run"), final(out))
    assert records(tmp_path / "run", evaluations=False) == records(out, evaluations=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_twenty_times_and_resumed(straight, folder, tmp_path):
    """At random instants from the first line of the log to the last evaluation, also while
    pictures are written."""
    out, _, step = straight
    evaluate = {"scripts": 2, "batch": 2, "videos": 1}
    shown = settings(folder, show_every=3, evaluate=evaluate, trackers=["tensorboard"])
    recipe = write_recipe(tmp_path / "shown.yaml", shown)
    draw = random.Random(0)
    hits = 0
    for i in range(20):
        run = tmp_path / f"{i}"
        hits += killed_again_and_again(
            recipe, run, [(draw.randrange(5), draw.uniform(0.0, 1.2) * step)]
        )
        assert equal(final(run), final(out)), f"run {i}"
        shutil.rmtree(run)
    assert hits >= 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_pre_emption(straight, tmp_path, monkeypatch, capsys, number):
    """In the middle of a step: the step is given up, those before it are saved although no
    checkpoint was due, the exit code is 0; resuming is the uninterrupted run."""
    out, recipe, _ = straight
    group = Alignment.group
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(self, *args, **options):
        if self.done == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return group(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Alignment, "group", interrupted)
        assert align(recipe, tmp_path / "run", "--checkpoint.every", "9") == 0
    said = capsys.readouterr().out
    assert (
        f"stopped by {number.name}; 2 steps are done and saved. Go on by the same command with --resume"
        in said
    )
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000002"
    ] and len(records(tmp_path / "run")) == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert align(recipe, tmp_path / "run", "--checkpoint.every", "9", "--resume") == 0
    assert (
        equal(final(tmp_path / "run"), final(out))
        and records(tmp_path / "run")[-1] == records(out)[-1]
    )


def test_stopped_before_anything_is_done(recipe, tmp_path, monkeypatch, capsys):
    """There is nothing to save; resuming begins."""
    monkeypatch.setattr(
        Parts,
        "embed",
        lambda self, script: (
            os.kill(os.getpid(), signal.SIGTERM) or self.pipeline.encode_text(script.texts)
        ),
    )
    assert align(recipe, tmp_path / "run") == 0
    assert "0 steps are done and saved" in capsys.readouterr().out and not checkpoints(
        tmp_path / "run" / "checkpoints"
    )


def test_stopped_while_it_is_made_ready(recipe, tmp_path, monkeypatch, capsys):
    """Weights of billions of numbers take minutes to load; nobody waits for them to be told that
    it is over."""
    load, handler = Parts._load_pipeline, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        Parts, "_load_pipeline", lambda self: os.kill(os.getpid(), signal.SIGTERM) or load(self)
    )
    assert align(recipe, tmp_path / "run") == 0
    assert (
        capsys.readouterr().out.splitlines()[1:] == ["stopped by SIGTERM; nothing was begun"]
        and not (tmp_path / "run").exists()
        and signal.getsignal(signal.SIGTERM) is handler
    )


def test_stopped_with_a_full_disk(recipe, tmp_path, monkeypatch, capsys):
    """What could not be saved is not called saved."""
    group = Alignment.group

    def interrupted(self, *args, **options):
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return group(self, *args, **options)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Alignment, "group", interrupted)
    monkeypatch.setattr("kvpo.policy.checkpoint.save_file", full)
    assert align(recipe, tmp_path / "run", "--checkpoint.every", "9") == 1
    said = capsys.readouterr()
    assert "step-000002 could not be written" in said.err and "are done and saved" not in said.out


def test_stopped_in_an_evaluation(straight, tmp_path, monkeypatch, capsys):
    """All steps are saved by then; resuming makes the evaluation."""
    out, recipe, _ = straight
    evaluate = Trials.evaluate
    with monkeypatch.context() as patched:
        patched.setattr(
            Trials,
            "evaluate",
            lambda self, done: os.kill(os.getpid(), signal.SIGTERM) or evaluate(self, done),
        )
        assert align(recipe, tmp_path / "run") == 0
    assert (
        "4 steps are done and saved" in capsys.readouterr().out
        and not (tmp_path / "run" / "report.html").exists()
    )
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert records(tmp_path / "run") == records(out)


def test_other_versions_are_named(straight, tmp_path, capsys):
    """A run goes on under another torch, but then it is not the uninterrupted run bit for bit."""
    out, recipe, _ = straight
    shutil.copytree(out, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000004" / "state.json"
    state = json.loads(path.read_text())
    assert state["packages"]["torch"] == version("torch")
    path.write_text(json.dumps(state | {"packages": state["packages"] | {"torch": "1.0"}}))
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert (
        f"written with other versions, torch: 1.0 -> {version('torch')}: numbers may round otherwise"
        in capsys.readouterr().out.replace("\n", "")
    )


def test_killed_before_the_last_evaluation(straight, tmp_path):
    """All steps are done, the evaluation is not: resuming makes it."""
    out, recipe, _ = straight
    shutil.copytree(out, tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(log[:-1]))
    shutil.rmtree(tmp_path / "run" / "evaluation")
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert (
        records(tmp_path / "run") == records(out)
        and (tmp_path / "run" / "evaluation" / "ema-step-000004.json").exists()
    )


def test_killed_in_an_evaluation_on_the_way(folder, tmp_path, monkeypatch):
    """After the checkpoint of step 1, inside its evaluation: it was lost once, now resuming
    makes it first."""
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(folder, steps=2, evaluate={"scripts": 2, "batch": 2, "videos": 1, "every": 1}),
    )
    whole, evaluate = tmp_path / "whole", Trials.evaluate
    assert align(recipe, whole) == 0

    def interrupted(self, done):
        raise KeyboardInterrupt if done == 1 else AssertionError("the run goes on after a kill")

    with monkeypatch.context() as patched:
        patched.setattr(Trials, "evaluate", interrupted)
        assert align(recipe, tmp_path / "run") == 130
    assert Trials.evaluate is evaluate and align(recipe, tmp_path / "run", "--resume") == 0
    assert records(tmp_path / "run") == records(whole) and len(records(whole)) == 4


def test_a_full_disk(recipe, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvpo.policy.checkpoint.save_file", full)
    assert align(recipe, tmp_path / "run", "--steps", "1") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert (
        line.startswith("kvpo align: checkpoint ")
        and "No space left on device" in line
        and "--resume" in line
    )
    assert checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_disk_that_becomes_full(straight, tmp_path, monkeypatch, capsys):
    """In the second checkpoint, half-way through its file: the first one stays, the run says so,
    and goes on once there is room."""
    from kvpo.policy.checkpoint import save_file

    def fills_up(tensors, path):
        save_file(tensors, path)
        if "000002" in str(path):
            os.truncate(path, 1000)
            raise OSError(28, "No space left on device")

    out, recipe, _ = straight
    with monkeypatch.context() as patched:
        patched.setattr("kvpo.policy.checkpoint.save_file", fills_up)
        assert (
            "step-000002 could not be written ([Errno 28] No space left on device); the ones before it are untouched"
            in refused(recipe, tmp_path / "run", capsys)
        )
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "ema.safetensors",
        "step-000001",
    ]
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(out))


# --- What is refused ---


def refused(recipe: str, out: Path, capsys, *options: str) -> str:
    """The one line that an error is."""
    capsys.readouterr()
    assert align(recipe, out, *options) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvpo align: ")]
    assert len(err) == 1
    return err[0]


def test_a_folder_that_holds_a_run(straight, capsys):
    out, recipe, _ = straight
    before = (out / "metrics.jsonl").read_bytes()
    assert (
        "already holds a run; go on with it by --resume, or choose another folder by --out"
        in refused(recipe, out, capsys)
    )
    assert (out / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(recipe, tmp_path, capsys):
    assert "holds no run to resume; start one without --resume" in refused(
        recipe, tmp_path / "nowhere", capsys, "--resume"
    )


def test_resuming_with_other_settings(straight, capsys):
    out, recipe, _ = straight
    line = refused(recipe, out, capsys, "--resume", "--optimizer.lr", "0.01", "--context", "self")
    assert (
        "was run with other settings, context: branch -> self; optimizer.lr: 0.001 -> 0.01; resume with its own, or start a new run by --out"
        in line
    )


def test_override(straight, tmp_path, capsys):
    """What training does not depend on may change, once asked for, and `steps` unasked; the lr
    may not. The run's folder then says the new settings, and needs no asking again."""
    out, recipe, _ = straight
    run = shutil.copytree(out, tmp_path / "run")
    more = ["--resume", "--steps", "5", "--checkpoint.keep", "3"]
    line = refused(recipe, run, capsys, *more)
    assert (
        "was run with other settings, checkpoint.keep: 2 -> 3; resume with its own, or let them change from here on by --override"
        in line
    )
    line = refused(recipe, run, capsys, *more, "--override", "--optimizer.lr", "0.01")
    assert (
        "was run with other settings, optimizer.lr: 0.001 -> 0.01; resume with its own, or start a new run by --out"
        in line
    )
    assert align(recipe, run, *more, "--override") == 0
    assert "from here on checkpoint.keep: 2 -> 3; steps: 4 -> 5" in capsys.readouterr().out.replace(
        "\n", " "
    )
    assert align(recipe, run, *more) == 0 and len(checkpoints(run / "checkpoints")) == 3


def test_one_run_at_a_time_in_a_folder(straight, tmp_path, capsys):
    """A run whose torchrun was killed may still be at work there."""
    out, recipe, _ = straight
    run = shutil.copytree(out, tmp_path / "run")
    with only_writer(run):
        assert (
            f"another process is at work on the run in {run}; wait until it has ended"
            in refused(recipe, run, capsys, "--resume")
        )
    assert align(recipe, run, "--resume") == 0


@pytest.mark.parametrize("job", ["mine", "other"])
def test_torchrun_goes_on_with_its_own_job_only(straight, tmp_path, capsys, monkeypatch, job):
    """A restart once went on with whatever lay in the folder, though the first start had been
    refused for it."""
    out, recipe, _ = straight
    run = shutil.copytree(out, tmp_path / "run")
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(facts | {"torchrun": "mine"}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    if job == "mine":
        assert align(recipe, run) == 0 and "resumed from" in capsys.readouterr().out
        assert json.loads((run / "environment.json").read_text())["resumed"][0]["step"] == 4
    else:
        assert "already holds a run" in refused(recipe, run, capsys)


def test_resuming_in_another_world(straight, tmp_path, capsys, monkeypatch):
    out, recipe, _ = straight
    shutil.copytree(out, tmp_path / "run")
    monkeypatch.setattr(
        "kvpo.mini.source.StorySource.script",
        lambda self, step, index: story(6, id=f"other {step} {index}"),
    )
    assert "was run with other settings, first_script: " in refused(
        recipe, tmp_path / "run", capsys, "--resume"
    )


def test_resuming_behind_the_checkpoint(straight, tmp_path, capsys):
    out, recipe, _ = straight
    run = shutil.copytree(out, tmp_path / "run")
    assert "step-000004 is beyond steps = 2; set steps to 4 or more" in refused(
        recipe, run, capsys, "--resume", "--steps", "2"
    )
    assert (run / "config.resolved.yaml").read_bytes() == (
        out / "config.resolved.yaml"
    ).read_bytes(), "what was refused is not what the run says it is"


def test_a_broken_newest_checkpoint_is_named(straight, tmp_path, capsys):
    """And the one before it is used; the run then writes the broken one anew."""
    out, recipe, _ = straight
    shutil.copytree(out, tmp_path / "run")
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    path = newest / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert align(recipe, tmp_path / "run", "--resume") == 0
    said = capsys.readouterr().out
    assert (
        f"{path} is broken or missing" in said
        and f"resumed from {newest.parent / 'step-000003'}" in said.replace("\n", "")
    )
    assert equal(final(tmp_path / "run"), final(out))


def test_content_that_has_changed_is_named(straight, tmp_path, capsys):
    """A bit of the disk's: the file's length and header are as they were."""
    out, recipe, _ = straight
    run = shutil.copytree(out, tmp_path / "run")
    path = checkpoints(run / "checkpoints")[-1] / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert align(recipe, run, "--resume") == 0
    assert (
        f"{path} is broken or missing (its content has changed since it was written"
        in capsys.readouterr().out.replace("\n", "")
    )
    assert equal(final(run), final(out))


@pytest.mark.parametrize("train", ["full", "lora"])
def test_resuming_on_other_weights(folder, tmp_path, capsys, train):
    """Also where an adapter is trained: its own start values say nothing of the backbone below
    it."""
    shutil.copytree(folder, tmp_path / "pipeline")
    content = settings(
        tmp_path / "pipeline",
        steps=1,
        policy={"train": train, "rank": 2},
        evaluate={"scripts": 2, "videos": 0},
    )
    recipe = write_recipe(tmp_path / "r.yaml", content)
    assert align(recipe, tmp_path / "run") == 0
    (weights,) = (tmp_path / "pipeline" / "transformer").glob("*.safetensors")
    state = load_file(weights)
    state["blocks.0.ffn.net.2.bias"][0] += 0.01
    save_file(state, weights, metadata={"format": "pt"})
    assert "was run with other settings, start_weights: " in refused(
        recipe, tmp_path / "run", capsys, "--resume", "--steps", "2"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--kv-routing.window-blocks", "7"],
            "window longer than the video: window_blocks = 7, the video has 6 blocks",
        ),
        (["--kv-routing.window-blocks", "4"], "no block can be a fork"),
        (
            ["--rollout.cache-frames", "7"],
            "rollout.cache_frames = 7, but this generator (sink 1, window 7) streams 6 blocks from a cache of at least 8",
        ),
        (["--kv-routing.nearest", "4"], "no room for routed frames"),
        (["--data.blocks", "3"], "blocks = 3 is too short for stories of up to 4 segments"),
        (["--data.prompts", "nowhere.txt"], "nowhere.txt"),
        (["--pipeline", "nowhere"], "nowhere is no pipeline folder"),
        (["--device", "tpu9"], "device = 'tpu9' is unknown"),
    ],
)
def test_what_can_not_work_is_said_before_the_folder_is_made(
    recipe, tmp_path, capsys, options, message
):
    assert message in refused(recipe, tmp_path / "run", capsys, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts in it"),
        ("3,[a cat],[a dog]\n", "line 1"),
        ("7,[a],[b],[c],[d],[e],[f],[g]\n", "7 segments in a video of 6 blocks"),
    ],
    ids=["empty", "malformed", "more segments than blocks"],
)
def test_a_prompt_file_that_is_wrong(recipe, tmp_path, capsys, text, message):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    line = refused(recipe, tmp_path / "run", capsys, "--data.prompts", str(path))
    assert str(path) in line and message in line and not (tmp_path / "run").exists()


def test_a_prompt_file(folder, tmp_path, capsys):
    """A run goes on with the prompts it was begun with, and with the decoder whose pixels were
    rewarded."""
    path = tmp_path / "prompts.txt"
    path.write_text(
        "2,[a red circle rises slowly],[it turns blue]\n3,[a small square],[it moves left],[it rises]\n"
    )
    shutil.copytree(folder, tmp_path / "pipeline")
    content = settings(
        tmp_path / "pipeline",
        steps=1,
        data={"prompts": str(path), "blocks": 6},
        policy={"train": "lora", "rank": 2},
    )
    recipe = write_recipe(tmp_path / "r.yaml", content)
    assert align(recipe, tmp_path / "run") == 0
    assert len(records(tmp_path / "run")) == 2
    before = path.read_text()
    path.write_text(before.replace("it rises", "it falls"))
    assert "prompts: " in refused(recipe, tmp_path / "run", capsys, "--resume", "--steps", "2")
    path.write_text(before)
    (weights,) = (tmp_path / "pipeline" / "vae").glob("*.safetensors")
    state = load_file(weights)
    state["decoder.conv_out.bias"][0] += 0.01
    save_file(state, weights, metadata={"format": "pt"})
    assert "was run with other settings, decoder: " in refused(
        recipe, tmp_path / "run", capsys, "--resume", "--steps", "2"
    )


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("Broken", "step 0, group 0: reward 'Warmth': clip 0 = nan"),
        ("Unmeasured", "8 groups in a row could not be measured"),
    ],
)
def test_rewards_that_are_no_numbers(folder, tmp_path, capsys, reward, message):
    (tmp_path / "prompts.txt").write_text("a red circle rises slowly\n")
    data = {"prompts": str(tmp_path / "prompts.txt"), "blocks": 6}
    changes = {
        "rewards": [{"name": f"tiny:{reward}"}],
        "data": data,
        "groups": 8,
        "kv_routing": {"window_blocks": 1},
        "score": {"clip_frames": 8, "min_frames": 4, "segments": 0},
    }
    line = refused(
        write_recipe(tmp_path / "r.yaml", settings(folder, **changes)), tmp_path / "run", capsys
    )
    assert message in line and (
        "Nothing of this step was applied" in line or reward == "Unmeasured"
    )
    assert checkpoints(tmp_path / "run" / "checkpoints") == [] and records(tmp_path / "run") == []


@pytest.mark.parametrize("error", [ValueError, FloatingPointError])
def test_what_was_trained_before_a_number_that_is_none_is_saved(
    straight, tmp_path, capsys, monkeypatch, error
):
    """In the third step, with no checkpoint due before the ninth: the two steps before were lost
    once."""
    out, recipe, _ = straight
    where, name = (Alignment, "group") if error is ValueError else (Updater, "step")
    work, calls = getattr(where, name), []

    def broken(self, *args, **options):
        calls.append(1)
        if (self.done if error is ValueError else self.policy.updates) == 2:
            raise error("gradient norm is nan")
        return work(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, broken)
        assert "gradient norm is nan" in refused(
            recipe, tmp_path / "run", capsys, "--checkpoint.every", "9"
        )
    assert calls and [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000002"
    ]
    assert align(recipe, tmp_path / "run", "--checkpoint.every", "9", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(out))


def test_rewards_that_a_frozen_picture_wins_are_refused(folder, tmp_path, capsys):
    """Before anything is trained, and before anything is written."""
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder, rewards=[{"name": "tiny:Warmth"}]))
    line = refused(recipe, tmp_path / "run", capsys)
    assert (
        "these rewards can be won by a frozen picture: only" in line
        and "Add a reward for motion" in line
    )
    assert not (tmp_path / "run").exists()


def test_an_evaluator_of_a_trained_family_is_refused(folder, tmp_path, capsys):
    rewards = [
        {"name": "tiny:Change"},
        {"name": "tiny:Warmth"},
        {"name": "tiny:Unmeasured", "role": "eval"},
    ]
    line = refused(
        write_recipe(tmp_path / "r.yaml", settings(folder, rewards=rewards)),
        tmp_path / "run",
        capsys,
    )
    assert (
        "reward 'Unmeasured' (role eval) is of family 'toy' like 'Warmth', which is trained on: it is not held out"
        in line
    )


def test_a_gradient_that_is_not_finite(recipe, tmp_path, capsys, monkeypatch):
    """After a good step: its checkpoint stays, the bad step leaves nothing."""
    from kvpo.method.update import Updater

    step = Updater.step

    def spoiled(self, last):
        if self.policy.updates == 1:
            self.policy.parameters[3].grad.fill_(float("inf"))
        return step(self, last)

    monkeypatch.setattr(Updater, "step", spoiled)
    line = refused(recipe, tmp_path / "run", capsys, "--steps", "2")
    assert "gradient norm is inf at update 1" in line and "nothing was updated" in line
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000001"
    ] and len(records(tmp_path / "run")) == 1


# --- Controls ---


def test_shuffling_only_reorders_advantages(folder, tmp_path):
    """The control: same rollouts, same rewards, the advantages of a group dealt out anew."""
    logs = []
    for shuffle in (False, True):
        config = from_dict(settings(folder, shuffle_advantages=shuffle, groups=2))
        logs.append(Alignment(config, tmp_path, Progress()).step(0))
    plain, shuffled = logs
    same = [
        k
        for k in plain
        if k.startswith(("reward/", "advantage/", "energy/", "group/", "diversity/"))
    ]
    assert len(same) > 10 and all(plain[k] == shuffled[k] for k in same)
    assert plain["optim/grad_norm"] != shuffled["optim/grad_norm"]


def test_advantages_of_zero_leave_only_what_has_no_reward_in_it(folder, tmp_path):
    """The other control: at the first update the KL is 0 too, so nothing moves; both controls at
    once are refused."""
    run = Alignment(
        from_dict(settings(folder, zero_advantages=True, groups=2)), tmp_path, Progress()
    )
    metrics = run.step(0)
    assert metrics["optim/grad_norm"] < 1e-12 and metrics["optim/drift"] == 0.0
    assert any(k.startswith("reward/") for k in metrics)
    with pytest.raises(ValueError, match="two controls"):
        from_dict(settings(folder, zero_advantages=True, shuffle_advantages=True))


def test_the_anchor_may_be_a_member_of_the_group(folder, tmp_path):
    """Its row is replayed too: one energy more, the recorded group included."""
    config = from_dict(settings(folder, advantages={"anchor": True}, show_every=1))
    metrics = Alignment(config, tmp_path, Progress()).step(0)
    record = json.loads((tmp_path / "groups" / "step-000000" / "group.json").read_text())
    assert (
        len(record["energies"]) == len(record["pi"]) == len(record["plans"])
        and record["energies"][-1] < 1e-9
    )
    assert record["pi"][-1] == max(record["pi"]) and metrics["optim/grad_norm"] > 0


def test_the_environment_says_what_ran(straight):
    facts = json.loads((straight[0] / "environment.json").read_text())
    assert (
        facts["packages"]["torch"]
        and facts["device"] == "cpu"
        and facts["command"].startswith("kvpo")
    )


def test_an_evaluation_on_the_training_prompts_is_called_that(folder, tmp_path):
    """Until `evaluate.prompts` existed, a prompt file was evaluated on itself, and the report
    called it unseen."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"a {name} cat\na {name} dog\n")
    data = {"blocks": 6, "prompts": str(tmp_path / "train.txt")}
    own = from_dict(settings(folder, data=data))
    apart = from_dict(
        settings(folder, data=data, evaluate={"scripts": 2, "prompts": str(tmp_path / "test.txt")})
    )
    assert [s.texts for s in evaluation_scripts(own)] == [
        ("a train cat",),
        ("a train dog",),
    ] and not unseen(own)
    assert [s.texts for s in evaluation_scripts(apart)] == [
        ("a test cat",),
        ("a test dog",),
    ] and unseen(apart)
    assert unseen(from_dict(settings(folder)))


def test_a_malformed_evaluation_file_stops_a_run_before_it_trains(folder, tmp_path, capsys):
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(folder, evaluate={"scripts": 2, "prompts": str(tmp_path / "none.txt")}),
    )
    assert align(recipe, tmp_path / "run") != 0
    assert (
        "none.txt" in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()
    )
