"""Prompt and clip lists as people have them: other line ends, other encodings, JSON under any
name, invisible characters."""

from __future__ import annotations

import json

import pytest

from kvpo.method.prompts import read_scripts
from kvpo.rewards.clip_list import clip_rows

THREE = [("a red circle rises",), ("a green square falls",), ("a blue circle turns",)]


@pytest.fixture
def texts(tmp_path):
    """texts(content, name) -> the prompts of every script of a file with that content."""

    def texts(content: str | bytes, name: str = "p.txt"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [script.texts for script in read_scripts(tmp_path / name, 9)]

    return texts


@pytest.fixture
def refusal(texts):
    def refusal(content: str | bytes, name: str = "p.txt") -> str:
        with pytest.raises(ValueError) as caught:
            texts(content, name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


# --- Line ends and encodings ---


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_line_end_ends_a_line_in_every_encoding(texts, end, encoding):
    """Three prompts that old Mac software had ended by CR were one script, and nobody was told;
    UTF-16 was refused at byte 0xff."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert texts((mark + end.join(text for (text,) in THREE) + end).encode(encoding)) == THREE
    numbered = (mark + end.join(f"1,[{text}]" for (text,) in THREE)).encode(encoding)
    assert texts(numbered) == THREE
    lines = (mark + end.join(json.dumps({"prompts": list(text)}) for text in THREE)).encode(
        encoding
    )
    assert texts(lines) == THREE == texts(lines, "p.jsonl")


@pytest.mark.parametrize("soft", ["\x85", "\u2028", "\u2029"])
def test_a_separator_beside_ordinary_line_ends_is_refused(refusal, soft):
    """It may end a line or belong to the prompt that it was pasted with: either guess cuts or
    joins prompts unseen."""
    assert f"line 2: the character U+{ord(soft):04X}" in refusal(
        f"a red circle rises\nit turns{soft}blue\n"
    )


def test_a_separator_inside_a_json_text_belongs_to_it(texts):
    assert texts('{"prompt": "it turns\u2028blue"}\n{"prompt": "b"}\n') == [
        ("it turns\u2028blue",),
        ("b",),
    ]


def test_marks_that_joining_files_leaves(texts, refusal):
    """`cat a.txt b.txt` leaves a mark at the head of b's first line, or inside a line where a's
    last had no end: two prompts in one."""
    assert texts("\ufeffa red circle rises\n\ufeffa green square falls\n") == THREE[:2]
    assert "line 1: there is a byte order mark inside the line" in refusal(
        "a red circle rises\ufeffa green square falls\n"
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a\nb \xe9\n", "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a\nb\n".encode("utf-16-le"), "line 1: there is a NUL, as UTF-16 has them"),
        (b"\xff\xfea\x00\n\x00b\x00\x00\xd8c\x00", "line 2: byte 0x00 is not UTF-16-LE"),
        (b"a\nb\xed\xa0\xbd\n", "line 2: byte 0xed is not UTF-8"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_their_line(refusal, raw, message):
    assert message in refusal(raw)


# --- What shows nothing ---


@pytest.mark.parametrize(
    "nothing", ["\u200b", "\u200b\u200d \u2060", "\u3164", "\u2800\u00a0", "\ufe0f", "\x07"]
)
def test_a_prompt_of_which_nothing_is_seen_is_refused(refusal, nothing):
    """A line of zero-width characters looked blank, and made a video of no prompt."""
    assert "line 2: a prompt must be text that is not blank" in refusal(f"a\n{nothing}\n")
    assert "line 1: a prompt must be text that is not blank" in refusal(
        json.dumps({"prompts": [nothing]})
    )
    assert "a prompt must be text that is not blank" in refusal(f"2,[a],[{nothing}]")


def test_zero_width_characters_inside_a_prompt_stay(texts):
    """Families of emoji and many scripts are joined by them."""
    family = "a family \U0001f468\u200d\U0001f469\u200d\U0001f467 walks"
    assert texts(family) == [(family,)]


def test_half_a_surrogate_pair_is_refused(refusal, texts):
    """It was a traceback, from the tokenizer, after the generator had been loaded."""
    assert (
        "line 2: the prompt"
        in (said := refusal('{"prompt": "a"}\n{"prompts": ["it turns blue \\ud83d"]}'))
        and "half of a surrogate pair (U+D83D)" in said
    )
    assert texts('{"prompt": "it turns \\ud83d\\ude00"}') == [("it turns \U0001f600",)]
    assert '"id" must be' in refusal('{"prompt": "a", "id": "\\ud83d"}')


def test_control_characters_are_refused(refusal):
    assert "line 1: there is a NUL" in refusal("a\0b") and "control character U+001B" in refusal(
        "a \x1b[31mred circle"
    )


# --- JSON under any name ---


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p", "prompts.ndjson"])
def test_json_is_read_whatever_the_file_is_called(texts, name):
    """JSONL in a .txt was taken for plain lines: the JSON text itself was the prompt, and a video
    of it was made."""
    rows = [{"prompts": ["a", "b"]}, {"prompt": "c"}]
    for content in (
        "\n".join(map(json.dumps, rows)),
        json.dumps(rows),
        json.dumps(rows, indent=1),
        "\n".join(json.dumps(r, indent=2) for r in rows),
    ):
        assert texts(content, name) == [("a", "b"), ("c",)]


def test_every_element_of_a_list_has_an_id_of_its_own(tmp_path):
    """Ids name the random streams, and elements may share a line."""
    (tmp_path / "p.json").write_text(
        '[{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": "own"}]'
    )
    assert [s.id for s in read_scripts(tmp_path / "p.json", 9)] == ["p.json[0]", "p.json[1]", "own"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompts": ["a"]}\nplain', "line 2, column 1: not JSON"),
        (
            'plain\n{"prompts": ["a"]}',
            "line 2: this looks like JSON, but the file begins with plain lines",
        ),
        ("{'prompts': ['a']}", "line 1, column 2: not JSON"),
        ('["a", "b"]', "line 1: a script must be an object"),
        ('[\n {"prompt": "a"},\n {"prompt": 1}\n]', "line 3: a prompt must be text"),
        ('[\n {"prompt": "a"}\n {"prompt": "b"}\n]', "line 3, column 2: not JSON"),
        ('[{"prompt": "a"}\n', "line 1"),
        (
            '[{"prompt": "a"}]\n[{"prompt": "b"}]',
            "line 2, column 1: not JSON (something follows the value)",
        ),
        ('{"prompt": "a"} {"prompt": "b"}', "line 1"),
        (
            '{"prompts": ["a"], "prompts": ["b"]}',
            "line 1, column 1: the key 'prompts' stands there twice",
        ),
        (
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": " x "}',
            "line 2: the id 'x' is taken by an earlier line",
        ),
        (
            '{"prompt": "a", "id": 7}\n{"prompt": "b", "id": "7"}',
            "line 2: the id '7' is taken by an earlier line",
        ),
        ("[" * 100000 + "{", "line 1"),
    ],
)
def test_json_that_does_not_fit_is_refused_with_its_line(refusal, content, message):
    assert message in refusal(content)


def test_braces_in_a_plain_prompt_are_no_json(texts):
    assert texts("{a red|a green} circle rises\n") == [("{a red|a green} circle rises",)]


# --- clips.csv ---


@pytest.fixture
def rows(tmp_path):
    def rows(content: str | bytes):
        (tmp_path / "clips.csv").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        return [row[1:] for row in clip_rows(tmp_path / "clips.csv")]

    return rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_clips_in_every_encoding(rows, end, encoding):
    """With a byte order mark the first column was called "\\ufefffile", and the list was said to
    lack it."""
    assert rows(
        f'file, prompt{end}a.mp4,a cat{end}{end}b.mp4, "a cat, at night"{end}'.encode(encoding)
    ) == [("a.mp4", "a cat"), ("b.mp4", "a cat, at night")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "file,prompt\na.mp4,x\na.mp4,a small red circle, slowly, at night\n",
            "line 3: 4 cells under 2 columns",
        ),
        ("file;prompt\na.mp4;a small red circle\n", "cells are separated by commas"),
        ("file,prompt\na.mp4\n", "line 2: 1 cells under 2 columns"),
        ("file,prompt\na.mp4,\n", "line 2: it has no prompt"),
        ("file,prompt\na.mp4,\u200b\n", "line 2: it has no prompt"),
        ("file,prompt\n,a cat\n", "line 2: it has no file"),
        ("file,prompt,prompt\na.mp4,a,b\n", "line 1: the head line must have each"),
        ('file,prompt\na.mp4,"a cat\nb.mp4,a dog\n', "line 2: the quotes do not fit"),
        ('file,prompt\na.mp4,"a" cat\n', "line 2: the quotes do not fit"),
        ("", "line 1: the head line must have each"),
        ("file,prompt\n", "lists no clip"),
    ],
)
def test_a_line_that_is_not_one_clip_and_its_prompt_is_refused(rows, content, message):
    """An unquoted comma cut the prompt there, and a line without prompt failed later, unnamed."""
    with pytest.raises(ValueError) as caught:
        rows(content)
    assert (
        message in str(caught.value)
        and "clips.csv" in str(caught.value)
        and "\n" not in str(caught.value)
    )


# --- Other kinds of files ---


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("p.csv", 'id,prompt\n1,a cat\n2,"a dog, running"\n', "it is a table"),
        ("p.TSV", "prompt\tid\na cat\t1\n", "it is a table"),
        ("p.yaml", "- a cat\n- a dog\n", "it is no list of lines"),
    ],
)
def test_tables_and_markup_are_no_lists_of_lines(refusal, name, content, what):
    """The head `id,prompt` became the first prompt, and each row with its number and its quotes
    another one: videos were made of all of them."""
    assert what in refusal(content, name)


def test_cells_that_tabs_part_are_not_merged(refusal, texts):
    """Two columns of a spreadsheet that was saved as .txt were one prompt."""
    assert "line 2: there is a tab in the line" in refusal("a cat\na dog\t7\n")
    assert texts('{"prompt": "a cat\\tsleeps"}') == [("a cat\tsleeps",)]
    assert texts("\ta cat\t\n") == [("a cat",)], "around a prompt a tab is a blank"


def test_quotes_around_every_line_are_no_part_of_the_prompts(refusal, texts):
    """A list of JSON texts was refused as .jsonl, and read with its quotes as .txt."""
    for name in ("p.txt", "p.jsonl"):
        assert "line 1: the text stands in quotes" in refusal('"a cat"\n"a dog"\n', name)
    spoken = '"Hello", says "the cat"'
    assert texts(spoken) == [(spoken,)]


def test_a_clip_that_is_listed_twice_is_refused(tmp_path):
    """It counted twice in the calibration; one video with two prompts is two clips."""
    path = tmp_path / "clips.csv"
    path.write_text("file,prompt\na.mp4,a cat\nb.mp4,a cat\na.mp4, a cat \n")
    with pytest.raises(ValueError, match="line 4: a.mp4 with this prompt stands in line 2 already"):
        clip_rows(path)
    path.write_text("file,prompt\na.mp4,a cat\na.mp4,a dog\n")
    assert len(clip_rows(path)) == 2
