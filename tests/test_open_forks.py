"""Forks where there is something to see: groups whose window is hidden have no spread of local
rewards at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import GEOMETRY

from kvpo.config import from_dict, load_config, recipe_path
from kvpo.generators.geometry import pixel_span
from kvpo.method.forks import draw_fork
from kvpo.mini.source import StorySource
from kvpo.runs.build import script_source
from kvpo.runs.parts import Parts

MEMORY = {"blocks": 13, "segments": 4, "memory": 1.0}


def parts(**changes) -> Parts:
    """No more of a run's parts than a fork needs; the geometry has blocks of 2 latent frames."""
    config = from_dict({"kv_routing": {"window_blocks": 1}} | changes)
    made = Parts.__new__(Parts)
    made.config, made.source = config, script_source(config)
    made.pipeline = SimpleNamespace(geometry=GEOMETRY)
    return made


def hidden(made: Parts, step: int, story: int, fork: int) -> bool:
    first, stop = pixel_span((fork, fork + 1), GEOMETRY)
    return bool((made.source.story(step, story).truth().hidden[first:stop] == 1.0).all())


def test_no_group_forks_where_its_object_is_hidden():
    """7 of 30 stories, all that hide behind the pillar, had groups without any spread of local
    rewards: their windows showed the pillar and nothing else."""
    blind, seeing = parts(data=MEMORY), parts(data=MEMORY | {"open_forks": True})
    found = {"blind": 0, "seeing": 0}
    for step in range(40):
        script = blind.source.script(step, 0)
        eligible = blind.config.exploring.eligible_forks(script.blocks, GEOMETRY)
        drawn = blind._fork(script, step, 0)
        assert drawn == draw_fork(eligible, blind.config.seed, ("train", step, 0))
        chosen = seeing._fork(script, step, 0)
        assert chosen in eligible
        found["blind"] += hidden(blind, step, 0, drawn)
        found["seeing"] += hidden(seeing, step, 0, chosen)
        if not any(hidden(blind, step, 0, fork) for fork in eligible):
            assert chosen == drawn, "where nothing is hidden the fork is the same"
    assert found["blind"] >= 5 and found["seeing"] == 0, found


def test_several_forks_of_a_story_and_a_story_that_shows_nothing(monkeypatch):
    made = parts(data=MEMORY | {"open_forks": True}, rollout={"forks": 2}, groups=4)
    monkeypatch.setattr(StorySource, "shows", lambda _, step, index, first, stop: index == 0)
    script = made.source.script(0, 0)
    eligible = made.config.exploring.eligible_forks(script.blocks, GEOMETRY)
    for group in range(4):
        assert made._fork(script, 0, group) in eligible, "story 1 is hidden throughout"
    assert made._fork(script, 0, 0) < made._fork(script, 0, 2), "early and late"


def test_who_can_ask_for_it(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle rises\n")
    with pytest.raises(ValueError, match="data.open_forks asks a story where its object is hidden"):
        from_dict({"data": {"prompts": str(tmp_path / "p.txt"), "open_forks": True}})
    with pytest.raises(ValueError, match="set only one"):
        from_dict({"data": {"open_forks": True}, "rollout": {"alike_forks": True}})
    assert load_config(recipe_path("mini_memory")).data.open_forks
    assert not load_config(recipe_path("mini")).data.open_forks, "its results were measured without"
