"""The package as a library: light to import, the commands' numbers, in any thread."""

from __future__ import annotations

import doctest
import json
import math
import signal
import subprocess
import sys
import threading
from importlib.metadata import version

import pytest
import torch
from test_align import align, equal, final, settings, write_recipe
from tiny import BLUE, GEOMETRY, RED, Change, Warmth

import kvpo
from kvpo.api.settings import settle
from kvpo.commands import main as cli
from kvpo.generators.generate import generate
from kvpo.generators.sampler import SAMPLERS
from kvpo.rewards.registry import find, give, make_reward
from kvpo.runs.build import trained_families
from kvpo.types import Script

# --- The package ---


def test_importing_kvpo_imports_nothing():
    """A program that only asks for the version, or lists the names, does not wait for torch."""
    heavy = "{'torch', 'yaml', 'numpy'} & {*sys.modules}"
    script = f"import sys, kvpo; dir(kvpo), kvpo.__version__; print(len({heavy}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["0"], done.stderr


def test_every_public_name_is_there_and_explained():
    assert set(kvpo.__all__) == {*kvpo._HOMES, "__version__"} and set(kvpo.__all__) <= set(
        dir(kvpo)
    )
    assert not [name for name in kvpo._HOMES if not getattr(kvpo, name).__doc__]
    with pytest.raises(AttributeError, match="has no 'aling'; it offers .*align, evaluate"):
        kvpo.aling  # noqa: B018, asking is the test


def test_the_version(capsys):
    assert kvpo.__version__ == version("kvpo")
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"kvpo {kvpo.__version__}\n"


@pytest.mark.parametrize("name", kvpo._HOMES)
def test_examples_are_true(name):
    """The examples of the docstrings, on the miniature; that of `align` would take minutes."""
    found = doctest.DocTestFinder(recurse=False).find(
        getattr(kvpo, name), name, globs={"kvpo": kvpo, "torch": torch}
    )
    for test in found:
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


# --- Settings ---


def test_settings_by_section_or_by_dotted_name():
    by_section = settle("mini", {"steps": 30, "optimizer": {"lr": 1e-3}, "data": {"blocks": 7}})
    dotted = settle("mini", {"steps": 30, "optimizer.lr": 1e-3, "data.blocks": 7})
    assert by_section == dotted == settle(dotted, {}) and dotted.optimizer.lr == 1e-3
    assert dotted.optimizer.warmup == settle("mini", {}).optimizer.warmup, (
        "the rest is the recipe's"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 3}, "unknown key step; did you mean steps?"),
        ({"optimiser.lr": 1.0}, "unknown key optimiser; did you mean optimizer?"),
        ({"optimizer": {"lrr": 1.0}}, "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ({"optimizer.lrr": 1.0}, "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ({"lr": 1.0}, "unknown key lr; did you mean optimizer.lr?"),
        ({"steps.first": 1}, "unknown key steps.first: steps is one value"),
        ({"optimizer.lr": 1.0, "optimizer": {"lr": 2.0}}, "optimizer.lr is given twice"),
        ({"steps": 0}, "steps = 0 must be 1 or more"),
        ({"rewards": "world_vq"}, "must be a list of rewards"),
        ({"rewards": [3]}, "reward 3 is a int; give a name, a function of a VideoBatch"),
        ({"rewards": [{"name": "world_vq", "weigth": 1}]}, "did you mean rewards.0.weight?"),
        (
            {"rewards": [{"name": Warmth(), "isolation": "process"}]},
            "can not be isolated in another one",
        ),
    ],
)
def test_settings_that_can_not_be(given, message):
    with pytest.raises(ValueError) as error:
        settle("mini", given)
    assert message in str(error.value)


def test_a_recipe_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no recipe 'minni'"):
        kvpo.align("minni")


# --- Rewards that are Python objects ---


def test_what_can_be_imported_is_named_by_where_it_is():
    """Another process then finds it: the run can be resumed and evaluated from the command line."""
    assert give(Warmth) == "tiny:Warmth" and find("tiny:Warmth") is Warmth


def test_a_function_of_this_process():
    def redness(batch):
        return batch.frames[:, :, 0].float().mean(dim=(1, 2, 3))

    assert (
        give(redness) == "python:redness" and make_reward("python:redness").spec.name == "redness"
    )
    frames = torch.full((2, 4, 3, 8, 8), 7, dtype=torch.uint8)
    batch = kvpo.VideoBatch(frames, 16.0, ("a", "b"))
    assert make_reward(give(redness)).score(batch).scores.tolist() == [7.0, 7.0]
    assert give(lambda batch: [0.0]) == "python:lambda"


