"""The benchmarks run, on the tiny generator: one once broke unseen when a function it calls took
one more argument."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_align import settings

from kvpo.common.progress import Progress
from kvpo.config import from_dict, load_config, recipe_path
from kvpo.method.explorers import StartNoise
from kvpo.method.routing import KVRouting
from kvpo.mini.pretraining.networks import TEXT_LEN
from kvpo.mini.pretraining.pretrain import GEOMETRY
from kvpo.mini.rewards.attributes import load_network
from kvpo.mini.source import StorySource
from kvpo.mini.stories import vocabulary, words
from kvpo.rewards.registry import RewardEntry
from kvpo.runs.parts import Parts
from kvpo.types import Script

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_both_schedules_give_the_same_numbers(folder):
    schedule, config = load("schedule"), load_config(recipe_path("mini"))
    config = replace(
        config,
        pipeline=str(folder),
        rollout=replace(config.rollout, branches=3),
        kv_routing=schedule.EXPLORER,
    )
    run = Parts(config, Progress())
    ours, theirs = schedule.measure(run, True), schedule.measure(run, False)
    assert (
        ours["rollout"].plans == theirs["rollout"].plans
        and ours["rollout"].window == theirs["rollout"].window
    )
    assert float((ours["rollout"].latents - theirs["rollout"].latents).abs().max()) < 1e-4
    assert float(((ours["energy"] - theirs["energy"]) / ours["energy"]).abs().max()) < 1e-4
    assert float((ours["gradient"] - theirs["gradient"]).norm() / ours["gradient"].norm()) < 1e-4
    assert 3 * ours["calls"] < theirs["calls"]


def test_calls_are_counted_as_they_are_made():
    """45 of 49 blocks are looked at, of 5 calls each, whatever the fork; and a replay of 5
    window blocks for two sets of weights."""
    assert {sum(load("schedule").counted(fork).values()) for fork in (7, 20, 32)} == {5 * 45 + 10}


def test_calls_with_prefixes_side_by_side():
    """112.5 calls of a prefix are a group's own alone; of four side by side a group has a quarter of the longest one's."""
    schedule = load("schedule")
    draw, forks = random.Random(0), schedule.PAPER_FORKS
    assert schedule.mean_calls(1) == 5 * 45 + 10 and sum(5 * f for f in forks) / len(forks) == 112.5
    drawn = sum(max(draw.choices(forks, k=4)) for _ in range(20_000)) / 20_000
    assert (
        schedule.mean_calls(4) == pytest.approx(5 * drawn / 4 + 122.5, abs=0.5)
        and schedule.mean_calls(4) < 170
    )


def test_explorers_are_compared_at_the_same_forks():
    exploration = load("exploration")
    eligible = exploration.forks_of_all(13, GEOMETRY)
    assert eligible == list(range(4, 11)), (
        "a choice of frames for every routing, room for windows of 3 blocks"
    )
    story, plain = Script("s", ("a", "b", "c"), (0, 5, 8), 13), Script("p", ("a",), (0,), 13)
    assert [pick(story, eligible) for pick in exploration.FORKS.values()] == [8, 4, 10]
    assert exploration.at_switch(plain, eligible) == 7


def test_start_noise_and_routing_are_measured_on_one_group(folder):
    """Same story, fork and noise: the anchors' rewards are equal, so `best - anchor` compares
    branches."""
    exploration, config = load("exploration"), load_config(recipe_path("mini"))
    config = replace(
        config,
        pipeline=str(folder),
        rollout=replace(config.rollout, branches=3),
        rewards=(RewardEntry("tiny:Warmth"), RewardEntry("tiny:Change")),
    )
    run = Parts(config, Progress())
    story = StorySource(0, "explore", 10).story(0, 0)
    anchors = []
    for explorer in (KVRouting(window_blocks=1), StartNoise(mix=1.0, window_blocks=1)):
        found = exploration.measure(run, load_network(), explorer, story, ("explore", 0), 6)
        assert (
            found["best - anchor"] >= found["mean - anchor"]
            and found["std"] > 0.0
            and found["pixel diversity"] > 0.0
            and "best - anchor, Warmth" in found
        )
        anchors.append(
            run.explore(story.script, run.embed(story.script), ("explore", 0), explorer, 6)[
                1
            ].local[:, -1]
        )
    assert torch.allclose(*anchors, atol=1e-6)


def test_variants_step_equally_far(folder):
    ablation, config = load("ablation"), load_config(recipe_path("mini"))
    config = replace(
        config,
        pipeline=str(folder),
        groups=1,
        kv_routing=ablation.EXPLORER,
        rollout=replace(config.rollout, branches=3),
        rewards=(RewardEntry("tiny:Warmth"), RewardEntry("tiny:Change")),
    )
    run = Parts(config, Progress())
    found = {"branch": ablation.Variant(), "self": ablation.Variant(context="self")}
    kept = [ablation.add_group(run, 0, found)]
    steps = [ablation.step(run, v.direction(1), kept, 0.003) for v in found.values()]
    assert [ablation.distance(run, w, kept) for w in steps] == pytest.approx([0.003] * 2, rel=0.05)
    assert ablation.distance(run, run.policy.reference, kept) < 1e-9
    assert any(not a.equal(b) for a, b in zip(*steps)), "contexts differ"


def test_scaling_starts():
    """As a program, which torchrun starts too: a name that was not imported once showed only
    there."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scaling.py"), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )
    assert done.returncode == 0 and "--measure" in done.stdout, done.stderr


