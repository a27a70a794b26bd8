"""Named random streams: every draw of the program comes from one of these, none from global state.

A stream is named by what it is for, so adding an evaluation, a reward or a branch cannot shift the
draws of anything else, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch

Name = tuple[int | str, ...]
"""Beginning of the names of a thing's streams, as ("train", step, index) of a group's."""


def stream(seed: int, *name: int | str) -> torch.Generator:
    """Make a CPU generator for the stream (seed, *name).

    An example is ``stream(0, step, script.id, "noise", block)``.

    Streams of different names are independent (their seeds are hashes); the same name gives the
    same draws.
    """
    for part in (seed, *name):
        if type(part) not in (int, str):
            # A numpy or tensor integer would print, and so draw, differently from the int it
            # equals.
            raise TypeError(
                f"stream {(seed, *name)!r}: {part!r} is a {type(part).__name__}, but a stream is named by int and str; convert it with int() or str()"
            )
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *name))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape, seed: int, *name: int | str) -> torch.Tensor:
    """Draw float32 standard normal noise of ``shape`` from the stream (seed, *name).

    It is drawn on the CPU on every machine.
    """
    return torch.randn(shape, generator=stream(seed, *name))
