"""Sharded weights: the numbers of whole ones, whoever has how much to do, and checkpoints that
any number of ranks reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import environment
from safetensors.torch import load_file
from test_align import align, equal, final, records, settings, write_recipe
from test_distributed import children, launch, torchrun
from tiny import draw, new_transformer

from kvpo.common.metric_log import read_metrics
from kvpo.convert.wan_names import keeps_float32
from kvpo.distributed.ranks import Ranks
from kvpo.generators.causal_wan import CausalWan
from kvpo.method.advantages import UnsafePolicy
from kvpo.method.energies import Temperature
from kvpo.method.objectives.tve_ppo import TvePpo
from kvpo.method.update import OptimizerConfig, Updater
from kvpo.policy.checkpoint import (
    Snapshot,
    checkpoints,
    load_checkpoint,
    newest_whole,
    read_tensors,
    save_checkpoint,
)
from kvpo.policy.policy import Policy, PolicyConfig

CASES = ("full-float32", "full-bfloat16", "lora-float32", "lora-bfloat16")


class Trained:
    """A policy whose groups are one or two velocities each: enough for a gradient, with the
    weights asked for that groups ask for."""

    def __init__(self, case: str, ranks: Ranks, shard: bool):
        train, dtype = case.split("-")
        transformer = new_transformer()
        for name, p in transformer.named_parameters():
            if not keeps_float32(name):
                p.data = p.data.to(getattr(torch, dtype))
        transformer.enable_gradient_checkpointing()
        self.policy = Policy(
            CausalWan(transformer),
            PolicyConfig(train=train, rank=2, shard=shard, sync_interval=2),
            0,
            ranks,
        )
        self.updater = Updater(
            self.policy,
            OptimizerConfig(lr=1e-3, warmup=1, eps=1e-3),
            TvePpo(),
            Temperature(),
            UnsafePolicy(),
            3,
        )
        self.optimizer = self.updater.optimizer

    def velocity(self, seed: int) -> torch.Tensor:
        return self.policy.model.velocity(
            draw(1, 2, 4, 4, 4, seed=seed), 0.5, draw(1, 5, 16), [0, 1]
        )

    def step(self, step: int, groups: list[int]) -> None:
        self.accumulate(step, groups)
        self.update()

    def accumulate(self, step: int, groups: list[int]) -> None:
        with self.policy.for_groups():
            for group in groups:
                with self.policy.using(self.policy.behaviour):
                    target = self.velocity(10 * step + group)
                if (
                    group == 2 and self.policy.updates
                ):  # only a group of the first rank asks for the reference
                    with self.policy.using(self.policy.reference):
                        target = target + self.velocity(10 * step + group)
                losses = (
                    (self.velocity(10 * step + group + other) - target).square().mean() / 3
                    for other in (0, 5)
                )
                self.updater.add_clipped(losses, 1 / 3, Ranks())

    def update(self) -> None:
        self.policy.layout.add_gradients()
        self.updater.step()

    def everything(self) -> list[torch.Tensor]:
        """All sets, the moments, and a velocity under the average; whole, float32."""
        p = self.policy
        moments = [
            [self.optimizer.state[w][m] for w in p.parameters] for m in ("exp_avg", "exp_avg_sq")
        ]
        with p.using(p.average):
            found = self.velocity(0)
        return [
            *(
                full(w)
                for s in (p.snapshot(), p.behaviour, p.average, p.reference, *moments)
                for w in p.layout.described(s)
            ),
            found,
        ]


def full(w: torch.Tensor) -> torch.Tensor:
    return w.full_tensor() if hasattr(w, "full_tensor") else w


@pytest.fixture(scope="module")
def ones(tmp_path_factory):
    """Every case on one rank with all groups, and its checkpoint."""
    home, runs = tmp_path_factory.mktemp("sharding"), {}
    for case in CASES:
        runs[case] = run = Trained(case, Ranks(), shard=True)
        for step in range(3):
            run.step(step, [0, 1, 2])
        save_checkpoint(home / f"one-{case}", Snapshot.of(3, run.policy, run.optimizer, {}), 2)
    return home, runs


@pytest.fixture(scope="module")
def twos(ones):
    """What two ranks came to, from one start of torchrun."""
    home, _ = ones
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(Path(__file__).with_name("sharded_ranks.py")),
        str(home),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((home / "facts.json").read_text()), {
        case: load_file(home / f"{case}.safetensors") for case in CASES
    }


def part(tensors: dict[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Numbered tensors of a kind, in order."""
    count = sum(name.startswith(f"{kind}.") for name in tensors)
    return [tensors[f"{kind}.{i}"] for i in range(count)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def test_one_rank_has_nothing_to_share_out():
    run = Trained("full-float32", Ranks(), shard=True)
    assert not run.policy.sharded and all(
        p is c for p, c in zip(run.policy.parameters, run.policy.layout.computing)
    )


@pytest.mark.parametrize(("case", "close"), list(zip(CASES, (1e-6, 2e-4, 0.0, 0.0))))
def test_sharded_is_whole(twos, case, close):
    """On two ranks, of which one has two groups and asks for the reference. Gradients of text
    and modulation, which all blocks share, are summed in another order where FSDP2 stands
    between the blocks; an adapter has none of them, and is the same bit for bit."""
    facts, tensors = twos
    sharded, whole = (part(tensors[case], kind) for kind in ("sharded", "whole"))
    count = len(whole) // 6  # of the four sets, the moments of two
    assert all(
        float((a - b).abs().max()) <= close for a, b in zip(sharded[: 4 * count], whole)
    ) and len(sharded) == len(whole)
    assert max(float((a - b).abs().max()) for a, b in zip(whole[:count], whole[3 * count :])) > max(
        10 * close, 1e-3
    ), "they have moved"
    whole, sharded = facts[case]["drift"]
    assert sharded == pytest.approx(whole, rel=1e-4) and sharded > 0
    held, trained = facts[case]["held"], facts[case]["trained"]
    assert sum(held) == trained and max(held) < 0.6 * trained


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("float32")])
def test_two_ranks_are_one(ones, twos, case):
    one, two = ones[1][case].everything(), part(twos[1][case], "sharded")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


