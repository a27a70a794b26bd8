"""A run that starts from the weights of another one: a second round, on other rewards perhaps.

`kvpo align --pipeline RUN:ema` was refused as no pipeline folder, and a user had to know of
`kvpo export`. What a round starts from must be what `kvpo generate` makes of the same name, and
stay so whatever becomes of the first run.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from test_align import align, equal, final, records, refused, settings, write_recipe
from tiny import CHANNELS, TEXT_DIM, draw, save_pipeline

from kvpo.commands import main as cli
from kvpo.config import from_dict
from kvpo.planning.costs import sizes_of
from kvpo.planning.missing import missing
from kvpo.policy.checkpoint import checkpoints
from kvpo.runs.build import trained_families
from kvpo.runs.loading import load_generator, load_pipeline, start_of
from kvpo.runs.start_weights import FILE, origin_of
from kvpo.studio.aligning import studio_recipe

SHORT = {"steps": 2, "evaluate": {"scripts": 2, "batch": 2, "videos": 0}}
HARD = {"optimizer": {"lr": 0.03, "warmup": 1}}
"""So that the weights are far from the start, and the three sets from each other."""


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """First rounds: of all weights, and of an adapter."""
    home = tmp_path_factory.mktemp("first")
    for train in ("full", "lora"):
        policy = {"policy": {"train": train, "rank": 3, "ema": 0.5}}
        recipe = write_recipe(home / f"{train}.yaml", settings(folder, **SHORT, **HARD, **policy))
        assert align(recipe, home / train) == 0
    return home


def started(spec: str):
    """The pipeline that a round begins with, as `Parts` makes it."""
    start = start_of(spec)
    pipeline = load_pipeline(str(start.folder))
    start.put_into(pipeline)
    return pipeline


def velocity(pipeline) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.generator.velocity(
            draw(1, 2, CHANNELS, 4, 4), 0.8, draw(1, 24, TEXT_DIM, seed=1), [0, 1]
        )


@pytest.mark.parametrize("form", ["", ":ema", ":online", ":start"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_every_name_that_generate_takes_is_a_start(runs, train, form):
    """An adapter is merged, and nothing of it is left that the next one would meet."""
    spec = f"{runs / train}{form}"
    found, expected = started(spec), load_generator(spec)[0]
    names = {name for name, _ in found.generator.transformer.named_parameters()}
    assert not any("lora" in name or "base_layer" in name for name in names)
    torch.testing.assert_close(velocity(found), velocity(expected), rtol=1e-5, atol=1e-6)
    others = {f: velocity(load_generator(f"{runs / train}{f}")[0]) for f in (":online", ":start")}
    assert not torch.allclose(others[":online"], others[":start"], atol=1e-3), "the runs moved"


def test_a_folder_of_that_very_name_wins(runs, tmp_path):
    shutil.copytree(runs / "full", tmp_path / "run")
    save_pipeline(tmp_path / "run:ema")
    start = start_of(f"{tmp_path}/run:ema")
    assert start.weights is None and start.folder == tmp_path / "run:ema"
    assert start_of(f"{tmp_path}/run:online").weights is not None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora", "full"),
        pytest.param("lora", "lora", marks=pytest.mark.slow),
        pytest.param("full", "lora", marks=pytest.mark.slow),
        pytest.param("full", "full", marks=pytest.mark.slow),
    ],
)
def test_two_rounds(runs, tmp_path, capsys, first, second):
    """The second round trains another reward from the trained weights; stopped, and gone on with
    after the first run has trained on and was then deleted, it ends bit for bit as uninterrupted."""
    source = tmp_path / "first"
    shutil.copytree(runs / first, source)
    weights = velocity(load_generator(f"{source}:ema")[0])
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(f"{source}:ema", **SHORT | {"steps": 3}, **HARD)
        | {"policy": {"train": second, "rank": 2}, "rewards": [{"name": "tiny:Change"}]},
    )
    assert align(recipe, tmp_path / "whole") == 0
    assert f"starts from first:ema {checkpoints(source / 'checkpoints')[-1].name}" in (
        capsys.readouterr().out
    )
    assert align(recipe, tmp_path / "run", "--steps", "1") == 0
    assert align(str(source), source, "--resume", "--steps", "3") == 0, "the first trains on"
    assert not torch.allclose(velocity(load_generator(f"{source}:ema")[0]), weights, atol=1e-4)
    shutil.rmtree(source)
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert records(tmp_path / "run")[-1] == records(tmp_path / "whole")[-1]
    told = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    assert told["pipeline"] == f"{source}:ema"
    start, now = (load_generator(f"{tmp_path / 'run'}:{w}")[0] for w in ("start", "online"))
    torch.testing.assert_close(velocity(start), weights, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(velocity(now), weights, atol=1e-3)
    beside = tmp_path / "run" / "checkpoints" / "ema.safetensors"
    assert beside.exists() == (second == "full"), "an adapter that no folder elsewhere fits"


def test_a_third_round_needs_the_second_alone(runs, folder, tmp_path):
    """Also its base folder's name and the rewards of every round are kept: an evaluator of a family
    that round one was trained on is no second opinion on round three."""
    for number, source in ((2, runs / "lora"), (3, tmp_path / "2")):
        content = settings(f"{source}:online", **SHORT | {"steps": 1}, **HARD)
        content |= {"rewards": [{"name": "tiny:Change"}], "policy": {"train": "lora", "rank": 2}}
        recipe = write_recipe(tmp_path / f"{number}.yaml", content)
        assert align(recipe, tmp_path / str(number)) == 0
    shutil.rmtree(tmp_path / "2")
    last = tmp_path / "3"
    origin = origin_of(last / FILE)
    assert (origin.weights, origin.pipeline) == (f"{tmp_path / '2'}:online", str(folder))
    assert trained_families(str(last)) == {"toy", "toy-motion"} == set(origin.families)
    load_generator(str(last))


def test_what_else_names_a_start_takes_a_run(runs, folder, capsys):
    """`kvpo plan` has the sizes, `kvpo doctor` and the others find nothing missing, and the studio
    goes on from the weights whose videos were judged, where it began anew from their start."""
    spec = f"{runs / 'lora'}:ema"
    config = from_dict(settings(spec))
    assert missing(config) == [] and sizes_of(config).source == str(folder)
    assert studio_recipe("", spec).pipeline == spec


def test_an_adapter_on_such_a_start_is_exported_merged_only(runs, tmp_path, capsys):
    """The adapter alone, put on the pipeline folder, would be another generator without a word."""
    spec = f"{runs / 'full'}:ema"
    content = settings(spec, **SHORT | {"steps": 1}, **HARD) | {"policy": {"train": "lora"}}
    run = tmp_path / "run"
    assert align(write_recipe(tmp_path / "r.yaml", content), run) == 0
    capsys.readouterr()
    assert cli.main(["export", str(run), "--format", "peft"]) == 1
    assert f"acts on the weights of {spec} that it started from" in capsys.readouterr().err
    out = tmp_path / "merged"
    assert cli.main(["export", str(run), "--format", "pipeline", "--out", str(out)]) == 0
    torch.testing.assert_close(
        velocity(load_pipeline(str(out))), velocity(load_generator(str(run))[0])
    )
    (run / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{FILE} is missing: the weights of"):
        load_generator(str(run))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("full:emma", "names weights 'emma' of a run; choose one of ema, online, start, best"),
        ("gone:ema", "gone:ema is no pipeline folder"),
        ("young", "has no complete checkpoint; let the run go on until its first one"),
    ],
)
def test_weights_that_are_not_there(runs, tmp_path, capsys, spec, message):
    young = runs / "young"
    young.mkdir(exist_ok=True)
    shutil.copy(runs / "full" / "config.resolved.yaml", young)
    recipe = write_recipe(tmp_path / "r.yaml", settings(runs / spec))
    assert message in refused(recipe, tmp_path / "run", capsys)
    assert not (tmp_path / "run").exists()


def test_the_kept_weights_are_looked_at(runs, tmp_path, capsys):
    """Half a file, and one that is another round's: neither trains on without a word."""
    content = settings(f"{runs / 'full'}:ema", **SHORT | {"steps": 1}, **HARD)
    recipe = write_recipe(tmp_path / "r.yaml", content)
    assert align(recipe, tmp_path / "run") == 0
    path = tmp_path / "run" / FILE
    assert json.loads(json.dumps(origin_of(path).families)) == ["toy", "toy-motion"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = ("--resume", "--steps", "2")
    assert f"{path}, the weights that its run started from, is broken" in refused(
        recipe, tmp_path / "run", capsys, *again
    )
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "start_weights: " in refused(recipe, tmp_path / "run", capsys, *again)
