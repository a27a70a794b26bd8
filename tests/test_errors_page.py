"""docs/errors.md has every refusal of the program; this imports nothing of the program."""

from __future__ import annotations

import ast

import pytest

from docs import make_errors
from docs.make_errors import render, section_of, split


def test_the_page_is_what_the_code_says():
    """Whoever changes a message makes the page anew: python docs/make_errors.py --write."""
    assert make_errors.PAGE.read_text(encoding="utf-8") == make_errors.page()


def test_messages_of_users_say_the_way_out():
    """Outside of what only programs of one's own can meet, a new message without a way out is
    seen here; these few have none, most because another error's text stands before or behind."""
    lacking = {
        f"{m.file}: {m.text}"
        for m in make_errors.messages()
        if not m.ways and section_of(m.file) != make_errors.OF_PROGRAMS
    }
    assert lacking == WITHOUT_A_WAY_OUT


WITHOUT_A_WAY_OUT = {
    "common/json_values.py: not JSON ({msg})",
    "common/json_values.py: brackets within brackets without end are no prompts",
    "common/json_values.py: not JSON (something follows the value)",
    "common/video.py: {number of clips} clips, {number of captions} captions, {number of accents} accents",
    "common/video.py: clips differ in size: {clips}",
    "common/video.py: {number of rows} videos, {frames} frames: strips need at least one of each",
    "generators/embeddings.py: there is no home folder ({error})",
    "generators/pipeline.py: the text encoder is not loaded, and {new} has not been embedded with the others",
    "method/advantages.py: {signal} rewards have shape {shape of r_KB}, expected {K} components x {B} rows",
    "method/energies.py: old energies {energy} are not all finite",
    "method/loss.py: the objective needs one number per branch, of 2 or more branches",
    "method/loss.py: {name} not finite: {bad}",
    "method/prompts.py: a prompt set needs at least one script",
    "method/prompts.py: group {index} of step {step} does not exist",
    "mini/rewards/heldout.py: diversity needs at least 2 videos of a prompt, not {R}",
    "mini/source.py: group {index} of step {step} does not exist",
    "policy/checkpoint.py: it has no {missing}",
    "rewards/isolated/links.py: its worker could not be started with {command}: {error}",
    "rewards/isolated/links.py: its server at {url} refused: {status} {reason}",
    "rewards/isolated/links.py: its server at {url} did not answer as a worker: {error}",
    "rewards/isolated/links.py: its server at {url} did not answer within {timeout} s",
    "rewards/isolated/links.py: its server at {url} can not be reached: {error}",
    "rewards/isolated/reward.py: {who} can not be loaded: {error}",
    "rewards/isolated/reward.py: {who} failed on the other side: {error}",
    "rewards/isolated/wire.py: not a message, it begins with {prefix}",
    "rewards/isolated/wire.py: a message of {header} + {payload} bytes",
    "rewards/isolated/wire.py: shape {shape} and {number of payload} bytes are no frames [B, T, 3, H, W]",
    "rewards/isolated/worker.py: {name} of clip {clip} is {value}",
    "rewards/scorer.py: reward {name} failed on {number of batch} clips of {length} frames ({filename}:{lineno}): {type of error}: {error}",
    "studio/tree.py: format 1 is needed",
    "studio/tree.py: a story has a name, a generator, a sampler and a node",
    "studio/tree.py: node {number} must leave another one at a block",
    "studio/tree.py: node {number} has no parent before it",
    "studio/tree.py: node {number} begins before its parent, or without a prompt",
    "studio/tree.py: node {number} begins behind its parent's end",
    "studio/tree.py: node {number} has a prompt before its first block",
    "studio/tree.py: node {number} lacks digests of the branch that was chosen",
    "studio/tree.py: node {number} chose row {chosen} of a fork that it has not",
    "train.py: {silent} groups in a row could not be measured",
    "types.py: script {id} has no block {block}",
}


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