# --- Checkpoints ---


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_two_ranks(ones, twos, case):
    """Read again by two, bit for bit also an update later; and by one, as whole tensors or into
    an unsharded policy."""
    _, tensors = twos
    assert same(part(tensors[case], "again"), part(tensors[case], "sharded"))
    assert same(part(tensors[case], "later.resumed"), part(tensors[case], "later.straight"))
    path, alone = ones[0] / case / "step-000003", Trained(case, Ranks(), shard=False)
    assert sorted(p.name for p in path.iterdir()) == [
        f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)
    ] + ["state.json"], "no pickle in it"
    assert load_checkpoint(path, alone.policy, alone.optimizer) == 3 and (
        alone.policy.updates,
        alone.policy.lag,
    ) == (3, 1)
    assert same(alone.everything(), part(tensors[case], "sharded"))
    found = read_tensors(path, "average.")
    assert same(
        list(found[f"average.{n}"] for n in alone.policy.names), alone.policy.average
    ) and len(found) == len(alone.policy.names)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_one_rank_is_read_by_two(ones, twos, case):
    assert same(part(twos[1][case], "from_one"), ones[1][case].everything())


def test_a_lost_shard_is_named(ones, twos, tmp_path):
    """Nothing in the other shards says how many there were; the manifest does."""
    path = shutil.copytree(ones[0] / "full-float32" / "step-000003", tmp_path / "step-000003")
    shutil.copytree(ones[0] / "one-full-float32" / "step-000003", tmp_path / "step-000001")
    (lost,) = path.glob("shard-00002*")
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost} is broken or missing .*; delete {path} to go on"):
        read_tensors(path)
    said = []
    assert (
        newest_whole(checkpoints(tmp_path), said.append) == tmp_path / "step-000001"
        and len(said) == 1
        and str(lost) in said[0]
    )
    (tmp_path / "step-000001" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints in .* can be read"):
        newest_whole(checkpoints(tmp_path), said.append)


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_of_one_rank(twos, case):
    """Every rank stops and says so; the checkpoint before is all that is left."""
    *said, left = twos[0][case]["full disk"]
    assert len(said) == 2 and left == "step-000001"
    assert all(
        "step-000002 could not be written (rank 1: [Errno 28] No space left on device); the ones before it are untouched"
        in s
        for s in said
    )


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_on_one_rank(twos, case):
    first, second = twos[0][case]["not finite"]
    assert (
        first == second
        and "not finite in 1 tensors, first " in first
        and "nothing was updated" in first
    )


def test_a_rank_that_does_not_come_is_named(twos):
    """Also where the messages are those of the shards."""
    assert twos[0]["alone"].startswith("rank 0 waited in vain: rank 1 did not come, it was in ")


# --- Whole runs ---


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def run_of_one(request, folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    changes = {
        "policy": {"train": request.param, "rank": 2, "shard": True, "sync_interval": 2},
        "velocity_penalty": {"weight": 0.5},
    }
    changes |= {
        "groups": 3,
        "steps": 2,
        "evaluate": {"scripts": 2, "batch": 1, "videos": 0},
        "optimizer": {"lr": 1e-3, "warmup": 2, "eps": 1e-3},
    }
    recipe = write_recipe(home / "tiny.yaml", settings(folder, **changes))
    assert align(recipe, home / "one") == 0
    return recipe, home


def test_a_run_begun_by_two_is_finished_by_one(run_of_one):
    """Three groups for two ranks, the penalty's reference passes, an evaluation; then the other
    world size, to which sharding means nothing."""
    recipe, home = run_of_one
    code, said = torchrun(recipe, home / "two", "--steps", "1")
    assert code == 0, said
    a, b = (records(home / name, evaluations=False)[0] for name in ("two", "one"))
    assert a.keys() == b.keys()
    assert not {
        k: (a[k], b[k])
        for k in a
        if k != "calls/generator" and a[k] != pytest.approx(b[k], rel=1e-4, abs=1e-6)
    }
    assert any(k.startswith("eval/") for k in read_metrics(home / "two" / "metrics.jsonl")[-1])
    assert align(recipe, home / "two", "--resume", "--override", "--policy.no-shard") == 0
    ours, theirs = final(home / "two"), final(home / "one")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_sharded_runs_resume_bit_for_bit(run_of_one):
    recipe, home = run_of_one
    for out, options in (
        ("straight", []),
        ("resumed", ["--steps", "1"]),
        ("resumed", ["--resume"]),
        ("whole", ["--policy.no-shard"]),
    ):
        code, said = torchrun(recipe, home / out, *options)
        assert code == 0, said
    assert equal(final(home / "resumed"), final(home / "straight"))
    for other, close in (("whole", 1e-6), ("one", 1e-4)):
        for name, tensor in final(home / other).items():
            torch.testing.assert_close(final(home / "straight")[name], tensor, rtol=0, atol=close)


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["rank", "launcher"])
def test_killed_while_shards_are_written(run_of_one, tmp_path, victims):
    """kill -9 of the second rank as soon as the second checkpoint's folder is begun: torchrun
    starts both again, and what was half-written counts for nothing. Or of torchrun: the ranks,
    which write and compute at once, end soon, though each would wait for the other by its
    patience of half an hour."""
    recipe, home = run_of_one
    if not (home / "unharmed").exists():
        assert torchrun(recipe, home / "unharmed")[0] == 0
    out = tmp_path / "run"
    process = launch(recipe, out, restarts=2)
    while not (out / "checkpoints" / ".step-000002.part").exists():
        time.sleep(0.001)
        assert process.poll() is None, process.communicate()[0]
    (victim,) = (
        p
        for p in children(process.pid)
        if b"RANK=1" in Path(f"/proc/{p}/environ").read_bytes().split(b"\0")
    )
    os.kill(victim if victims == "rank" else process.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    if victims == "launcher":
        code, said = torchrun(recipe, out, "--resume")
        assert code == 0, said
    assert process.returncode == (0 if victims == "rank" else -signal.SIGKILL), said
    assert equal(final(out), final(home / "unharmed")) and not list(out.rglob("*.part"))
