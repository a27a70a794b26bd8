"""Several processes: the groups, the update and the errors of one, started by torchrun on a CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import environment
from test_align import align, equal, final, records, settings, write_recipe

from kvpo.common.metric_log import read_metrics
from kvpo.distributed.ranks import Lost, Ranks, restarted
from kvpo.distributed.signals import Stopped, giving_way, stoppable
from kvpo.policy.checkpoint import checkpoints, read_tensors


def launch(
    recipe: str, out: Path, *options: str, ranks: int = 2, restarts: int = 0
) -> subprocess.Popen:
    return launch_python(
        out.parent,
        "-m",
        "kvpo",
        "align",
        recipe,
        "--out",
        str(out),
        *options,
        ranks=ranks,
        restarts=restarts,
    )


def launch_python(
    folder: Path, *program: str, ranks: int = 2, restarts: int = 0
) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        *program,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=folder,
    )


def torchrun(recipe: str, out: Path, *options: str, ranks: int = 2) -> tuple[int, str]:
    process = launch(recipe, out, *options, ranks=ranks)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("distributed")
    return write_recipe(
        home / "tiny.yaml",
        settings(
            folder,
            groups=4,
            steps=2,
            evaluate={"scripts": 3, "batch": 1, "videos": 1},
            optimizer={"lr": 1e-3, "warmup": 2, "eps": 1e-3},
        ),
    )


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    assert align(recipe, out) == 0
    return out


@pytest.fixture(scope="module")
def double(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("double") / "run"
    code, said = torchrun(recipe, out)
    assert code == 0, said
    return out, said


# --- Shares ---


def test_shares_by_hand():
    ranks = [Ranks(r, 3) for r in range(3)]
    assert [list(r.share(7)) for r in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [list(r.stretch(7)) for r in ranks] == [[0, 1], [2, 3], [4, 5, 6]] and [
        r.first for r in ranks
    ] == [True, False, False]
    with pytest.raises(ValueError, match="2 groups a step leave 1 of 3 ranks idle"):
        ranks[0].share(2)


def test_a_single_process_is_a_world_of_one():
    alone, p = Ranks(), torch.nn.Parameter(torch.ones(2))
    alone.add_gradients([p])
    assert p.grad is None and alone.gather(3) == [3] and not restarted()
    with alone.together():
        p.data.add_(1)
    assert p[0] == 2
    with pytest.raises(FloatingPointError, match="as it is"), alone.together():
        raise FloatingPointError("as it is")


@pytest.mark.parametrize(
    ("own", "other", "raised"),
    [
        (Stopped("SIGTERM"), ValueError("bad"), ValueError),
        (ValueError("bad"), Stopped("SIGTERM"), ValueError),
        (None, Stopped("SIGTERM"), Stopped),
        (None, OSError("bad"), OSError),
    ],
)
def test_all_ranks_end_alike(own, other, raised):
    """Where one is stopped by a signal and another fails, none may go on to save: those that
    fail are not there to agree."""

    class WithAnother(Ranks):
        def gather(self, value):
            return [value, (type(other).__name__, str(other))]

    with pytest.raises(raised, match="bad|SIGTERM"), WithAnother(0, 2).together():
        if own is not None:
            raise own


def test_a_lost_rank_of_a_row_is_not_waited_for_twice():
    """In its row first, and then once more to say so to the same ranks."""

    class Deaf(Ranks):
        def gather(self, value):
            raise AssertionError("nobody is there to hear it")

    with pytest.raises(Lost, match="rank 1 did not come"), Deaf(0, 2).together():
        raise Lost("rank 1 did not come")


def test_a_signal_to_one_rank_is_heard_by_the_others(monkeypatch):
    """When their next phase begins, not when their share of the step is done."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    ranks = Ranks(0, 2, store=dist.HashStore(), parent=os.getppid())

    with stoppable():
        ranks.tell("phase reward")
        with giving_way():
            torch.nn.Identity()(0)
        with pytest.raises(Stopped), ranks.together():
            raise Stopped("SIGTERM")
        ranks.tell("phase replay")
        with giving_way(), pytest.raises(Stopped, match="SIGTERM"):
            torch.nn.Identity()(0)


