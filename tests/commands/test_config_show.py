"""`kvpo config show`: every setting of a recipe on a line of its own, with its default and what it
is."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kvpo.commands import main as cli
from kvpo.commands.setting_list import (
    field_docs,
    first_sentence,
    sections,
    settings_of,
    unused_sections,
)
from kvpo.common.late import Late
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.method.settings import OptimizerConfig


def shown(capsys, *argv: str) -> dict[str, list[str]]:
    """Setting -> its cells, from what the command prints into a pipe."""
    capsys.readouterr()
    assert cli.main(["config", "show", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [lines[0].index(head) for head in ("setting", "value", "default", "what it is")]
    spans = list(zip(starts, [*starts[1:], None]))
    rows = [line for line in lines[1:] if not line.startswith("not used by this recipe: ")]
    cells = [[line[a:b].strip() for a, b in spans] for line in rows]
    return {name: rest for name, *rest in cells}


def test_a_changed_setting_has_its_default_beside_it(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: 7\noptimizer: {clip_of: step}\n")
    found = shown(capsys, str(recipe))
    assert found["steps"][:2] == ["7", str(RunConfig.steps)]
    assert found["optimizer.clip_of"][:2] == ["step", "group"]
    assert found["optimizer.lr"] == ["1e-05", "", "Learning rate after the warm-up."]
    assert [name for name, cells in found.items() if cells[1]] == ["steps", "optimizer.clip_of"]


def test_every_setting_says_what_it_is():
    """Some had a name and a number and nothing else: `beta1`, `factor`, `kl_stop`."""
    found = settings_of(RunConfig())
    first = [s for s in found if not re.fullmatch(r"rewards\.[1-9]\d*", s.name)]
    assert len(first) > 80 and not [s.name for s in first if len(s.about) < 10]
    # A dataclass that has no docstring is given its own signature.
    assert not [name for name, about in sections().items() if "Config(" in about]


def test_sections_that_are_not_chosen_are_left_out(capsys):
    some, everything = shown(capsys, "mini"), shown(capsys, "mini", "--all")
    left_out = {name.partition(".")[0] for name in {*everything} - {*some}}
    assert left_out == {"start_noise", "renoise", "sde", "best_of", "prompt", "denoised_energy"}
    other = replace(RunConfig(), surrogate="denoised_energy")
    assert unused_sections(other) == [
        "best_of",
        "prompt",
        "renoise",
        "sde",
        "start_noise",
        "velocity_energy",
    ]


def test_a_reward_is_its_name_and_what_is_unusual():
    found = {s.name: s for s in settings_of(load_config(recipe_path("longlive")))}
    assert found["rewards.0"].value.startswith("hpsv3, weight 0.4")
    assert found["rewards.0"].default == "world_vq"
    assert found["rewards.3"].value == 'videoreward, role guard, params {"judge": "VQ"}'


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Steps, e.g. 5, that are made. The rest follows.", "Steps, e.g. 5, that are made."),
        ("One\n    line of two. `auto` is another.", "One line of two."),
        ("A title.\n\nMore.", "A title."),
        ("No end", "No end"),
    ],
)
def test_first_sentences(text, first):
    assert first_sentence(text) == first


def test_field_docs_belong_to_the_field_above_them():
    docs = field_docs(OptimizerConfig)
    assert docs["lr"] == "Learning rate after the warm-up." and docs["clip"].startswith("Largest")


def test_a_table_for_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["config", "show", "mini"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.lr" in out and "─" in out and "not used by this recipe: " in out


def test_a_late_module_is_the_module():
    late = Late("math")
    assert late.pi == 3.141592653589793
    with pytest.raises(AttributeError, match="no attribute 'tau_'"):
        late.tau_  # noqa: B018, asking is the test
