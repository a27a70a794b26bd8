"""Settings: strict, with a way out in every refusal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from tiny import GEOMETRY

from kvpo.config import (
    RECIPES,
    RunConfig,
    differences,
    from_dict,
    load_config,
    recipe_path,
    to_dict,
)
from kvpo.method.routing import KVRouting
from kvpo.rewards.registry import RewardEntry, find


def refused(content) -> str:
    with pytest.raises(ValueError) as caught:
        from_dict(content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


RECIPE_NAMES = sorted(p.stem for p in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_shipped_recipes_load_and_round_trip(name):
    config = load_config(recipe_path(name))
    content = to_dict(config)
    assert from_dict(yaml.safe_load(yaml.safe_dump(content))) == config
    assert from_dict(json.loads(json.dumps(content))) == config
    for entry in config.rewards:
        find(entry.name)


def test_there_is_a_recipe():
    assert "mini" in RECIPE_NAMES


def test_an_empty_recipe_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == RunConfig()


def test_what_is_written_holds():
    config = from_dict(
        {
            "steps": 7,
            "optimizer": {"lr": "1e-5", "warmup": 2},
            "kv_routing": {"draw": "dispersed"},
            "temperature": {"value": 0.5},
            "rewards": [{"name": "world_vq", "weight": 2}],
        }
    )
    assert (
        config.steps == 7
        and config.optimizer.lr == 1e-5
        and config.optimizer.warmup == 2
        and config.temperature.value == 0.5
    )
    assert config.exploring == KVRouting(draw="dispersed") and config.rewards == (
        RewardEntry("world_vq", 2.0),
    )
    assert config.optimizer.clip == RunConfig().optimizer.clip, "defaults fill a section"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 3}, "unknown key step; did you mean steps?"),
        ({"optimiser": {}}, "unknown key optimiser; did you mean optimizer?"),
        (
            {"optimizer": {"learning_rate": 1}},
            "unknown key optimizer.learning_rate; known here: lr, warmup",
        ),
        (
            {"optimizer": {"warmups": 1}},
            "unknown key optimizer.warmups; did you mean optimizer.warmup?",
        ),
        (
            {"rewards": [{"name": "world_vq"}, {"name": "world_mq", "wieght": 1}]},
            "unknown key rewards.1.wieght; did you mean rewards.1.weight?",
        ),
        ({"rewards": ["world_vq"]}, "rewards.0 must hold keys and values, not 'world_vq'"),
        ({"rollout": None}, "rollout must hold keys and values, not None"),
        ({"rollout": 8}, "rollout must hold keys and values, not 8"),
        ([1], "a recipe must hold keys and values, not [1]"),
        ({7: 1}, "unknown key 7"),
    ],
)
def test_unknown_keys(content, message):
    assert refused(content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": "many"}, "steps = 'many'"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"steps": 0}, "steps = 0 must be 1 or more"),
        ({"groups": 0}, "groups = 0 must be 1 or more"),
        ({"sampler": "euler"}, "sampler = 'euler'"),
        ({"context": "none"}, "context = 'none'"),
        (
            {"rollout": {"branches": 1}},
            "rollout.branches = 1, but a group compares at least 2 branches",
        ),
        ({"rollout": {"branches": 0}}, "rollout.branches = 0"),
        ({"rollout": {"branches": "x"}}, "rollout.branches = 'x'"),
        ({"optimizer": {"lr": -1.0}}, "optimizer.lr = -1.0"),
        ({"policy": {"train": "all"}}, "policy.train = 'all'"),
        ({"temperature": {"value": -1}}, "temperature -1"),
        ({"kv_routing": {"nearest": 0}}, "nearest = 0, but a branch must keep at least"),
        (
            {"kv_routing": {"draw": "some"}},
            "draw = 'some' is unknown; choose one of balanced, dispersed, independent",
        ),
        ({"rewards": [{"weight": 1.0}]}, "rewards.0.name is missing"),
        (
            {"advantages": {"weights": {"VQ": 1.0}}},
            "advantages.weights is set by the rewards' own weights",
        ),
    ],
)
def test_what_does_not_fit(content, message):
    assert message in refused(content)


@pytest.mark.parametrize("surrogate", ["velocity_energy", "denoised_energy"])
def test_illegal_pair(surrogate):
    message = refused({"explorer": "start_noise", "surrogate": surrogate})
    assert (
        "objective tve_ppo can not be paired with explorer start_noise and sampler renoise"
        in message
        and "identically 0" in message
        and "use explorer kv_routing" in message
    )


def test_illegal_values_are_refused_in_code_too():
    with pytest.raises(ValueError, match="can not be paired"):
        replace(RunConfig(), explorer="start_noise")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("steps: [1", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("- 1", "must hold keys and values"),
        ("stps: 1", "did you mean steps?"),
    ],
)
def test_the_file_is_named(tmp_path, text, reason):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert (
        str(caught.value).startswith(str(path))
        and reason in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_not_text(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"steps: \xff\xfe")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(path)


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(
        FileNotFoundError,
        match="there is no recipe 'minni'; shipped are .*mini.*, or give a YAML file",
    ):
        recipe_path("minni")


def test_differences_by_hand():
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": 3}
    new = {"a": 1, "b": {"c": 5, "d": [1, 2]}, "f": 4}
    assert differences(old, new) == ["b.c: 2 -> 5", "e: 3 -> None", "f: None -> 4"]
    assert differences(old, old) == []


def test_forks_follow_from_geometry():
    """The numbers that the tests of rollouts rely on."""
    assert (
        KVRouting(window_blocks=2).eligible_forks(8, GEOMETRY) == [3, 4, 5, 6]
        and KVRouting().routed(GEOMETRY) == 3
    )
