"""Check whether a generator can read the prompts it is given.

Its tokenizer alone is asked, before any weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvpo.common.text_files import read_text
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.pipeline_folder import check_folder, load_tokenizer
from kvpo.types import Script

NAMED = 12
"""Unknown words that a warning lists."""


def check_prompts(
    folder: str | Path, scripts: Iterable[Script], warn: Callable[[str], None]
) -> None:
    """Check that every prompt fits the generator's length and has a word that it knows.

    Raises ValueError with the prompt's place where not, and for videos that are longer than the
    network has positions. ``warn`` is told once which other words it
    does not know: they are all the same to it, and stand for nothing.
    """
    geometry, tokenizer, scripts = (
        check_folder(Path(folder)),
        load_tokenizer(Path(folder)),
        [*scripts],
    )
    _check_lengths(Path(folder), geometry, scripts)
    check_texts(geometry.text_length, tokenizer, Path(folder) / "tokenizer", scripts, warn)


def _check_lengths(folder: Path, geometry: Geometry, scripts: Iterable[Script]) -> None:
    """Raise ValueError for a video that ends beyond the network's rotary positions."""
    try:
        config = json.loads(read_text(folder / "transformer" / "config.json"))
        most = int(config["rope_max_seq_len"]) // geometry.block
    except (OSError, ValueError, KeyError, TypeError):
        return  # whoever loads the transformer says what is wrong with its config
    for script in scripts:
        if script.blocks > most:
            raise ValueError(
                f"{script.source or f'script {script.id!r}'}: a video of {script.blocks} blocks, but this generator's positions end after {most}; shorten the video"
            )


def check_prompts_of(
    pipeline: Pipeline, scripts: Iterable[Script], warn: Callable[[str], None]
) -> None:
    """`check_prompts` for a generator that is loaded already."""
    length, tokenizer = pipeline.geometry.text_length, pipeline.stock.tokenizer
    check_texts(length, tokenizer, Path(pipeline.folder) / "tokenizer", scripts, warn)


def check_texts(
    text_length: int,
    tokenizer: Any,
    vocabulary: Path,
    scripts: Iterable[Script],
    warn: Callable[[str], None],
) -> None:
    """`check_prompts` for a tokenizer, with the place of its vocabulary."""
    places = {
        text: script.place(i)
        for script in scripts
        for i, text in reversed(tuple(enumerate(script.texts)))
    }
    strangers: dict[str, str] = {}
    for text, place in places.items():
        if (count := len(tokenizer(text, verbose=False).input_ids)) > text_length:
            raise ValueError(
                f"{place}: the prompt has {count} tokens, but this generator reads "
                f"{text_length} and would ignore the rest; shorten {text[:60]!r}..."
            )
        known, unknown = words_of(tokenizer, text)
        if unknown and not known:
            raise ValueError(
                f"{place}: the generator knows no word of the prompt {text[:60]!r}, so it would "
                f"show nothing of it; use words of its vocabulary, which is in {vocabulary} "
                "(docs/prompts.md lists the miniature's)"
            )
        strangers |= {word: strangers.get(word, place) for word in unknown}
    if strangers:
        shown = ", ".join(f"{word!r}" for word in list(strangers)[:NAMED]) + (
            f" and {len(strangers) - NAMED} more" if len(strangers) > NAMED else ""
        )
        warn(
            f"warning: the generator does not know {shown} (first in "
            f"{next(iter(strangers.values()))}), and reads them as nothing; "
            f"its vocabulary is in {vocabulary}, docs/prompts.md lists the miniature's"
        )


def words_of(tokenizer, text: str) -> tuple[list[str], list[str]]:
    """Words of a text that the tokenizer knows, and those it does not; punctuation is no word.

    Nothing is unknown to a tokenizer without a token for it, or that can not say where its tokens
    lie.
    """
    unknown_id = tokenizer.unk_token_id
    if unknown_id is None or not tokenizer.is_fast:
        return [text], []
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    known: list[str] = []
    unknown: list[str] = []
    for token, (first, stop) in zip(encoded.input_ids, encoded.offset_mapping):
        word = text[first:stop].strip()
        if any(letter.isalnum() for letter in word):
            (unknown if token == unknown_id else known).append(word)
    return known, unknown
