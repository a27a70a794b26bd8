"""Blocks as messages to the page: a JSON head, then one film strip per row."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

LOSSLESS = 128
"""Longest side, pixels, up to which frames are sent as PNG; larger ones are JPEG."""
QUALITY = 90


def film_strip(frames_T3HW: torch.Tensor) -> bytes:
    """Encode frames one below the other as a single picture: PNG if they are small, else JPEG."""
    pixels = frames_T3HW.permute(0, 2, 3, 1).flatten(0, 1).contiguous().numpy()
    file = io.BytesIO()
    if max(frames_T3HW.shape[-2:]) <= LOSSLESS:
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def packed(head: Mapping[str, Any], pixels_RT3HW: torch.Tensor) -> bytes:
    """Pack a block: 4 bytes with the length of the head, the head as JSON, the rows' film strips.

    The head says how many frames there are, their size, and the bytes of every strip.
    """
    strips = [film_strip(row) for row in pixels_RT3HW]
    _, frames, _, height, width = pixels_RT3HW.shape
    facts = {"frames": frames, "height": height, "width": width, "sizes": list(map(len, strips))}
    text = json.dumps({**head, **facts}).encode()
    return b"".join([struct.pack(">I", len(text)), text, *strips])


def unpacked(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Take a message of `packed` apart: its head, and the strip of every row."""
    (length,) = struct.unpack(">I", message[:4])
    head, at, strips = json.loads(message[4 : 4 + length]), 4 + length, []
    for size in head["sizes"]:
        strips.append(message[at : at + size])
        at += size
    return head, strips
