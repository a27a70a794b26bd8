"""One group over a row of ranks: the numbers of one rank, and an error of one rank is everyone's.

Run by torchrun this file is a rank that works through `CASES`; as a test it compares with a single
process.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_align import CLOCK, align, records, settings, write_recipe
from test_distributed import launch_python
from tiny import Warmth, draw

from kvpo.common.progress import Progress
from kvpo.config import RunConfig, from_dict
from kvpo.distributed.branches import all_rewards
from kvpo.distributed.process_end import end_by
from kvpo.distributed.ranks import Ranks, leave
from kvpo.method.update import Updater
from kvpo.runs.parts import Parts
from kvpo.train import Alignment
from kvpo.types import RewardTable

ALONE = {
    "groups": 2,
    "optimizer": {"lr": 1e-3, "warmup": 1, "eps": 1e-3},
    "rollout": {"branches": 4, "cache_frames": 12, "together": 1},
    "score": {"clip_frames": 8, "min_frames": 4, "together": 1},
}
"""Rows generated, decoded and replayed one at a time: then a row of ranks has the bits of one
rank, and only sums have another order. In batches of other sizes a pixel may be rounded to the
next of its 256 values, which a reward of little spread shows: there rewards are given."""
TOGETHER = {
    "rollout": {"branches": 3, "cache_frames": 12},
    "score": {"clip_frames": 8, "min_frames": 4},
}
LORA = {"policy": {"train": "lora", "rank": 2, "sync_interval": 2}}
FULL = {"policy": {"train": "full", "sync_interval": 2}}
SHARDED = {"policy": {"train": "full", "sync_interval": 2, "shard": True}}
"""Over all ranks, those of a row included."""
HELD = {
    "advantages": {"anchor": True},
    "velocity_penalty": {"weight": 1.0, "blocks": 2},
    "context": "anchor",
}
SKIP = {
    "groups": 4,
    "unsafe": {"kind": "skip"},
    "rollout": {"branches": 2, "cache_frames": 12, "together": 1},
}
TWICE = {
    "inner_updates": 2,
    "advantages": {"std": "step"},
    "velocity_energy": {"weights": (0.0, 1.0, 1.0, 3.0)},
    "optimizer": {"lr": 1e-3, "warmup": 1, "eps": 1e-3, "clip_of": "step"},
}
"""Rewards given, as in batches: two updates amplify a rounding to a pixel. Two updates a step,
one standard deviation for its groups, one clip of their sum, a step that is not replayed."""

CASES = {
    2: {
        "anchor and held blocks": ALONE | LORA | HELD,
        "holes": ALONE | FULL | {"show_every": 2},
        "skipped": ALONE | LORA | SKIP,
        "in batches": ALONE | FULL | TOGETHER,
        "sharded": ALONE | SHARDED,
        "twice": ALONE | LORA | TWICE,
    },
    4: {
        "anchor and held blocks": ALONE | FULL | HELD,
        "holes": ALONE | LORA | {"show_every": 2},
        "skipped": ALONE | FULL | SKIP,
        "sharded": ALONE | SHARDED | HELD,
    },
}
"""Processes, in rows of two -> what is compared after two updates, the second of them off
policy."""
FAULTS = ("reward", "hold", "show")
"""Where one rank alone fails, in the first of its groups."""


class Holes(Parts):
    """Branch 2 of every group has no rewards."""

    def explore(self, *args, **kwargs):
        rollout, table, pixels = super().explore(*args, **kwargs)
        if 2 in (own := self.row.stretch(self.config.rollout.branches)):
            row = 2 - own.start
            table.local[:, row], table.global_[:, row], table.valid[row] = (
                float("nan"),
                float("nan"),
                False,
            )
        return rollout, table, pixels


class Given(Parts):
    """Rewards are drawn, not measured."""

    def explore(self, script, embeddings, name, **kwargs):
        rollout, table, pixels = super().explore(script, embeddings, name, **kwargs)
        own, G = self.row.stretch(self.config.rollout.branches), self.config.rollout.branches
        r_KB = draw(2, G + 1, seed=sum(name[1:]), dtype=torch.float64)[:, [*own, G]]
        return rollout, replace(table, local=r_KB, global_=-r_KB), pixels


class BrokenOnTheLast(Warmth):
    """NaN called valid, but only on the last rank."""

    def __new__(cls):
        from tiny import Broken

        return (
            Broken()
            if os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
            else Warmth()
        )


def prompts(folder: Path) -> dict:
    """With stories of the miniature's world, rewards would first be tried out on its clips:
    seconds a run."""
    return {"prompts": str(folder.parent / "prompts.txt"), "blocks": 6}


def aligned(config: RunConfig, out: Path, parts: type[Parts]) -> Alignment:
    """A run of parts that were changed for a test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kvpo.train.Parts", parts)
        return Alignment(config, out, Progress())


