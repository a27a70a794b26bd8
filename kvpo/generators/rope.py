"""Rotary embedding at arbitrary absolute frame positions, from the stock module's own tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [B or 1, F * tokens, 1, head_dim / 2] float32."""


def frame_angles(rope: WanRotaryPosEmbed, frames_BF: torch.Tensor, grid: tuple[int, int]) -> Angles:
    """Angles of whole frames at absolute positions.

    ``grid`` is (rows, columns) of tokens in a frame.

    The stock module only offers positions 0 .. F-1 of one video, but its tables hold every position
    up to their end, which `check_positions` knows.
    """
    sizes, (height, width) = (rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2), grid
    shape = (*frames_BF.shape, height, width, -1)

    def at(table: torch.Tensor) -> torch.Tensor:
        t, h, w = table.float().split(sizes, dim=1)
        parts = (t[frames_BF][:, :, None, None], h[:height, None], w[:width])
        return torch.cat([part.expand(shape) for part in parts], dim=-1).flatten(1, 3).unsqueeze(2)

    # The tables repeat every angle for the two channels it rotates.
    return at(rope.freqs_cos[:, 0::2]), at(rope.freqs_sin[:, 1::2])


def check_positions(rope: WanRotaryPosEmbed, frames: Iterable[Sequence[int]]) -> None:
    """Check that every frame lies within the tables (1024 frames in Wan2.1).

    Raises ValueError for one that does not. It takes plain numbers: asking a tensor makes a GPU
    wait.
    """
    if (last := max(map(max, frames))) >= len(rope.freqs_cos):
        raise ValueError(
            f"frame {last} has no rotary position: the tables end at {len(rope.freqs_cos) - 1}; shorten the video or raise rope_max_seq_len"
        )


def rotate(x_BLHD: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Rotate pairs of neighbouring channels; computed in float32, returned in x's dtype."""
    (a, b), (cos, sin) = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1), angles
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x_BLHD)
