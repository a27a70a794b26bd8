"""Public prompt sets: read from their authors' formats, refused when they are something else,
and prompt files in the end."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvpo.commands.prompts import Prompts
from kvpo.evaluation import prompt_sets
from kvpo.evaluation.prompt_sets import SETS, write_set
from kvpo.method.prompts import read_scripts

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "prompts"

FILES = {
    "vbench": json.dumps(
        [
            {"prompt_en": "a cat", "dimension": ["color"]},
            {"prompt_en": "[a] dog, oil", "dimension": ["scene"]},
            {"prompt_en": "a cat", "dimension": ["scene"]},
        ]
    ),
    "moviegen": "a cat\n\n  [a] dog, oil  \n",
    "interactive": '{"prompts": ["a cat", "it sleeps"]}\n{"prompts": ["[a] dog, oil", "it runs"]}\n',
    "ta_hard": '\ufeffprompt,prompt_zh\na cat,猫\n"[a] dog, oil",狗\n',
}


@pytest.fixture
def small(monkeypatch):
    """The sets, as if each had two scripts."""
    monkeypatch.setattr(
        prompt_sets, "SETS", {name: replace(s, scripts=2) for name, s in SETS.items()}
    )


@pytest.mark.parametrize("name", SETS)
def test_every_format_becomes_a_prompt_file(small, tmp_path, name):
    """Two scripts; brackets, commas and a quoted cell belong to the prompt, a prompt that stands
    twice counts once."""
    (tmp_path / "theirs").write_text(FILES[name], encoding="utf-8")
    path = write_set(name, str(tmp_path / "theirs"), tmp_path / "out")
    one, two = read_scripts(path, 4)
    assert (one.id, two.id) == (f"{name}-0001", f"{name}-0002") and (
        one.texts[0],
        two.texts[0],
    ) == ("a cat", "[a] dog, oil")
    assert len(one.texts) == (2 if name == "interactive" else 1)
    record = json.loads((tmp_path / "out" / f"{name}.source.json").read_text())
    assert (
        record["sha256"] == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()
        and record["licence"] == SETS[name].licence
        and record["scripts"] == 2
    )


@pytest.mark.parametrize(
    ("name", "file", "scripts", "prompts"),
    [("interactive", "interactive_100x6.jsonl", 100, 6), ("ta_hard", "ta_hard.csv", 72, 1)],
)
def test_the_authors_own_files(tmp_path, name, file, scripts, prompts):
    if not (PUBLIC / file).is_file():
        pytest.skip(f"{file} is not here")
    found = read_scripts(write_set(name, str(PUBLIC / file), tmp_path), 12)
    assert len(found) == scripts and {len(s.texts) for s in found} == {prompts}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vbench", "a cat\n", "does not read as vbench"),
        ("vbench", '[{"prompt": "a cat"}]', "KeyError: 'prompt_en'"),
        ("vbench", '["a cat"]', "TypeError"),
        ("ta_hard", "text\na cat\n", "KeyError: 'prompt'"),
        ("moviegen", "a cat\na dog\na fox\n", "holds 3 scripts, but moviegen has 2"),
        ("moviegen", b"\xff", "UnicodeDecodeError"),
    ],
)
def test_another_file_is_refused(small, tmp_path, name, content, message):
    (tmp_path / "x").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        write_set(name, str(tmp_path / "x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_way_out_is_said(tmp_path, monkeypatch):
    def unreachable(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(prompt_sets.urllib.request, "urlopen", unreachable)
    with pytest.raises(OSError, match=r"no route.*Vchitect/VBench.*--source FILE"):
        Prompts("vbench", out=tmp_path / "out")()
    with pytest.raises(ValueError, match=r"no lasting address of ta_hard.*--source FILE"):
        Prompts("ta_hard", out=tmp_path / "out")()
    with pytest.raises(ValueError, match="no prompt set 'vbnech'; choose one of vbench, moviegen"):
        Prompts("vbnech", out=tmp_path / "out")()
    assert not (tmp_path / "out").exists()


def test_the_list_names_source_and_licence(capsys):
    Prompts()()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SETS) and all(
        s.licence in line and s.source in line for line, s in zip(lines, SETS.values())
    )
