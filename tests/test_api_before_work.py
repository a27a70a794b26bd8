"""The library, too, says what is wrong before it loads or makes anything."""

from __future__ import annotations

import math

import pytest
from test_align import settings
from test_before_work import unloaded  # noqa: F401, a fixture
from tiny import BLUE, RED, Warmth

import kvpo
from kvpo.common.video import read_about

pytestmark = pytest.mark.usefixtures("unloaded")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts are empty"),
        ("\u200b", "not blank"),
        ([RED, " "], "not blank"),
        ("it turns \ud83d", "half of a surrogate pair"),
        ("a \x1b[31m red circle", "control character"),
        (None, "must be a text, a list of texts, or a Script"),
        ([RED, 3], "must be text that is not blank, not 3"),
        ("red " * 60, "the prompt has 61 tokens, but this generator reads 24"),
        ("Katzen schlafen", "knows no word of the prompt"),
        (kvpo.Script("a", (RED, ""), (0, 1), 3), "not blank"),
    ],
)
def test_prompts(folder, prompts, message):
    """The command refused all of these; the library loaded the generator, made a video of nothing
    or of an unknown word without saying so, or ended in the tokenizer's traceback."""
    with pytest.raises(ValueError, match=message):
        kvpo.generate(folder, prompts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seconds": -1}, "-1 s is no time"),
        ({"seconds": math.nan}, "nan s is no time"),
        ({"seconds": "2"}, "seconds = .'2'. must be in seconds"),
        ({"seconds": 1e6}, "positions end after 512"),
        ({"at": 1.0}, "at = 1.0 must be in seconds"),
        ({"at": [1, 2]}, "2 prompts can use 1 time"),
        ({"seed": 1.5}, "seed = 1.5 must be a whole number"),
        ({"sampler": "euler"}, "sampler = 'euler' is unknown"),
    ],
)
def test_options(folder, given, message):
    with pytest.raises(ValueError, match=message):
        kvpo.generate(folder, [RED, BLUE], **given)


def test_words_that_the_generator_does_not_know_are_named(folder, capsys):
    """`a cat walking on the beach` gave an empty wall, and the library said nothing."""
    with pytest.raises(AssertionError, match="weights were loaded"):
        kvpo.generate(folder, "a red cat walking")
    assert "does not know 'cat', 'walking'" in " ".join(capsys.readouterr().err.split())


def test_evaluations_and_groups(folder, tmp_path):
    recipe = settings(folder)
    config = kvpo.api.settings.from_dict(recipe)
    (tmp_path / "p.txt").write_text(f"{RED}\n{'red ' * 60}\n")
    with pytest.raises(ValueError, match="p.txt, line 2: the prompt has 61 tokens"):
        kvpo.evaluate(folder, recipe=config, scripts=2, prompts=tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match="nowhere is no pipeline folder"):
        kvpo.evaluate(folder, tmp_path / "nowhere", recipe=config, scripts=2)
    with pytest.raises(ValueError, match="block 0 can not be a fork"):
        kvpo.explore(config, fork=0)
    with pytest.raises(ValueError, match="the prompt has 61 tokens"):
        kvpo.explore(config, script=kvpo.Script("a", ("red " * 60,), (0,), 8))


def test_runs(folder, tmp_path):
    """`kvpo.align` loaded rewards and generator for a folder that it could not write into."""
    config = kvpo.api.settings.from_dict(settings(folder))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written into .* give another place by out"):
        kvpo.align(config, tmp_path / "file" / "run", rewards=[Warmth()])
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        kvpo.align(config, tmp_path / "run", resume=True, rewards=[Warmth()])
    with pytest.raises(ValueError, match="override lets a resumed run"):
        kvpo.align(config, tmp_path / "run", override=True, rewards=[Warmth()])
    with pytest.raises(ValueError, match=r"things are missing(.|\n)*nowhere is no pipeline folder"):
        kvpo.align(
            config,
            tmp_path / "run",
            pipeline=str(tmp_path / "nowhere"),
            data={"prompts": str(tmp_path / "p.txt")},
            rewards=[Warmth()],
        )
    assert not (tmp_path / "run").exists()


def test_a_saved_video_says_where_it_comes_from(pipeline, tmp_path):
    """The command's videos did, the library's did not."""
    video = kvpo.generate(pipeline, kvpo.Script("a", (RED, BLUE), (0, 1), 2), seed=3)
    about = read_about(video.save(tmp_path / "a.mp4"))
    assert about["prompts"] == [RED, BLUE] and about["seed"] == 3
    assert about["generator"] == (pipeline.spec or pipeline.folder)
    assert about["sampler"] == "renoise" and "commit" in about


def test_a_video_is_saved_as_what_its_name_says(pipeline, tmp_path):
    """A video saved as x.gif was an MP4 of that name; a folder ended in the system's words about a
    file that nobody had named."""
    video = kvpo.generate(pipeline, kvpo.Script("a", (RED,), (0,), 1))
    for wrong in (tmp_path, tmp_path / "x.gif", tmp_path / "x"):
        with pytest.raises(ValueError, match="is no name of an MP4; give a file such as"):
            video.save(wrong)
    assert not list(tmp_path.iterdir())
