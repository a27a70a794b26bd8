"""The documents say what is there: files, symbols, tests, commands, the example that users copy."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml

import kvpo
from benchmarks.reward_table import Row, page
from kvpo.commands import main as cli
from kvpo.config import RunConfig, from_dict
from kvpo.rewards.base import VideoBatch, check_output
from kvpo.rewards.registry import SHIPPED, find, make_reward

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IGNORED = {".git", ".venv", "runs", "build", "dist", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
"""At the top; kvpo/runs is code."""
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".html", ".sh", ""}


def files(folder: Path) -> list[Path]:
    """Files below, without what git ignores."""
    return [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not _ignored(p.relative_to(ROOT).parts)
    ]


def _ignored(parts: tuple[str, ...]) -> bool:
    return (
        parts[0] in IGNORED
        or "__pycache__" in parts
        or any(part.endswith(".egg-info") for part in parts)
    )


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```", path.read_text(encoding="utf-8"), flags=re.S | re.M
    )


# --- Data ---


def test_data_is_packaged():
    """What is not Python reaches an installed package only by a pattern of pyproject.toml."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["kvpo"]
    packaged = {p for pattern in patterns for p in (ROOT / "kvpo").glob(pattern)}
    assert not [p for p in files(ROOT / "kvpo") if p.suffix != ".py" and p not in packaged]


# --- Symbols, tests, links ---


