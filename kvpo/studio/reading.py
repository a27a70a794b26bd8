"""The words of a prompt that a generator reads, and those that it does not."""

from __future__ import annotations

from kvpo.generators.pipeline import Pipeline
from kvpo.generators.readable import words_of
from kvpo.method.prompt_files import readable


def check_prompt(pipeline: Pipeline, text: object) -> str:
    """Return a prompt as the generator reads it.

    Raises ValueError where it shows nothing, is too long, or has no word that is known.
    """
    text = readable(text)
    known, unknown = words_of(pipeline.stock.tokenizer, text)
    if unknown and not known:
        raise ValueError(
            f"the generator knows no word of the prompt {text[:60]!r}; use words of its vocabulary (docs/prompts.md lists the miniature's)"
        )
    pipeline.encode_text([text])
    return text


def strange_words(pipeline: Pipeline, text: str) -> list[str]:
    """Words of a prompt that the generator reads as nothing."""
    return words_of(pipeline.stock.tokenizer, text)[1]
