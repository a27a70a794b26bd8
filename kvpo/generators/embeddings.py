"""Embeddings of a prompt file, computed once: kept on disk, and the text encoder (11 GB at Wan's size) then leaves memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Callable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kvpo.common.files import write_atomic
from kvpo.generators.pipeline import Pipeline

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Of a weights file, read to tell it from others: all of 11 GB would take longer than a prompt."""


def cache_folder() -> Path:
    """$KVPO_CACHE, or ~/.cache/kvpo."""
    return Path(os.environ.get("KVPO_CACHE") or Path.home() / ".cache" / "kvpo")


def load_with_texts(
    folder: str | Path, texts: Sequence[str], device: torch.device | str, dtype: torch.dtype, vae_dtype: torch.dtype, progress: Callable[[int], None] = lambda done: None
) -> Pipeline:
    """The pipeline with all ``texts`` embedded and without its text encoder, which is not even read where the embeddings are on disk.

    ValueError for a prompt that would be cut.  ``progress`` is told how many are done.
    """
    path = cache_folder() / "text" / f"{_digest(Path(folder), texts, dtype)}.safetensors"
    stored = _read(path)
    pipeline = Pipeline.load(folder, device, dtype, vae_dtype, text_encoder=stored is None)
    if stored is None:
        for i, text in enumerate(texts):
            pipeline.encode_text([text])
            progress(i + 1)
        stored = {str(i): pipeline.known[text].contiguous() for i, text in enumerate(texts)}
        write_atomic(path, save(stored))
        pipeline.forget_text_encoder()
    pipeline.known = {text: stored[str(i)] for i, text in enumerate(texts)}
    return pipeline


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """What is stored; None where there is nothing, or nothing whole: it can be computed again."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _digest(folder: Path, texts: Sequence[str], dtype: torch.dtype) -> str:
    """Of everything an embedding hangs on: encoder, tokenizer, length, precision, the texts and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for part in ("text_encoder", "tokenizer") for p in (folder / part).rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES if size > SAMPLES * SAMPLE_BYTES else 1):
                file.seek(i * (size // SAMPLES))
                digest.update(file.read(SAMPLE_BYTES if size > SAMPLES * SAMPLE_BYTES else size))
    streaming = folder / "streaming.json"
    digest.update(streaming.read_bytes() if streaming.is_file() else b"")
    digest.update(repr((str(dtype), list(texts))).encode())
    return digest.hexdigest()