def test_objects_that_can_not_be_asked_for():
    class Local(Warmth):
        pass

    with pytest.raises(ValueError, match="give an object of it, Local"):
        give(Local)
    with pytest.raises(ValueError, match="params = {'size': 3} come too late"):
        make_reward(give(Warmth()), {"size": 3})
    with pytest.raises(ValueError, match="was given as a Python object to another process"):
        find("python:gone")


# --- Runs ---


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    content = settings(folder, steps=2)
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", content)


@pytest.fixture(scope="module")
def threaded(recipe, tmp_path_factory):
    """A run in a thread, of rewards that are objects, and the handlers before it and in it."""
    out, found, seen = tmp_path_factory.mktemp("api") / "run", [], []

    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    class Watching(Warmth):
        def score(self, batch):
            seen.append(handlers())
            return super().score(batch)

    rewards = [Watching(), {"name": Change(), "weight": 0.5}]
    thread = threading.Thread(target=lambda: found.append(kvpo.align(recipe, out, rewards=rewards)))
    thread.start()
    thread.join()
    return found, [handlers(), *seen]


def test_a_run_in_a_thread_leaves_signals_alone(threaded):
    """`signal.signal` raises outside the main thread, so no server could start a run."""
    found, (before, *inside) = threaded
    assert len(found) == 1 and inside and all(seen == before for seen in inside)


def test_the_record_of_a_run(threaded):
    (run,), _ = threaded
    assert run.steps == 2 and run.report == run.folder / "report.html" and run.report.is_file()
    written = json.loads((run.folder / "evaluation" / "ema-step-000002.json").read_text())
    assert [row.diff for row in run.evaluation.rows] == [row["diff"] for row in written["rows"]]
    assert run.evaluation.against == "start" and "mean of trained" in str(run)


def test_a_run_is_the_commands_run(threaded, recipe, tmp_path):
    """The same weights, bit for bit, whether rewards are objects or names in a recipe."""
    (run,), _ = threaded
    assert align(recipe, tmp_path / "run") == 0
    assert equal(final(run.folder), final(tmp_path / "run"))


def test_families_of_objects_are_known_elsewhere(threaded, monkeypatch):
    """Where the run's objects are gone, its evaluators are still called what they are."""
    (run,), _ = threaded
    monkeypatch.setattr("kvpo.rewards.registry._given", {})
    assert trained_families(f"{run.folder}:ema") == {"toy", "toy-motion"}


def test_ctrl_c_saves_and_then_reaches_the_program(recipe, tmp_path, monkeypatch):
    """As KeyboardInterrupt, which a notebook expects; the run then goes on where it was."""
    # mean brightness is a toy that a frozen picture wins
    monkeypatch.setattr("kvpo.runs.parts.refuse_frozen", lambda *_: None)
    asked = []

    def interrupting(batch):
        asked.append(len(batch))
        if len(asked) == 4:
            signal.raise_signal(signal.SIGINT)
        return batch.frames.float().mean(dim=(1, 2, 3, 4))

    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        kvpo.align(recipe, out, rewards=[interrupting], steps=4)
    assert signal.getsignal(signal.SIGINT) is before
    saved = [path.name for path in (out / "checkpoints").glob("step-*")]
    run = kvpo.align(recipe, out, rewards=[interrupting], steps=4, resume=True)
    assert saved and "step-000004" not in saved and run.steps == 4


# --- Videos ---


def test_a_video_is_the_commands_video(pipeline, folder):
    video = kvpo.generate(str(folder), [RED, BLUE], seconds=1, at=[0.8], seed=3, device="cpu")
    script = Script("story", (RED, BLUE), (0, 2), 3)
    names = [("generate", "story")]
    assert video.script == script and video.fps == GEOMETRY.fps and video.seconds >= 1
    wanted = generate(kvpo.load(folder, device="cpu"), SAMPLERS["renoise"], [script], 3, names)[0]
    assert torch.equal(video.frames, wanted) and video.frames.dtype == torch.uint8
    assert torch.equal(kvpo.generate(pipeline, script, seed=3).frames, wanted), (
        "a Script, a Pipeline"
    )


