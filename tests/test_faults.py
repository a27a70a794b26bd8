"""What clusters do to a run of two processes: each is killed, all are, torchrun is, one hangs,
SIGTERM comes.

The run goes on from its last checkpoint, and ends with the weights of an uninterrupted one, bit for
bit.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from processes import ROOT, environment
from test_align import equal, final, records, settings, write_recipe
from test_distributed import children, launch
from test_docs import blocks

from kvpo.common.metrics import PHASES
from kvpo.distributed.rendezvous import open_store
from kvpo.policy.checkpoint import checkpoints

STEPS = 4


class SlowDisk:
    """A reward whose mere presence makes every checkpoint take a third of a second, half of it
    with its file there."""

    def __new__(cls):
        from safetensors.torch import save_file
        from tiny import Warmth

        import kvpo.policy.checkpoint

        def slowly(tensors, path):
            time.sleep(0.15)
            save_file(tensors, path)
            time.sleep(0.15)

        kvpo.policy.checkpoint.save_file = slowly
        return Warmth()


class DiesInEveryPhase:
    """kill -9 of the second rank by itself in one phase after the other, each once: what it has
    died in is in the folder that KVPO_DIED names."""

    def __new__(cls):
        from tiny import Warmth

        from kvpo.common.timing import Phases

        died, begin = Path(os.environ["KVPO_DIED"]), Phases.__call__

        def dying(self, name):
            if os.environ.get("RANK") == "1" and not (died / name).exists():
                (died / name).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return begin(self, name)

        Phases.__call__ = dying
        return Warmth()


class HangsOnTheSecond:
    """Sleeps instead of scoring, on the second rank."""

    def __new__(cls):
        from tiny import Warmth

        class Hangs(Warmth):
            def score(self, batch):
                time.sleep(600)

        return Hangs() if os.environ.get("RANK") == "1" else Warmth()


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    return new_recipe(
        folder,
        tmp_path_factory.mktemp("faults"),
        steps=STEPS,
        rewards=[{"name": "test_faults:SlowDisk"}],
    )


def new_recipe(folder: Path, home: Path, **changes) -> str:
    """Prompts of its own, because on the miniature's stories these rewards would be refused."""
    (home / "prompts.txt").write_text(
        "2,[a red circle rises slowly],[it turns blue]\n3,[a small square],[it moves left],[it rises]\n"
    )
    return write_recipe(
        home / "tiny.yaml",
        settings(
            folder, groups=2, data={"blocks": 6, "prompts": str(home / "prompts.txt")}, **changes
        ),
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = launch(recipe, out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return out


class Run:
    """Of two processes under torchrun, started again as often as is needed."""

    def __init__(self, recipe: str, out: Path):
        self.recipe, self.out, self.process = recipe, out, None

    def start(self) -> None:
        self.process = launch(
            self.recipe,
            self.out,
            *(["--resume"] if (self.out / "config.resolved.yaml").exists() else []),
            restarts=3,
        )

    def wait_for(self, there: Callable[[], bool]) -> bool:
        """False if the run ended before."""
        while self.process.poll() is None and not there():
            time.sleep(0.005)
        return self.process.poll() is None

    def ranks(self) -> dict[int, int]:
        """Rank -> process, of those that are there: torchrun's, which is this process or, of a
        script, its child."""
        found, own = {}, children(self.process.pid)
        for pid in own + [p for child in own for p in children(child)]:
            try:
                found |= {
                    int(n): pid
                    for n in re.findall(
                        rb"\0RANK=(\d)\0", Path(f"/proc/{pid}/environ").read_bytes()
                    )
                }
            except OSError:  # it has just ended
                continue
        return found

    def kill(self, victims: str) -> bool:
        """Rank `0` or `1`, `all` ranks, or the `launcher`, which leaves the ranks alone; False
        where none was there."""
        ranks = self.ranks()
        pids = {
            "0": [ranks.get(0)],
            "1": [ranks.get(1)],
            "all": list(ranks.values()),
            "launcher": [self.process.pid],
        }[victims]
        for pid in (pids := [p for p in pids if p]):
            os.kill(pid, signal.SIGKILL)
        if victims == "launcher":
            # its pipe is the ranks' too: it ends when they have ended, for want of torchrun's store
            self.process.communicate()
        return bool(pids)

    def end(self) -> str:
        said, _ = self.process.communicate(timeout=180)
        assert self.process.returncode == 0, said
        return said

    def done(self) -> bool:
        return (self.out / "report.html").exists()

    def logged(self, lines: int) -> Callable[[], bool]:
        path = self.out / "metrics.jsonl"
        return lambda: path.exists() and path.read_bytes().count(b"\n") >= lines

    def writing(self, step: int) -> Callable[[], bool]:
        """A checkpoint's tensors are there, under their first name."""
        return (self.out / "checkpoints" / f".step-{step:06d}.part" / "tensors.safetensors").exists


def is_whole(out: Path, whole: Path) -> bool:
    return equal(final(out), final(whole)) and records(out, evaluations=False) == records(
        whole, evaluations=False
    )


def test_killed_stopped_and_killed_again(recipe, whole, tmp_path):
    """One rank in a checkpoint's write, SIGTERM to torchrun, then all ranks, then torchrun
    itself: four faults, one run."""
    run = Run(recipe, tmp_path / "run")
    run.start()
    assert run.wait_for(run.writing(1)) and run.kill("0")
    assert run.wait_for(run.logged(2))
    begun = time.monotonic()
    run.process.terminate()
    said, _ = run.process.communicate(timeout=60)
    assert (
        time.monotonic() - begun < 20
        and "2 steps are done and saved. Go on by the same command with --resume" in said
    )
    assert [p.name for p in checkpoints(run.out / "checkpoints")] == ["step-000001", "step-000002"]
    run.start()
    assert run.wait_for(run.logged(3)) and run.kill("all")
    assert run.wait_for(run.writing(4)) and run.kill("launcher")
    assert [p.name for p in checkpoints(run.out / "checkpoints")][-1] in (
        "step-000003",
        "step-000004",
    ), "the ranks may have ended the write"
    run.start()
    run.end()
    assert is_whole(run.out, whole)


def test_a_hung_rank_is_named(folder, tmp_path):
    """With its phase, after the patience; and every rank ends."""
    recipe = new_recipe(
        folder, tmp_path, steps=1, patience=3, rewards=[{"name": "test_faults:HangsOnTheSecond"}]
    )
    run = Run(recipe, tmp_path / "run")
    run.process = launch(recipe, run.out)
    lines = []
    for line in run.process.stdout:
        lines.append(line)
        if line.startswith("kvpo align: "):
            break
    assert re.search(
        r"rank 0 waited in vain: rank 1 did not come, it was in phase reward of step 0, group 1, since \d\d:\d\d:\d\d \(",
        lines[-1],
    ), "".join(lines)
    # torchrun would, half a minute later
    assert run.wait_for(lambda: 0 not in run.ranks()) and run.kill("1")
    run.process.communicate(timeout=60)
    assert run.process.returncode == 1 and not checkpoints(run.out / "checkpoints")


# --- Two hosts ---


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable: 10.77.0.1 on the first's interface, 10.77.0.2 on
    the second's; each is named like its interface."""
    names = [f"kv{os.getpid()}{side}" for side in "ab"]
    if (
        os.geteuid()
        or not shutil.which("ip")
        or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode
    ):
        pytest.skip("network namespaces need root, `ip` and the permission to make them")

    def ip(*words):
        return subprocess.run(["ip", *words], check=True)

    try:
        ip("netns", "add", names[1])
        ip(
            "link",
            "add",
            names[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            names[1],
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def listening(host: str) -> set[str]:
    """Addresses, as the kernel writes them, at which something in the namespace waits for
    connections."""
    tables = subprocess.run(
        ["ip", "netns", "exec", host, "cat", "/proc/net/tcp", "/proc/net/tcp6"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {row.split()[1].split(":")[0] for row in tables.splitlines() if " 0A " in row}


def node(home: Path, interface: str, inside: Sequence[str] = (), **settings) -> subprocess.Popen:
    """The script of docs/cluster.md, word for word; what it says is in ``home``/``interface``."""
    (script,) = (
        block for block in blocks(ROOT / "docs" / "cluster.md", "bash") if "exec torchrun" in block
    )
    (home / "node.sh").write_text(script)
    env = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"INTERFACE": interface, "JOB": "1", "RESUME": ""} | {
        name: str(value) for name, value in settings.items()
    }
    with (home / interface).open("w") as out:
        return subprocess.Popen(
            [*inside, "bash", str(home / "node.sh")],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_pre_emption_of_a_node_ends_by_code_0(recipe, tmp_path):
    """SIGTERM to the script, as a cluster sends it: the ranks save, and torchrun, which would
    call it a failure, does not get it."""
    run = Run(recipe, tmp_path / "run")
    run.process = node(tmp_path, "lo", NODES=1, CARDS=2, RECIPE=recipe, RUN=run.out)
    assert run.wait_for(run.logged(1))
    run.process.terminate()
    assert run.process.wait(timeout=60) == 0
    said, steps = (tmp_path / "lo").read_text(), len(records(run.out, evaluations=False))
    assert f"stopped by SIGTERM; {steps} steps are done and saved" in said and 1 <= steps < STEPS
    assert checkpoints(run.out / "checkpoints")[-1].name == f"step-{steps:06d}"


@pytest.mark.slow
def test_ranks_without_their_torchrun_end(recipe, whole, tmp_path):
    """By the script every node has a store of its own, in its first rank, so nothing else tells
    them: they once trained on, beside the run that was started again."""
    run = Run(recipe, tmp_path / "run")
    run.process = node(tmp_path, "lo", NODES=1, CARDS=2, RECIPE=recipe, RUN=run.out)
    assert run.wait_for(run.logged(1))
    ranks, (torchrun,) = run.ranks(), children(run.process.pid)
    assert len(ranks) == 2
    os.kill(torchrun, signal.SIGKILL)
    assert run.process.wait(timeout=60) == 128 + signal.SIGKILL
    deadline = time.monotonic() + 60
    while (
        any(Path(f"/proc/{pid}").exists() for pid in ranks.values()) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert (
        "has lost torchrun" in (tmp_path / "lo").read_text()
        and len(records(run.out, evaluations=False)) < STEPS
    )
    run.start()
    run.end()
    assert is_whole(run.out, whole)


def test_two_hosts(hosts, recipe, whole, tmp_path):
    """One rank on each; the second is killed and both start anew; nothing listens but on the
    cable; one host's weights."""
    run = Run(recipe, tmp_path / "run")
    nodes = []
    try:
        nodes += [
            node(
                tmp_path,
                host,
                ["ip", "netns", "exec", host],
                NODES=2,
                CARDS=1,
                RECIPE=recipe,
                RUN=run.out,
            )
            for host in hosts
        ]
        run.process = nodes[1]
        assert run.wait_for((run.out / "checkpoints" / "step-000001").exists), (
            tmp_path / hosts[1]
        ).read_text()
        assert [listening(host) for host in hosts] == [{"01004D0A"}, {"02004D0A"}]
        assert run.kill("0") or run.kill("1")
        said = (
            [process.wait(timeout=180) for process in nodes],
            [(tmp_path / host).read_text() for host in hosts],
        )
    finally:
        for process in nodes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert said[0] == [0, 0], "\n".join(said[1])
    assert "resumed from" in "".join(said[1]) and is_whole(run.out, whole)


def test_several_nodes_share_no_store(monkeypatch):
    for name, value in {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
        "RANK": "0",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError,
        match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every torchrun",
    ):
        open_store(timedelta(seconds=1))


def test_a_store_that_is_not_there_is_one_line(monkeypatch):
    """The first rank has died before the others came, or a firewall stands between."""
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
        "RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("kvpo.distributed.rendezvous.MEETING", timedelta(seconds=1))
    with pytest.raises(
        ConnectionError,
        match=r"rank 1 found no store at 127.0.0.1:1 \(.*; rank 0, or torchrun on one node, opens it.*docs/cluster.md",
    ) as caught:
        open_store(timedelta(seconds=1))
    assert "\n" not in str(caught.value)


# --- In every phase, and at random ---


@pytest.mark.slow
def test_killed_in_every_phase(folder, tmp_path, monkeypatch):
    """One run, in which torchrun starts both ranks again after each death."""
    changes = {
        "steps": STEPS,
        "evaluate": {"every": 2, "scripts": 2, "batch": 2, "videos": 0},
        "sentinels": {"every": 2, "scripts": 2, "seeds": 2, "stop": 0.0, "kl_stop": 0.0},
        "velocity_penalty": {"weight": 1.0},
    }
    (tmp_path / "died").mkdir()
    monkeypatch.setenv("KVPO_DIED", str(tmp_path / "died"))
    whole = launch(
        new_recipe(folder, tmp_path, rewards=[{"name": "tiny:Warmth"}], **changes),
        tmp_path / "whole",
    )
    said, _ = whole.communicate(timeout=180)
    assert whole.returncode == 0, said
    run = launch(
        new_recipe(folder, tmp_path, rewards=[{"name": "test_faults:DiesInEveryPhase"}], **changes),
        tmp_path / "run",
        restarts=len(PHASES),
    )
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    assert {path.name for path in (tmp_path / "died").iterdir()} == set(PHASES)
    assert is_whole(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_thirty_two_random_instants(recipe, whole, tmp_path):
    """Eight times each of the ranks, both, and torchrun, from the start of the program to its
    end; up to three in a run, and every third in a checkpoint's write."""
    draw, number, writes = random.Random(0), 0, 0
    todo = ["0", "1", "all", "launcher"] * 8
    draw.shuffle(todo)
    while todo:
        run, kills = Run(recipe, tmp_path / f"{number}"), 0
        run.start()
        while (
            run.wait_for(lambda: len(run.ranks()) == 2 or run.done())  # noqa: B023, called at once
            and todo
            and kills < 3
            and not run.done()
        ):
            lines, write = draw.randrange(STEPS), draw.random() < 1 / 3
            run.wait_for(
                (lambda: run.writing(lines + 1)() or run.done()) if write else run.logged(lines)  # noqa: B023, called at once
            )
            write = write and run.writing(lines + 1)()
            time.sleep(0.0 if write else draw.uniform(0.0, 2.0))
            if run.kill(todo[-1]):
                kills, writes = kills + 1, writes + write
                if todo.pop() == "launcher" and not run.done():
                    run.start()
        said = run.process.communicate(timeout=180)[0]
        assert run.done() and is_whole(run.out, whole), f"run {number}: {said}"
        shutil.rmtree(run.out)
        number += 1
    print(f"32 kills in {number} runs, {writes} of them in a checkpoint's write")
    assert writes >= 5