def updates(folder: Path, out: Path, case: str, changes: dict, size: int) -> dict:
    """Weights and metrics after each of two steps, the first one's group in ``out`` where it is
    to be shown."""
    config = from_dict(settings(folder, **changes, data=prompts(folder), branch_parallel=size))
    parts = {"holes": Holes, "in batches": Given, "twice": Given}.get(case, Parts)
    run = aligned(config, out / case, parts)

    def weights():
        return run.parts.policy.layout.whole(run.parts.policy.snapshot())

    found = {"start": weights(), "weights": [], "metrics": []}
    for step in range(2):
        metrics = run.step(step)
        found["metrics"].append(
            {k: float(v) for k, v in metrics.items() if not k.startswith((*CLOCK, "calls/"))}
        )
        found["weights"].append(weights())
    return found


def failure(folder: Path, out: Path, fault: str, size: int) -> dict:
    """What a step in which one rank fails says, and whether the weights stayed."""
    first = os.environ.get("RANK") == "0"

    def broken(*_, **__):
        raise (
            OSError(28, "No space left on device")
            if fault == "show"
            else ValueError("no such block")
        )

    changes = {
        "reward": {"rewards": [{"name": "test_branch_parallel:BrokenOnTheLast"}]},
        "hold": {},
        "show": {"show_every": 1},
    }[fault]
    run = Alignment(
        from_dict(settings(folder, **ALONE, **changes, data=prompts(folder), branch_parallel=size)),
        out,
        Progress(),
    )
    with pytest.MonkeyPatch.context() as patched:
        if fault == "hold" and first:
            patched.setattr(Updater, "hold", broken)
        if fault == "show" and first:
            patched.setattr("kvpo.train.show_group", broken)
        with pytest.raises((ValueError, OSError)) as caught:
            run.step(0)
    policy = run.parts.policy
    return {
        "said": str(caught.value),
        "updates": policy.updates,
        "same": all(torch.equal(p, r) for p, r in zip(policy.parameters, policy.reference)),
    }


def work(folder: Path, out: Path, recipe: str) -> int:
    """One rank's."""
    ranks = Ranks.join(torch.device("cpu"), 600.0)
    found = {
        case: updates(folder, out, case, changes, 2) for case, changes in CASES[ranks.world].items()
    }
    found |= {fault: failure(folder, out / "broken", fault, 2) for fault in FAULTS}
    torch.save(found, out / f"rank-{ranks.rank}.pt")
    if ranks.world == 2:  # the command closes the connections behind it
        assert align(recipe, out / "run", "--branch-parallel", "2", "--steps", "1") == 0
    leave()
    return 0


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    Path(prompts(folder)["prompts"]).write_text(
        "2,[a red circle rises slowly],[it turns blue]\n1,[a small green square moves left]\n"
    )
    return write_recipe(
        tmp_path_factory.mktemp("recipe") / "r.yaml",
        settings(
            folder,
            **ALONE | LORA,
            data=prompts(folder),
            evaluate={"scripts": 2, "batch": 2, "videos": 0},
        ),
    )


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request, folder, recipe, tmp_path_factory):
    """(every rank's findings, the folder they wrote to)."""
    out = tmp_path_factory.mktemp("ranks")
    process = launch_python(out, __file__, str(folder), str(out), recipe, ranks=request.param)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return [
        torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in range(request.param)
    ], out