def named(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or class defines, name -> node."""
    found = {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
    return found


@cache
def parsed(path: Path) -> dict[str, ast.stmt]:
    return named(ast.parse(path.read_text(encoding="utf-8")).body)


def exists(symbol: str) -> bool:
    """``kvpo.method.replay.Replay.passes``: a module, then names that it defines; read, not
    imported."""
    parts = symbol.split(".")
    if (
        len(parts) == 2 and parts[1] in kvpo.__all__
    ):  # a public name, which the package itself finds when it is asked for
        return True
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:n])
        if path.is_dir():
            return n == len(parts)
        if not path.with_suffix(".py").is_file():
            continue
        names = parsed(path.with_suffix(".py"))
        for name in parts[n:]:
            if name not in names:
                return False
            names = named(getattr(names[name], "body", []))
        return True
    return False


@cache
def known_tests() -> set[str]:
    return {f"{p.name}::{name}" for p in (ROOT / "tests").rglob("test_*.py") for name in parsed(p)}


def test_names_that_do_not_exist_are_seen():
    assert exists("kvpo.method.replay.Replay.passes") and exists("kvpo.types.BranchPlan.frames")
    assert not exists("kvpo.method.replay.Replay.pass") and not exists("kvpo.nothing.at_all")


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_cited_symbols_and_tests_exist(path):
    text = path.read_text(encoding="utf-8")
    symbols = re.findall(r"`((?:kvpo|tests)(?:\.\w+)+)`", text)
    assert not [s for s in symbols if not s.endswith(".py") and not exists(s)]
    assert not [t for t in re.findall(r"`(test_\w+\.py::\w+)`", text) if t not in known_tests()]
    assert not [
        f
        for f in re.findall(r"`((?:tests|kvpo|benchmarks|docs)/[\w./]+)`", text)
        if not (ROOT / f).exists()
    ]


def test_every_equation_has_its_function_and_its_test():
    (section,) = re.findall(
        r"^## 2 .*?(?=^## 3 )", (ROOT / "docs" / "method.md").read_text(), flags=re.S | re.M
    )
    rows = [
        [cell.strip() for cell in line.strip("|\n").split(" | ")]
        for line in section.splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) > 20
    for rule, function, proof in rows:
        assert "`kvpo." in function and ("`test_" in proof or "`kvpo.doctor.doctor" in proof), rule


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"(?<!!)\[[^\]]+\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert not [t for t in targets if not t.startswith("http") and not (path.parent / t).exists()]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_no_line_numbers_are_cited(path):
    assert not re.findall(r"\.py[:#]L?\d+", path.read_text(encoding="utf-8"))


def test_nothing_of_a_machine_is_written_down():
    """Neither its folders nor the addresses of its package registries."""
    machine = re.compile(
        r"(?<![\w.])/(?:work|tmp|home|root|Users|mnt)/\w|file://|(?:index-url|find-links|trusted-host)|https?://\S*(?:pypi|simple/|artifactory|nexus|mirror)"
    )
    texts = {
        p: p.read_text(encoding="utf-8", errors="replace")
        for p in files(ROOT)
        if p.suffix in TEXT and p != Path(__file__)
    }
    assert not {
        str(p.relative_to(ROOT)): found
        for p, text in texts.items()
        if (found := machine.findall(text))
    }


# --- The site ---


def test_every_page_is_in_the_menu_once():
    """`make docs` refuses a page without an entry as well, but not one that has two."""
    found = re.findall(r"^ +- .*: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    docs = ROOT / "docs"
    assert sorted(found) == sorted(str(p.relative_to(docs)) for p in docs.rglob("*.md"))


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    names = [name for name in kvpo.__all__ if name != "__version__"]
    assert not [n for n in names if f"::: {kvpo._HOMES[n]}.{n}\n" not in page]


def test_the_reference_has_every_section_of_the_settings():
    page = (ROOT / "docs" / "settings.md").read_text()
    sections = {n: c for n, c in get_type_hints(RunConfig).items() if is_dataclass(c)}
    assert len(sections) > 15
    heads = [f"## Section `{n}`\n\n::: {c.__module__}.{c.__name__}\n" for n, c in sections.items()]
    assert not [head for head in heads if head not in page]


def test_the_linter_has_one_version():
    """In the dev extra, in the one of the site, and in the hooks of commits."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hooked,) = [repo["rev"] for repo in hooks if "ruff" in repo["repo"]]
    pinned = {p for name in ("dev", "docs") for p in extras[name] if p.startswith("ruff")}
    assert pinned == {f"ruff=={hooked.removeprefix('v')}"}


# --- Commands and the example ---


def commands(path: Path) -> list[list[str]]:
    """Every ``kvpo ...`` in the shell blocks of a document, a loop's variables replaced by one
    value."""
    text = "\n".join(blocks(path, "bash")).replace("$seed", "0").replace("$which", "ema")
    return [
        shlex.split(found, comments=True)
        for found in re.findall(r"(?:^|(?<=do ))\s*(kvpo [^;\n]*)", text, flags=re.M)
    ]


@pytest.mark.parametrize("path", [p for p in DOCS if commands(p)], ids=lambda p: p.name)
def test_commands_are_understood(path):
    for program, name, *args in commands(path):
        assert program == "kvpo" and callable(cli._parse(name, args))


def test_the_readme_shows_every_command():
    assert {name for _, name, *_ in commands(ROOT / "README.md")} == set(cli.COMMANDS)


def test_the_rewards_of_the_guide_are_a_recipe():
    (recipe,) = blocks(ROOT / "docs" / "own_reward.md", "yaml")
    assert [r.name for r in from_dict(yaml.safe_load(recipe)).rewards] == [
        "my_reward:Brightness",
        "world_ta",
        "attributes",
    ]


def test_the_example_reward_works(tmp_path, monkeypatch):
    """As a user has it: a file in the working folder, named on the command line."""
    (code,) = blocks(ROOT / "docs" / "own_reward.md", "python")
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    (named,) = [
        c
        for c in commands(ROOT / "docs" / "own_reward.md")
        if c[1] == "align" and "my_reward:Brightness" in c
    ]
    reward = make_reward(cli._parse(named[1], named[2:]).settings.rewards[0].name)
    reward.load("cpu")
    frames = torch.stack([torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 255)]).to(torch.uint8)
    batch = VideoBatch(frames, 16.0, ("night", "day"))
    output = check_output(reward.spec, batch, reward.score(batch))
    assert output.scores.tolist() == [0.0, 1.0] and output.valid.all()
    del sys.modules["my_reward"]


def test_the_reward_of_the_tutorial_works():
    """It is red, and the recipe beside it is one."""
    page = ROOT / "docs" / "tutorial.md"
    (code,), (recipe,) = blocks(page, "python"), blocks(page, "yaml")
    names: dict = {}
    exec(code, names)
    frames = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    frames[0, :, 0] = 255
    scores = names["redness"](VideoBatch(frames, 16.0, ("red", "night")))
    assert scores.tolist() == [1.0, 0.0]
    assert from_dict(yaml.safe_load(recipe)).rewards[0].name == "my_reward:redness"


def test_the_table_of_rewards_is_that_of_the_code():
    """All but what was measured; and whoever was measured there was measured on some clips."""
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "rewards.json").read_text())
    rows = [
        Row(name, find(name).spec, results[name]["won"], results[name]["clips"]) for name in SHIPPED
    ]
    assert text == page(rows)
    assert (
        all(bool(row.won) == (row.clips > 0) for row in rows)
        and sum(bool(row.won) for row in rows) >= 10
    )
