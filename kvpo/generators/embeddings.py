"""Embeddings of a prompt file, computed once and kept on disk.

The text encoder (11 GB at Wan's size) then leaves memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kvpo.common.files import first_line, try_folder, write_atomic
from kvpo.generators.cache_folder import cache_folder
from kvpo.generators.pipeline import Pipeline

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Number and length of the samples of a weights file that tell it from others.

Reading all of 11 GB would take longer than embedding a prompt.
"""


WAY_OUT = "KVPO_CACHE names another folder for them"


def text_cache(warn: Callable[[str], None]) -> Path | None:
    """Folder of stored embeddings; None where this user can have none.

    ``warn`` is then told why, in one line.
    """
    try:
        return cache_folder() / "text"
    except OSError as error:
        warn(f"embeddings are not kept on disk: {error}")
        return None


def can_keep(folder: Path | None, warn: Callable[[str], None]) -> bool:
    """Check that the folder can be written to, before the text encoder works for it.

    Returns False and gives ``warn`` one line where not.
    """
    if folder is None:
        return False
    try:
        try_folder(folder, WAY_OUT)
    except OSError as error:
        warn(f"embeddings are not kept on disk: {error}")
        return False
    return True


def load_with_texts(
    folder: str | Path,
    texts: Sequence[str],
    device: torch.device | str,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    progress: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Pipeline:
    """Load the pipeline with all ``texts`` embedded and without its text encoder.

    The encoder is not even read where the embeddings are on disk. Raises ValueError for a prompt
    that would be cut. ``progress`` is told how many are done, ``warn`` why nothing is kept where it
    can not be.
    """
    cache = text_cache(warn)
    path = cache and cache / f"{_digest(Path(folder), texts, dtype)}.safetensors"
    stored = _read(path) if path else None
    keep = stored is None and can_keep(cache, warn)
    pipeline = Pipeline.load(folder, device, dtype, vae_dtype, text_encoder=stored is None)
    if stored is None:
        for i, text in enumerate(texts):
            pipeline.encode_text([text])
            progress(i + 1)
        stored = {str(i): pipeline.known[text].contiguous() for i, text in enumerate(texts)}
        if path and keep:
            _keep(path, save(stored), warn)
        pipeline.forget_text_encoder()
    pipeline.known = {text: stored[str(i)] for i, text in enumerate(texts)}
    return pipeline


def _keep(path: Path, content: bytes, warn: Callable[[str], None]) -> None:
    """Write the embeddings; a full disk only costs the next run some time."""
    try:
        write_atomic(path, content)
    except OSError as error:
        warn(f"embeddings are not kept on disk: {path} could not be written ({first_line(error)})")


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """Read stored embeddings; None where there are none or they are broken.

    They can be computed again.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _digest(folder: Path, texts: Sequence[str], dtype: torch.dtype) -> str:
    """Hash of everything that embeddings depend on.

    That is encoder, tokenizer, length, precision, the texts and their order.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(
        p
        for part in ("text_encoder", "tokenizer")
        for p in (folder / part).rglob("*")
        if p.is_file()
    ):
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