def test_a_rank_whose_torchrun_is_gone_ends(monkeypatch):
    """With a store of its own on every node (docs/cluster.md) it would otherwise train on,
    beside whoever starts the run again."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    ranks = Ranks(0, 2, store=dist.HashStore(), parent=os.getppid())
    ranks.tell("phase reward")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(Lost, match=f"rank 0 has lost torchrun .process {ranks.parent}."):
        ranks.tell("phase replay")


# --- The same run ---


def test_two_ranks_train_on_the_groups_of_one(single, double):
    """The sum of four groups' gradients is taken in another order; after an update, rollouts
    amplify that rounding. Every metric is the mean over all groups."""
    out, _ = double
    for step, close in ((1, 1e-6), (2, 1e-4)):
        ours, theirs = (
            read_tensors(checkpoints(folder / "checkpoints")[step - 1]) for folder in (out, single)
        )
        moved = max(
            float((t - theirs[n.replace("current.", "reference.")]).abs().max())
            for n, t in theirs.items()
            if n.startswith("current.")
        )
        assert ours.keys() == theirs.keys() and moved > 10 * close
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=close)
    a, b = (records(folder, evaluations=False)[0] for folder in (out, single))
    assert a.keys() == b.keys() and all(
        a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in a if k != "calls/generator"
    )
    assert 2 * a["calls/generator"] < 1.5 * b["calls/generator"]


def test_evaluations_see_all_scripts(single, double):
    a, b = (read_metrics(out / "metrics.jsonl")[-1] for out in (double[0], single))
    found = [k for k in b if k.startswith("eval/")]
    assert found and all(
        a[k] == pytest.approx(b[k], rel=5e-3, abs=2e-3) for k in found if not k.endswith("win")
    )


def test_one_rank_writes_and_speaks(double, single):
    out, said = double

    def there(folder):
        return sorted(
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if p.is_file() and "tensorboard" not in p.parts
        )

    assert set(there(out)) - set(there(single)) == {"logs/rank-1.log"} and set(
        there(single)
    ) <= set(there(out))
    assert "step 2/2  " in (out / "logs" / "rank-1.log").read_text()
    assert said.count("report: ") == 1 and said.count("mean of trained") == 2


@pytest.fixture(scope="module")
def half(recipe, tmp_path_factory):
    """Stopped after the first of two steps."""
    out = tmp_path_factory.mktemp("half") / "run"
    assert torchrun(recipe, out, "--steps", "1")[0] == 0
    return out


def test_two_ranks_resume_bit_for_bit(recipe, half, double, tmp_path):
    out = shutil.copytree(half, tmp_path / "run")
    assert torchrun(recipe, out, "--resume")[0] == 0
    assert equal(final(out), final(double[0]))


def test_another_world_size_goes_on(recipe, half, single, tmp_path):
    out = shutil.copytree(half, tmp_path / "run")
    assert align(recipe, out, "--resume") == 0
    for name, tensor in final(single).items():
        torch.testing.assert_close(final(out)[name], tensor, rtol=0, atol=1e-4)


# --- Faults ---


def test_an_error_of_one_rank_is_everyone_s(folder, tmp_path):
    """NaN as a reward in group 1, which is the second rank's: nobody updates, nobody hangs."""
    # the miniature's stories have clips to try rewards on before
    (tmp_path / "prompts.txt").write_text("a red circle rises slowly\na small square\n")
    data = {"blocks": 6, "prompts": str(tmp_path / "prompts.txt")}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(
            folder,
            groups=2,
            steps=1,
            data=data,
            rewards=[{"name": "test_distributed:BrokenOnTheSecond"}],
        ),
    )
    code, said = torchrun(recipe, tmp_path / "run")
    assert (
        code != 0
        and "kvpo align: rank 1: step 0, group 1: " in said
        and "Nothing of this step was applied" in said
    )
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_a_killed_rank_is_started_again(recipe, double, tmp_path):
    """kill -9 of the second rank after the first step: torchrun starts both again, and they go
    on from the checkpoint."""
    out = tmp_path / "run"
    process = launch(recipe, out, restarts=2)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_bytes().count(
        b"\n"
    ):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    (victim,) = (
        p
        for p in children(process.pid)
        if b"RANK=1" in Path(f"/proc/{p}/environ").read_bytes().split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert equal(final(out), final(double[0])) and records(out, evaluations=False) == records(
        double[0], evaluations=False
    )


def children(pid: int) -> list[int]:
    return [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and f"\nPPid:\t{pid}\n" in _status(p)
    ]


def _status(path: Path) -> str:
    try:
        return (path / "status").read_text()
    except OSError:
        return ""


class BrokenOnTheSecond:
    """NaN called valid, but only on the second rank."""

    def __new__(cls):
        from tiny import Broken, Warmth

        return Broken() if os.environ.get("RANK") == "1" else Warmth()