def test_a_video_can_be_saved(pipeline, tmp_path):
    video = kvpo.generate(pipeline, RED, seconds=0.5)
    assert video.save(tmp_path / "deep" / "a.mp4").stat().st_size > 0 and RED in repr(video)


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        ([], {}, "prompts are empty"),
        (RED, {"seconds": 0.0}, "0.0 s is no time of a video"),
        (RED, {"seconds": math.inf}, "inf s is no time of a video"),
        (RED, {"seconds": math.nan}, "nan s is no time of a video"),
        (RED, {"at": [1.0]}, "1 prompt can use 0 times"),
        ([RED, BLUE], {"seconds": 0.1}, "2 segments in a video of 1 block"),
        (RED, {"sampler": "euler"}, "sampler = 'euler' is unknown; choose one of renoise, ode"),
        (Script("a", (RED,), (0,), 2), {"seconds": 1.0}, "leave out seconds and at"),
    ],
)
def test_videos_that_can_not_be(pipeline, prompts, given, message):
    with pytest.raises(ValueError) as error:
        kvpo.generate(pipeline, prompts, **given)
    assert message in str(error.value)


def test_generators_that_can_not_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no pipeline folder"):
        kvpo.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype = 'float16' is unknown"):
        kvpo.load("mini", dtype="float16")


# --- Measurements ---


def test_a_comparison_is_the_commands_comparison(threaded, recipe, folder, tmp_path):
    (run,), _ = threaded
    weights, out = f"{run.folder}:online", tmp_path / "compared.json"
    options = ["--against", str(folder), "--recipe", recipe, "--scripts", "3", "--device", "cpu"]
    assert cli.main(["evaluate", weights, *options, "--out", str(out)]) == 0
    given = {"recipe": recipe, "scripts": 3, "device": "cpu"}
    found = kvpo.evaluate(kvpo.load(weights, device="cpu"), folder, **given)
    rows = json.loads(out.read_text())["rows"]
    assert [(row.component, row.diff, row.low, row.high) for row in found.rows] == [
        (row["component"], row["diff"], row["low"], row["high"]) for row in rows
    ]
    assert found.rows[1].diff != 0 and "3 scripts, 1 video of each" in str(found)
    assert f"A = {weights}, B = {folder}" in str(found)


def test_a_generator_alone_has_means_with_intervals(pipeline, recipe):
    found = kvpo.evaluate(pipeline, recipe=recipe, scripts=3, device="cpu")
    assert [row.component for row in found.rows] == ["mean of trained", "Warmth", "Change"]
    assert all(row.low < row.mean < row.high and row.n == 3 for row in found.rows)
    assert f"{found['Warmth'].mean:.4f}" in str(found)
    with pytest.raises(KeyError, match="no component 'warm'; there are mean of trained, Warmth"):
        found["warm"]


def test_an_evaluator_of_a_trained_family_is_called_so(threaded, recipe):
    """Also where the generator was loaded before, and is no longer named by its run."""
    (run,), _ = threaded
    rewards = [{"name": "tiny:Change"}, {"name": "tiny:Warmth", "role": "eval"}]
    config = settle(recipe, {"rewards": rewards})
    weights = kvpo.load(f"{run.folder}:ema", device="cpu")
    assert kvpo.evaluate(weights, recipe=config, scripts=2)["Warmth"].kind == "related"


def test_exploring_is_the_commands_exploring(recipe, tmp_path):
    assert (
        cli.main(["explore", recipe, "--script", "1", "--fork", "4", "--out", str(tmp_path)]) == 0
    )
    (path,) = tmp_path.glob("*/groups/*/group.json")
    record = json.loads(path.read_text())
    found = kvpo.explore(recipe, script=1, fork=4)
    assert [list(plan.frames) for plan in found.plans] == record["plans"]
    assert found.fork == record["fork"] and found.energies.tolist() == record["energies"]
    assert found.rewards.local[0].tolist() == record["rewards"]["local"]["Warmth"]
    assert found.pixels.dtype == torch.uint8 and len(found.pixels) == len(found.plans) == 4
    assert "branch 2" in str(found) and "anchor" in str(found)


def test_explorations_that_can_not_be(recipe):
    with pytest.raises(ValueError, match="script = 2 does not exist: the recipe's are 0 to 1"):
        kvpo.explore(recipe, script=2)
    with pytest.raises(ValueError, match="by = 'noise' is no explorer"):
        kvpo.explore(recipe, by="noise")


# --- Bug reports ---


def test_the_facts_for_a_bug_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KVPO_CACHE", str(tmp_path))
    assert cli.main(["env"]) == 0
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert found["kvpo"] == kvpo.__version__ and found["torch"].startswith("2.")
    assert (
        found["python"] == ".".join(map(str, sys.version_info[:3])) and " thread" in found["device"]
    )
    assert f"{tmp_path} (by $KVPO_CACHE)" in found["prompt"]
