"""docs/errors/ has every refusal of the program; this imports nothing of the program."""

from __future__ import annotations

import ast

import pytest

from docs import make_errors
from docs.make_errors import render, section_of, split


def test_the_pages_are_what_the_code_says():
    """Whoever changes a message makes the pages anew: python docs/make_errors.py --write."""
    pages = make_errors.pages()
    there = {make_errors.PAGE, *make_errors.PAGE.with_suffix("").glob("*.md")}
    assert {path: path.read_text(encoding="utf-8") for path in there} == pages
    assert all(text.count("\n") < 400 for text in pages.values()), "split that section"


def test_messages_of_users_say_the_way_out():
    """Some thirty had none.  What only programs of one's own can meet may lack it."""
    lacking = [
        f"{m.file}: {m.text}"
        for m in make_errors.messages()
        if not m.ways and section_of(m.file) != make_errors.OF_PROGRAMS
    ]
    assert not lacking


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("no answers; give files", ("no answers", "", "give files")),
        ("n = {n}, but two are needed; set 2", ("n = {n}", "but two are needed", "set 2")),
        ("it is not there: {why}", ("it is not there: {why}", "", "")),
        (
            "these can not be paired: nothing would be learnt; use the other",
            ("these can not be paired", "nothing would be learnt", "use the other"),
        ),
        ("n = {n} must lie in (0, 1): 0 is no", ("n = {n}", "0 is no", "must lie in (0, 1)")),
        (
            "it broke; nothing was saved. Free disk space",
            ("it broke", "nothing was saved", "Free disk space"),
        ),
    ],
)
def test_a_message_is_cut_at_its_own_signs(message, parts):
    assert split(message) == parts


def test_values_are_named_as_a_reader_would():
    expression = ast.parse(
        'f"{self.config.steps} of {len(rows)}: {\', \'.join(sorted(names))}" + (f"; did you mean {near[0]!r}?" if near else "; see above")',
        mode="eval",
    ).body
    assert render(expression, make_errors.modules()[0], None) == [
        "{steps} of {number of rows}: {names}; did you mean {near}?",
        "{steps} of {number of rows}: {names}; see above",
    ]


def test_a_file_without_a_section_is_refused():
    with pytest.raises(ValueError, match="kvpo/new.py has messages for users and no section"):
        section_of("new.py")