def test_a_row_of_two_is_one_rank(world, folder, tmp_path):
    """Weights to 1e-6, also where they are sharded over all ranks; every metric, the recorded
    group; and bit for bit alike on all ranks."""
    found, out = world
    for case, changes in CASES[len(found)].items():
        alone = updates(folder, tmp_path, case, changes, 1)
        for step in range(2):
            for ours, theirs in zip(
                found[0][case]["weights"][step], alone["weights"][step], strict=True
            ):
                torch.testing.assert_close(
                    ours, theirs, rtol=0, atol=1e-6, msg=f"{case}, update {step}"
                )
            assert all(
                torch.equal(a, b)
                for other in found[1:]
                for a, b in zip(other[case]["weights"][step], found[0][case]["weights"][step])
            )
            ours, theirs = found[0][case]["metrics"][step], alone["metrics"][step]
            assert ours.keys() == theirs.keys()
            close = (
                2e-4 if case in ("sharded", "twice") and step else 1e-5
                # a second update is at weights that differ by 1e-8; FSDP2 adds what blocks share in
                # another order: the second gradient is of weights that differ by 1e-7
            )
            assert {
                k: (v, theirs[k])
                for k, v in ours.items()
                if v != pytest.approx(theirs[k], rel=close, abs=1e-6)
            } == {}, f"{case}, update {step}"
        if case == "holes":
            ours, theirs = (
                json.loads((where / case / "groups" / "step-000000" / "group.json").read_text())
                for where in (out, tmp_path)
            )
            assert len(theirs["plans"]) == 5 and [
                ours[k] for k in ("script_id", "fork", "plans", "rewards")
            ] == [theirs[k] for k in ("script_id", "fork", "plans", "rewards")]
            assert all(
                ours[k] == pytest.approx(theirs[k], rel=1e-5)
                for k in ("energies", "advantages", "pi")
            )
        moved = max(float((a - b).abs().max()) for a, b in zip(alone["weights"][1], alone["start"]))
        assert moved > 1e-4
        last = alone["metrics"][1]
        assert 0.0 < last["group/skipped"] < 1.0 or case != "skipped"
        assert last["advantage/valid"] == (0.8 if case == "holes" else 1.0) and (
            "hold/distance" in last
        ) == ("velocity_penalty" in changes)


def test_an_error_of_one_rank_is_its_row_s_and_everyone_s(world):
    """A reward, the penalty, the picture: on one rank, in the first of its two groups. Nobody
    waits for the next one, nobody updates."""
    found, _ = world
    for fault, rank in (("reward", len(found) - 1), ("hold", 0), ("show", 0)):
        ends = {
            "reward": "clip 0 = nan",
            "hold": "no such block",
            "show": "No space left on device",
        }[fault]
        for other, said in enumerate(found):
            assert (
                ends in said[fault]["said"] and said[fault]["same"] and said[fault]["updates"] == 0
            )
            assert f"rank {rank}: " in said[fault]["said"] or other == rank


def test_a_run_in_rows_goes_on_without_them(world, folder, recipe, tmp_path):
    found, out = world
    if len(found) == 2:
        assert align(recipe, out / "run", "--resume", "--override", "--steps", "2") == 0
        expected = updates(folder, tmp_path, "alone", ALONE | LORA, 1)["metrics"]
        for ours, theirs in zip(records(out / "run", evaluations=False), expected, strict=True):
            assert {
                k: v for k, v in theirs.items() if ours[k] != pytest.approx(v, rel=1e-3, abs=1e-6)
            } == {}


# --- By hand ---


def test_rewards_of_a_row_by_hand(monkeypatch):
    """Branches in the order of the ranks, and the last rank's anchor."""
    parts = [torch.tensor([[1.0, 9.0]]), torch.tensor([[2.0, 3.0, 8.0]])]
    valid = [torch.tensor([True, False]), torch.tensor([False, True, True])]
    monkeypatch.setattr(
        Ranks, "gather", lambda self, value: [(p, -p, v) for p, v in zip(parts, valid)]
    )
    whole = all_rewards(Ranks(0, 2), RewardTable(("r",), parts[0], -parts[0], valid[0]))
    assert (
        whole.local.tolist() == [[1.0, 2.0, 3.0, 8.0]]
        and torch.equal(whole.global_, -whole.local)
        and whole.valid.tolist() == [True, False, True, True]
    )


@pytest.mark.parametrize(("world", "size"), [(1, 2), (6, 4), (2, 3)])
def test_rows_that_do_not_come_out_even_are_refused(world, size):
    with pytest.raises(
        ValueError,
        match=f"branch_parallel = {size} does not divide {world} processes; start a multiple of {size}",
    ):
        Ranks(0, world).split(size, 600.0)


@pytest.mark.parametrize("size", [0, 5])
def test_every_process_of_a_row_needs_a_branch(folder, size):
    with pytest.raises(
        ValueError, match=f"branch_parallel = {size} must lie between 1 and rollout.branches = 4"
    ):
        from_dict(settings(folder, **ALONE, branch_parallel=size))


if __name__ == "__main__":
    end_by(lambda: work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