def test_scaling_by_hand(folder, tmp_path):
    """One rank waits for nobody and sends nothing; of many ranks the slowest group counts, of
    many groups the mean; a ring sends everything nearly twice."""
    scaling = load("scaling")
    scaling.worker(from_dict(settings(folder)), 1, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        found["sent"] == 0.0
        and found["waiting"] < 0.01
        and found["cpu"] > 0.0
        and found["metrics"] < found["step"]
    )
    assert (
        scaling.slowest([1.0, 3.0], 1) == pytest.approx(2.0, abs=0.1)
        and scaling.slowest([1.0, 3.0], 64) == 3.0
    )
    assert 2.0 < scaling.slowest([1.0, 3.0], 8, groups=16) < 2.6
    assert scaling.messages(10**9, 1, 1.0) == 4e9 * 1.75 / 450e9 and scaling.messages(
        10**9, 2, 4e9
    ) == pytest.approx(scaling.messages(10**9, 1, 1.0) + 1.0)


def test_an_interval_over_seeds_and_scripts_knows_the_luck_of_a_training_seed():
    """Two training seeds that differ surely, each by itself: scripts alone would say that the
    mean is surely above 0."""
    claims = load("claims")
    scripts = torch.linspace(-0.01, 0.01, 64, dtype=torch.float64)
    mean, low, high = claims.over_seeds(torch.stack([scripts + 0.10, scripts - 0.04]), "two")
    assert (
        mean == pytest.approx(0.03)
        and low == pytest.approx(-0.04, abs=0.003)
        and high == pytest.approx(0.10, abs=0.003)
    )
    mean, low, high = claims.over_seeds(torch.stack([scripts + 0.03, scripts + 0.03]), "alike")
    assert 0.02 < low < mean < high < 0.04


def test_the_table_of_claims_has_every_seed_and_the_difference_of_the_controls():
    claims = load("claims")
    start = {
        claims.TOTAL: torch.tensor([0.5, 0.6, 0.4]).double(),
        "attributes": torch.tensor([0.9, float("nan"), 0.8]).double(),
    }

    def moved(by):
        return {name: values + by for name, values in start.items()}

    text = claims.tables(
        start, {"real": {0: moved(0.1), 1: moved(0.2)}, "zero": {0: moved(0.0), 1: moved(0.1)}}
    )
    assert (
        "| mean of trained | 0.500 | +0.100 [+0.100, +0.100], 100% | +0.200 [+0.200, +0.200], 100% | +0.150 [+0.100, +0.200] |"
        in text
    )
    assert "| attributes | 0.850 | +0.100" in text, "scripts that can not be measured are left out"
    assert "real minus zero, mean of trained, 2 seeds: +0.100 [+0.100, +0.100]" in text


