"""Prompt files and the order in which groups get their scripts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from kvpo.method.prompt_files import outer_brackets
from kvpo.method.prompts import PromptSet, ScriptSource, even_starts, read_scripts, starts_at
from kvpo.mini.source import StorySource
from kvpo.mini.stories import vocabulary
from kvpo.types import Script

BLOCKS = 49


@pytest.fixture
def read(tmp_path):
    """read(content, suffix) -> scripts of a file with that content."""

    def read(content: str | bytes, suffix: str = ".txt", blocks: int = BLOCKS, **options):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_scripts(path, blocks, **options)

    return read


def texts(scripts) -> list[tuple[str, ...]]:
    return [script.texts for script in scripts]


# --- Formats ---


def test_plain_lines_are_scripts_of_one_prompt(read):
    scripts = read("a cat sleeps\n\n  2 dogs, one [red], run  \r\nlast")
    assert texts(scripts) == [("a cat sleeps",), ("2 dogs, one [red], run",), ("last",)]
    assert [script.id for script in scripts] == ["prompts.txt:1", "prompts.txt:3", "prompts.txt:4"]
    assert all(script.starts == (0,) and script.blocks == BLOCKS for script in scripts)


def test_bracketed_lines(read):
    scripts = read("2,[a cat, on a mat],[ the cat jumps ]\n\n 3 , [x] , [y [inner] z],[w]\n")
    assert texts(scripts) == [("a cat, on a mat", "the cat jumps"), ("x", "y [inner] z", "w")]


def test_jsonl(read):
    lines = [{"prompts": ["a", " b "]}, {"prompts": ["c ]", "d"], "starts": [0, 40], "id": 7}]
    scripts = read("\n".join(json.dumps(line) for line in lines), ".jsonl")
    assert texts(scripts) == [("a", "b"), ("c ]", "d")]
    assert [script.starts for script in scripts] == [(0, 24), (0, 40)]
    assert [script.id for script in scripts] == ["prompts.jsonl:1", "7"]


def test_files_from_windows_read_the_same(read):
    assert texts(read(b"\xef\xbb\xbf2,[a],[b]\r\n1,[c]\r\n")) == [("a", "b"), ("c",)]


def test_only_the_first_prompts_may_be_kept(read):
    """Released files hold six prompts a line, of which a video of 147 frames uses four."""
    scripts = read("6,[a],[b],[c],[d],[e],[f]\n1,[g]", max_segments=4, switches=(13, 25, 37))
    assert texts(scripts) == [("a", "b", "c", "d"), ("g",)]
    (script,) = read('{"prompts": ["a", "b", "c"], "starts": [0, 5, 9]}', ".jsonl", max_segments=2)
    assert script.texts == ("a", "b") and script.starts == (0, 5)


# --- Switches ---


@pytest.mark.parametrize("blocks", (4, 7, 49))
@pytest.mark.parametrize("segments", (1, 2, 3, 4))
def test_even_starts(segments, blocks):
    starts = even_starts(segments, blocks)
    lengths = [b - a for a, b in zip(starts, (*starts[1:], blocks))]
    assert starts[0] == 0 and sum(lengths) == blocks and max(lengths) - min(lengths) <= 1


def test_the_papers_switches():
    """Latent frames 39, 75, 111 of 147, three frames a block."""
    script = Script("s", ("a", "b", "c", "d"), starts_at((13, 25, 37), 4), BLOCKS)
    assert [3 * start for start in script.starts] == [0, 39, 75, 111]
    assert starts_at((13, 25, 37), 2) == (0, 13) and starts_at((), 1) == (0,)


def test_switches_apply_to_scripts_without_their_own(read):
    scripts = read(
        '{"prompts": ["a", "b"]}\n{"prompts": ["a", "b"], "starts": [0, 3]}',
        ".jsonl",
        switches=[20],
    )
    assert [script.starts for script in scripts] == [(0, 20), (0, 3)]


# --- Bad files ---


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".txt", "", "no prompts in it"),
        (".jsonl", "\n \n", "no prompts in it"),
        (".txt", b"good\nbad \xff\n", "line 2: byte 0xff is not UTF-8; save the file as UTF-8"),
        (
            ".txt",
            "2,[a],[b]\n2,[unclosed,[b]",
            r"line 2, column 3: unbalanced '\['; close it .*The line: 2,\[unclosed",
        ),
        (".txt", "2,[a]],[b]", r"line 1, column 6: unbalanced '\]'"),
        (".txt", "3,[a],[b]", "line 1, column 1: it says 3 prompts but has 2; correct the count"),
        (".txt", "1,[a]\n0,", "line 2: there are no prompts in it; take the line out"),
        (
            ".txt",
            "[a] cat",
            r"the number of its prompts and a comma, as in 2,\[a\],\[b\] \(JSONL can hold any text\)",
        ),
        (".txt", "[a],[b]", "line 1, column 1: the line must begin with the number of its prompts"),
        (".txt", "1,[a]\nplain", "line 2, column 1: the line must begin with the number"),
        (
            ".txt",
            "plain\n1,[a]",
            r"line 2: this looks like the format N,\[a\],\[b\], but the file begins with plain lines",
        ),
        (
            ".txt",
            "2,[a] and [b]",
            "line 1, column 7: 'and' stands outside the brackets, where there should be one comma",
        ),
        (".txt", "2,[a],,[b]", "line 1, column 6: ',,' stands outside the brackets"),
        (
            ".txt",
            "1,[a] tail",
            "line 1, column 7: 'tail' stands outside the brackets, where there should be nothing",
        ),
        (".txt", "2,[a],[ ]", "line 1, column 7: a prompt must be text that is not blank"),
        (".jsonl", '{"prompts": ["a"]}\n{"prompts": ["a"', "line 2, column 17: not JSON"),
        (".jsonl", '["a"]', 'line 1: a script must be an object with the key "prompts"'),
        (".jsonl", '{"prompt": ["a"]}', 'a prompt must be text that is not blank, not \\["a"\\]'),
        (
            ".jsonl",
            '{"prompt": "a", "prompts": ["a"]}',
            'the key "prompts", a list of texts, or "prompt"',
        ),
        (
            ".jsonl",
            '{"prompts": ["a"], "strats": [0]}',
            r"unknown keys \['strats'\]; known are prompts, prompt, starts, id",
        ),
        (".jsonl", '{"prompts": "a"}', '"prompts" must be a list of at least one text, not "a"'),
        (".jsonl", '{"prompts": []}', "at least one text"),
        (".jsonl", '{"prompts": ["a", 1]}', "a prompt must be text that is not blank, not 1"),
        (".jsonl", '{"prompts": ["a", " "]}', "a prompt must be text that is not blank"),
        (".jsonl", '{"prompts": ["a", "b"], "starts": [0]}', "2 prompts but 1 starts"),
        (
            ".jsonl",
            '{"prompts": ["a", "b"], "starts": [0, 1.5]}',
            "must be a list of whole numbers",
        ),
        (
            ".jsonl",
            '{"prompts": ["a", "b"], "starts": [0, true]}',
            "must be a list of whole numbers",
        ),
        (".jsonl", '{"prompts": ["a", "b"], "starts": [1, 2]}', "line 1: script .*must begin at 0"),
        (
            ".jsonl",
            '{"prompts": ["a", "b"], "starts": [0, 49]}',
            "the video has 49 blocks; lengthen the video",
        ),
        (".jsonl", '{"prompts": ["a"], "id": ["x"]}', '"id" must be a number or a printable text'),
        (
            ".jsonl",
            '{"prompts": ["a"], "id": "x"}\n{"prompts": ["b"], "id": "x"}',
            "line 2: the id 'x' is taken by an earlier line",
        ),
    ],
)
def test_bad_files_are_refused_with_their_line(read, suffix, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(content, suffix)
    assert f"prompts{suffix}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_line_is_shown_cut(read):
    with pytest.raises(ValueError) as caught:
        read("2,[" + "a" * 5000 + "]")
    assert len(str(caught.value)) < 400


def test_more_segments_than_blocks_are_refused(read):
    with pytest.raises(
        ValueError,
        match="line 2: 3 segments in a video of 2 blocks: every segment needs at least one block; lengthen the video or drop",
    ):
        read("1,[a]\n3,[a],[b],[c]", blocks=2)


def test_too_few_switches_are_refused(read):
    with pytest.raises(
        ValueError,
        match=r"line 1: 3 segments need 2 switch blocks, but switches = \[4\]; add switches",
    ):
        read("3,[a],[b],[c]", switches=[4])


def test_keeping_no_prompt_is_refused(read):
    with pytest.raises(ValueError, match="max_segments = 0 would leave scripts without a prompt"):
        read("a", max_segments=0)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_scripts(tmp_path / "nowhere.txt", BLOCKS)


@pytest.mark.parametrize(
    ("text", "pairs", "stray"),
    [
        ("[a][b]", [(0, 2), (3, 5)], []),
        ("[a[b]c]", [(0, 6)], []),
        ("[a[b]", [], [0]),
        ("a]b[c]", [(3, 5)], [1]),
        ("]][", [], [0, 1, 2]),
        ("", [], []),
    ],
)
def test_outer_brackets(text, pairs, stray):
    assert outer_brackets(text) == (pairs, stray)


# --- Order ---


def prompt_set(count: int = 7, groups: int = 3, seed: int = 0) -> PromptSet:
    return PromptSet(
        tuple(Script(f"s{i}", (f"text {i}",), (0,), 4) for i in range(count)), groups, seed
    )


def ids(source: ScriptSource, steps, groups: int = 3) -> list[str]:
    return [source.script(step, index).id for step in steps for index in range(groups)]


def test_every_epoch_shows_every_script_once():
    shown = ids(prompt_set(), range(7))
    for epoch in range(3):
        assert Counter(shown[7 * epoch : 7 * epoch + 7]) == Counter(f"s{i}" for i in range(7))
    assert shown[:7] != shown[7:14]


def test_a_resumed_run_continues_where_it_stopped():
    """The position is a function of the step: nothing is saved, nothing can be lost."""
    assert ids(prompt_set(), range(10))[12:] == ids(prompt_set(), range(4, 10))


def test_another_seed_is_another_order():
    assert ids(prompt_set(seed=1), range(7)) != ids(prompt_set(seed=0), range(7))


def test_more_groups_than_scripts_begin_the_next_epoch():
    shown = ids(prompt_set(count=2, groups=5), [0, 1], groups=5)
    assert Counter(shown) == {"s0": 5, "s1": 5}


@pytest.mark.parametrize(("step", "index"), [(-1, 0), (0, 3), (0, -1)])
def test_a_group_that_does_not_exist_is_refused(step, index):
    with pytest.raises(ValueError, match=f"group {index} of step {step} does not exist"):
        prompt_set().script(step, index)


def test_empty_sets_and_steps_are_refused():
    with pytest.raises(ValueError, match="at least one script"):
        PromptSet((), 1, 0)
    with pytest.raises(ValueError, match="groups = 0"):
        prompt_set(groups=0)


# --- Stories without end ---


def stories(source: StorySource, steps: int = 60, groups: int = 2):
    return [source.story(step, index) for step in range(steps) for index in range(groups)]


def test_stories_are_functions_of_seed_split_step_and_index():
    source = StorySource(seed=3)
    assert source.script(5, 1) == StorySource(seed=3).script(5, 1)
    others = (
        StorySource(seed=4).script(5, 1),
        StorySource(3, "evaluate").script(5, 1),
        source.script(6, 1),
        source.script(5, 0),
    )
    assert all(
        (other.texts, other.starts) != (source.script(5, 1).texts, source.script(5, 1).starts)
        for other in others
    )


def test_stories_have_their_own_ids_and_length():
    scripts = [story.script for story in stories(StorySource(0, blocks=7))]
    assert len({script.id for script in scripts}) == len(scripts)
    assert {script.blocks for script in scripts} == {7}
    assert {len(script.texts) for script in scripts} == {1, 2, 3, 4}


@pytest.mark.parametrize("memory", (0.0, 0.5, 1.0))
def test_share_of_stories_that_need_memory(memory):
    found = [story.needs_memory for story in stories(StorySource(0, memory=memory))]
    assert sum(found) / len(found) == pytest.approx(memory, abs=0.15 if 0.0 < memory < 1.0 else 0.0)


def test_the_number_of_segments_can_be_set():
    assert {len(story.script.texts) for story in stories(StorySource(0, segments=3), steps=10)} == {
        3
    }
    assert {
        len(story.script.texts)
        for story in stories(StorySource(0, segments=1, memory=0.0, blocks=1), steps=10)
    } == {1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"segments": 5}, "segments = 5, but a story has 1 to 4"),
        ({"segments": 0}, "segments = 0, but a story has 1 to 4"),
        ({"blocks": 3}, "blocks = 3 is too short for stories of up to 4 segments"),
        ({"memory": 1.5}, "memory = 1.5 must lie between 0 and 1"),
        (
            {"segments": 2},
            "segments = 2 leaves no room for hide and seek, which takes 3; set memory = 0",
        ),
    ],
)
def test_story_settings_that_cannot_be_met_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        StorySource(seed=0, **bad)


def test_a_story_of_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="give both from 0 on"):
        StorySource(0).story(-1, 0)


def test_both_sources_fit_the_same_place():
    for source in (prompt_set(), StorySource(0)):
        assert isinstance(source.script(step=2, index=1), Script)


# --- The format's page ---


def test_the_page_lists_the_miniature_s_words():
    page = (Path(__file__).resolve().parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(.*?)```", page, flags=re.S)
    assert block.split() == vocabulary()


def test_the_page_s_examples_are_read(read):
    page = (Path(__file__).resolve().parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    examples = [
        re.search(r"`(.+?)`", line)[1]
        for line in page.splitlines()
        if line.startswith(("| lines", "| brackets", "| JSONL"))
    ]
    assert [
        len(texts) for example in examples for texts in map(lambda s: s.texts, read(example))
    ] == [1, 2, 2, 1]
