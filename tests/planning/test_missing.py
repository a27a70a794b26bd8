"""All that a recipe names and that is not there is said at once, with what gets it."""

from __future__ import annotations

from dataclasses import replace

import huggingface_hub
import pytest
import yaml

from kvpo.commands import main as cli
from kvpo.config import from_dict, load_config, recipe_path, to_dict
from kvpo.planning.missing import missing, refuse_missing


@pytest.fixture
def no_hub(monkeypatch):
    """Nothing was downloaded before, and there is no network."""

    def refuse(*_args, **_options):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


def recipe_of(tmp_path, **changes) -> dict:
    """A real model's recipe on a machine that has nothing of it."""
    return {
        "pipeline": str(tmp_path / "models" / "longlive"),
        "device": "cpu",
        "rewards": [
            {"name": "clip", "params": {"weights": str(tmp_path / "clip")}},
            {"name": "dinov2", "role": "guard"},
        ],
        "data": {"prompts": str(tmp_path / "train.jsonl"), "blocks": 6},
        "evaluate": {"prompts": str(tmp_path / "unseen.jsonl")},
        "calibration_clips": str(tmp_path / "clips"),
    } | changes


def test_everything_missing_is_said_at_once_with_what_gets_it(tmp_path, no_hub):
    """A real model failed one cause at a time: rewards' weights, then the pipeline folder, then
    the prompts."""
    with pytest.raises(ValueError) as refused:
        refuse_missing(from_dict(recipe_of(tmp_path)))
    head, *said = str(refused.value).splitlines()
    assert head == "6 things are missing; see what gets each:" and len(said) == 6
    for line, (what, way_out) in zip(
        said,
        [
            (f"'clip': weights {tmp_path}/clip are not there", "give a folder"),
            ("'dinov2': weights facebook/dinov2-base", "hf download facebook/dinov2-base"),
            ("models/longlive is no pipeline folder", "kvpo import --format longlive FILE --base"),
            ("train.jsonl are not there", "kvpo prompts vbench --out"),
            ("unseen.jsonl are not there", "kvpo prompts vbench --out"),
            ("clips/clips.csv is not there", "leave the setting out"),
        ],
        strict=True,
    ):
        assert what in line and way_out in line, line


@pytest.mark.parametrize("command", ["align", "plan", "doctor"])
def test_commands_say_all_of_it(tmp_path, capsys, no_hub, command):
    """Also where the size of the generator is unknown, and so nothing can be planned."""
    path = tmp_path / "recipe.yaml"
    content = recipe_of(tmp_path, pipeline=str(tmp_path / "nowhere"))
    path.write_text(yaml.safe_dump(content))
    options = ["--out", str(tmp_path / "run")] if command == "align" else []
    assert cli.main([command, str(path), *options]) == 1
    said = capsys.readouterr()
    for number in range(1, 7):
        assert f"  {number}. " in said.out + said.err
    assert "nowhere is no pipeline folder" in said.err and not (tmp_path / "run").exists()


def test_weights_on_a_hub_that_can_be_reached_are_not_missing_but_not_here(tmp_path, monkeypatch):
    """Loading downloads them; `kvpo plan` says that this is still to come."""

    def absent(*_args, **_options):
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_args, **_options: None)
    config = from_dict({"rewards": [{"name": "dinov2"}]})
    assert not missing(config)
    (fault,) = missing(config, download=False)
    assert "downloaded when they are first used" in str(fault)


def test_packages_and_environments_are_looked_for(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("KVPO_ENVS", str(tmp_path))
    monkeypatch.setattr("kvpo.common.extras.missing_modules", list)
    rewards = [
        {"name": "hpsv2", "params": {"weights": str(tmp_path)}},
        {"name": "envs/hpsv3", "isolation": "process", "environment": "hpsv3"},
        {"name": "my.own:Reward"},
    ]
    package, environment = missing(from_dict({"rewards": rewards}))
    assert "pip install 'kvpo[hpsv2]'" in str(package)
    assert "kvpo reward-env create hpsv3" in str(environment)


def test_one_thing_alone_is_said_as_it_always_was(tmp_path):
    config = from_dict({"pipeline": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="is no pipeline folder: model_index.json"):
        refuse_missing(config)


def test_what_is_there_is_not_missing(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle rises slowly\n")
    content = {"pipeline": str(folder), "data": {"prompts": str(prompts), "blocks": 6}}
    assert not missing(from_dict(content)) and not missing(load_config(recipe_path("mini")))


def test_the_same_file_is_missing_once(tmp_path):
    config = from_dict({"data": {"prompts": str(tmp_path / "a.txt")}})
    assert len(missing(config)) == 1
    other = replace(config, evaluate=replace(config.evaluate, prompts=str(tmp_path / "b.txt")))
    assert len(missing(other)) == 2


def test_a_run_folder_is_a_recipe(tmp_path, capsys, monkeypatch):
    """`kvpo doctor RUN`: the settings that the run was made with."""
    config = replace(load_config(recipe_path("mini")), steps=17)
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(to_dict(config)))
    examined = []
    monkeypatch.setattr("kvpo.doctor.doctor.examine", lambda c: examined.append(c) or True)
    monkeypatch.setattr("kvpo.planning.missing.refuse_missing", lambda c: None)
    assert cli.main(["doctor", str(tmp_path), "--device", "cpu"]) == 0
    assert examined == [replace(config, device="cpu")]


@pytest.mark.parametrize("command", ["align", "plan"])
def test_a_hub_that_can_not_be_reached_is_no_traceback(tmp_path, capsys, monkeypatch, command):
    """The errors of the hub's HTTP client are neither OSError nor ValueError: on a machine
    without network `kvpo align longlive` ended in the client's traceback, and the test above
    knew only errors that the hub does not raise there."""
    from huggingface_hub.errors import HTTPError

    def absent(*_args, **_options):
        raise OSError("not in the cache")

    def unreachable(*_args, **_options):
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"rewards": [{"name": "dinov2"}], "device": "cpu"}))
    options = ["--out", str(tmp_path / "run")] if command == "align" else []
    cli.main([command, str(path), *options])
    said = capsys.readouterr()
    assert "hf download facebook/dinov2-base" in said.out + said.err
    assert command == "plan" or "Name or service not known" in said.err


def test_a_download_that_breaks_off_is_no_traceback(monkeypatch):
    """Of a reward's weights, and of the base of an import."""
    from huggingface_hub.errors import HTTPError

    from kvpo.convert import wan_base
    from kvpo.rewards.pretrained.released import find

    def broken(*_args, **_options):
        raise HTTPError("Server disconnected")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    monkeypatch.setattr(wan_base, "snapshot_download", broken)
    with pytest.raises(ValueError, match="could not be downloaded .Server disconnected"):
        find("clip", "owner/name", ())
    with pytest.raises(FileNotFoundError, match="could not be downloaded .Server disconnected"):
        wan_base.open_base("owner/name")
