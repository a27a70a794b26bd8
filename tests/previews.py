"""Files of preview decoders in the released format, written from its names and not by the package.

The released files are float16, and hold an encoder beside the decoder.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import draw

WIDTHS = (256, 128, 64, 64)
NARROW = (8, 6, 4, 4)


def shapes(
    latents: int, widths: tuple[int, ...] = WIDTHS, patch: int = 1, first_growth: int = 1
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of such a file."""
    a, b, c, d = widths
    pixels = 3 * patch**2
    convs = {
        "encoder.0": (64, pixels, 3, 3, True),
        "encoder.17": (latents, 64, 3, 3, True),
        "decoder.1": (a, latents, 3, 3, True),
        "decoder.7.conv": (a * first_growth, a, 1, 1, False),
        "decoder.8": (b, a, 3, 3, False),
        "decoder.13.conv": (2 * b, b, 1, 1, False),
        "decoder.14": (c, b, 3, 3, False),
        "decoder.19.conv": (2 * c, c, 1, 1, False),
        "decoder.20": (d, c, 3, 3, False),
        "decoder.22": (pixels, d, 3, 3, True),
    }
    for first, inputs in ((2, 128), (7, 128), (12, 64)):
        convs[f"encoder.{first}.conv"] = (64, inputs, 1, 1, False)
        convs[f"encoder.{first + 1}"] = (64, 64, 3, 3, False)
    blocks = [("encoder", 64, n) for first in (4, 9, 14) for n in range(first, first + 3)]
    blocks += [("decoder", w, n + i) for w, n in ((a, 3), (b, 9), (c, 15)) for i in range(3)]
    for part, width, number in blocks:
        for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
            convs[f"{part}.{number}.conv.{layer}"] = (width, inputs, 3, 3, True)
    found = {}
    for name, (*shape, bias) in convs.items():
        found[f"{name}.weight"] = tuple(shape)
        if bias:
            found[f"{name}.bias"] = tuple(shape[:1])
    return found


def tensors(wanted: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random numbers in float16 that keep the size of what goes through, and pixels around grey."""
    found = {}
    for i, (name, shape) in enumerate(wanted.items()):
        size = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        found[name] = size * draw(*shape, seed=i)
    last = found["decoder.22.bias"]
    found["decoder.22.weight"] *= 2.0
    found["decoder.22.bias"] = torch.full_like(last, 0.5)
    return {name: t.half() for name, t in found.items()}


def write_preview(path: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A narrow decoder of the tiny generator's latents, as .safetensors or as .pth."""
    state = tensors(shapes(4, NARROW)) if state is None else state
    if path.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path