def test_the_methods_are_tuned_alike_and_what_is_finished_is_not_run_again(
    tmp_path, capsys, monkeypatch
):
    """A pair has every learning rate once, its best one three seeds and a control, and a run that
    was stopped goes on."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    methods = load("methods")
    pairs, asked = [("nft", "renoise"), ("tve_ppo", "kv_routing")], []
    monkeypatch.setattr(methods, "updates", lambda pair, stage: stage.updates)

    def run(argv):
        folder = Path(argv[3])
        asked.append((folder.name, "--resume" in argv))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.resolved.yaml").touch()
        if len(asked) == 2:
            return 130  # stopped
        (folder / "report.html").touch()
        return 0

    def measure(generator, sampler, stage, path):
        gain = 0.0
        if generator.endswith(":ema"):
            gain = 0.1 if path.stem.endswith("lr0.001") else 0.01
        return {
            name: gain * sign + torch.arange(stage.scripts, dtype=torch.float64) / 1e3
            for name, sign in ((methods.TOTAL, 1.0), ("VQ", 1.0), ("classic", -1.0))
        }

    bench = methods.Bench(tmp_path, methods.FULL, run, measure)
    bench.all(pairs)
    assert len(asked) == len(pairs) * (len(methods.FULL.rates) + len(methods.SEEDS) + 1)
    stopped = asked[1][0]
    asked.clear()
    bench.all(pairs)
    assert asked[0] == (stopped, True)
    asked.clear()
    bench.all(pairs)
    assert not asked and bench.tuned(pairs[0]).rate == 1.0e-3
    said = (tmp_path / "methods.md").read_text()
    assert "| `nft` | `renoise` | 0.001 | 50 |" in said and "classic -0.010" in said
    methods.print_pairs(tmp_path, methods.FULL)
    listed = capsys.readouterr().out
    assert "50 updates, tuned 3/3, final 4/4" in listed and "refused" in listed


def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on(tmp_path):
    """Claims and preferences asked for checkpoints, and began it anew in a folder that `kvpo align`
    then refused, because it held a run already."""
    claims, asked = load("claims"), []

    def run(argv):
        asked.append("--resume" in argv)
        return 1

    (tmp_path / "run").mkdir()
    assert not claims.aligned(tmp_path / "run", "mini", [], run)
    (tmp_path / "run" / "config.resolved.yaml").touch()
    assert not claims.aligned(tmp_path / "run", "mini", [], run)
    assert asked == [False, True]
    (tmp_path / "run" / "report.html").touch()
    assert claims.aligned(tmp_path / "run", "mini", [], run) and len(asked) == 2


def test_the_options_of_the_methods_are_settings(monkeypatch):
    """Every pair of the benchmark is a recipe that `kvpo align` takes, and 24 pairs are legal."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    methods = load("methods")
    assert len(methods.pairs()) == 24 and ("tve_ppo", "start_noise") not in methods.pairs()
    for pair in methods.pairs():
        config = methods.settings_of(methods.Setting(*pair, 1.0e-3).options())
        assert (config.objective.kind, config.explorer) == pair
        assert config.optimizer.lr == 1.0e-3 and config.optimizer.clip == methods.GRADIENT


def test_a_dearer_pair_has_fewer_updates(monkeypatch):
    """Whole videos of eight branches cost more than three times the recipe's forks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    methods = load("methods")
    final = methods.FULL.final
    assert methods.updates(("tve_ppo", "kv_routing"), final) == final.updates
    assert methods.updates(("nft", "best_of"), final) < final.updates / 3


def test_other_words_say_the_same_in_words_that_are_known(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    transfer, known = load("transfer"), set(vocabulary())
    source = StorySource(3, "transfer", segments=3, memory=0.2)
    stories = [source.script(0, i) for i in range(200)]
    for script in stories:
        other = transfer.in_other_words(script)  # refuses what says something else
        assert not set(other.texts) & set(script.texts)
        assert all(set(words(text)) <= known for text in other.texts)
        assert max(len(words(text)) for text in other.texts) < TEXT_LEN
