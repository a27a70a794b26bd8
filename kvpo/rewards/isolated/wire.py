"""Messages between kvpo and a worker: a JSON header, then raw bytes.

They travel on a pipe or as the body of an HTTP request.

    bytes    0-3   b"KVPO"
             4-7   length of the header, unsigned, big-endian
            8-15   length of the payload, unsigned, big-endian
             16-   header: one JSON object in UTF-8, whose numbers are finite
                   payload: uint8 RGB frames [B, T, 3, H, W] in C order, or nothing

No pickle: a message can say wrong things, but it can not run. Scores travel in the header: a
float32 written as JSON is read back exactly. Standard library and numpy only, for Python 3.8 and
later: a worker's environment may be old.
"""

from __future__ import annotations

import json
import struct

import numpy as np

PROTOCOL = 2
"""Version of the messages; both sides must have the same."""
CONTENT_TYPE = "application/x-kvpo"
MARK = b"KVPO"
PREFIX = struct.Struct(">4sIQ")
HEADER = 1 << 20
"""Bytes of a header, at most: prompts, and numbers of the clips of one request."""
ANY = 2**63


def pack(header, frames=None):
    """Pack a message as byte strings to be sent one after another; ``frames`` are not copied.

    Raises ValueError for a header that JSON can not hold, NaN included.
    """
    text = json.dumps(header, allow_nan=False).encode()
    payload = (
        memoryview(b"")
        if frames is None
        else memoryview(np.ascontiguousarray(frames, dtype=np.uint8)).cast("B")
    )
    return [PREFIX.pack(MARK, len(text), len(payload)) + text, payload]


def write(stream, header, frames=None):
    for part in pack(header, frames):
        stream.write(part)
    stream.flush()


def read(stream, most=ANY):
    """Read (header, payload) of the next message.

    Raises EOFError where there is none or it breaks off; ValueError for what is no message, or has
    a payload of more than ``most`` bytes.
    """
    prefix = _exactly(stream, PREFIX.size)
    mark, header, payload = PREFIX.unpack(prefix)
    if mark != MARK:
        raise ValueError(
            f"not a message, it begins with {bytes(prefix)!r}; run the same kvpo on both sides"
        )
    if header > HEADER or payload > most:
        raise ValueError(
            f"a message of {header} + {payload} bytes; at most {HEADER} + {most} are taken; send fewer clips at once"
        )
    value = json.loads(_exactly(stream, header).decode(), parse_constant=_not_finite)
    if not isinstance(value, dict):
        raise ValueError(f"a message's header must be a JSON object, not {value!r}")
    return value, _exactly(stream, payload)


def frames_of(header, payload):
    """uint8 [B, T, 3, H, W] of a request. ValueError where its shape and its bytes do not agree."""
    shape = header["shape"]
    if (
        len(shape) != 5
        or shape[2] != 3
        or min(shape) < 1
        or np.prod(shape, dtype=object) != len(payload)
    ):
        raise ValueError(
            f"shape {shape} and {len(payload)} bytes are no frames [B, T, 3, H, W]; send uint8 of that shape"
        )
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)


def _exactly(stream, length):
    data = bytearray(length)
    view, there = memoryview(data), 0
    while there < length:
        got = stream.readinto(view[there:])
        if not got:
            raise EOFError(
                f"the other side ended {length - there} bytes before the end of a message"
                if there
                else "the other side has ended"
            )
        there += got
    return data


def _not_finite(name):
    raise ValueError(
        f"a message holds {name}; numbers must be finite, and what can not be measured is null"
    )
