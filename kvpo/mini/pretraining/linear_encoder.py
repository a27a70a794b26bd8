"""The encoder, computed instead of trained.

It holds the principal components of the world's pixels, written into the stock encoder.

Training encoder and decoder together had to invent a code and its reading at once: after 2500 steps
(21 minutes) the object's shape was right in 19 % of the frames and its colour in 60 %. The
principal components of a latent cell lose a third of that error, take seconds, and are a fixed code
that the decoder alone can learn to read.

    per frame     4x4 pixels  -> 24 components, 2x2 patches of them -> 24 again (8x8 pixels)
    per pair      24 means and 8 half differences, at both levels (two frames, then four)
    latent        the 16 strongest components of those 32

The first frame of a video has no pair: it is read as if the picture stood still, differences zero.

Everything in the stock encoder that is not linear is led around: residual branches are zero; before
the last convolution a large constant pair of channels makes its normalisation a fixed scale, and
silu(x) - silu(-x) = x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

KEPT, MOVING = 24, 8
"""Components kept at each level, and how many of their half differences in time."""
LATENT = 16
LARGE = 1000.0
"""The constant that drowns all else in the last normalisation; features stay below 30."""
LOGVAR = -12.0


@dataclass(frozen=True)
class Level:
    mean: torch.Tensor
    """[n] of the patches."""
    space: torch.Tensor
    """[n, KEPT] orthonormal."""
    time: torch.Tensor
    """[KEPT, MOVING] orthonormal."""


@dataclass(frozen=True)
class LinearEncoder:
    levels: tuple[Level, Level]
    last: torch.Tensor
    """[KEPT + MOVING, LATENT] orthonormal."""

    def raw(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [B, N, LATENT, H / 8, W / 8] from RGB [B, T, 3, H, W] in [0, 1].

        The stock encoder gives the same, much slower.
        """
        x = patches(pixels * 2 - 1, 4)
        for number, level in enumerate(self.levels):
            x = pairs((patches(x, 2) if number else x).sub(level.mean.view(-1, 1, 1)), level)
        return torch.einsum("bnchw,cd->bndhw", x, self.last)


def patches(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, C, H, W] -> [B, T, C size size, H / size, W / size], ordered channel, row, column."""
    b, t, c, h, w = x.shape
    x = x.reshape(b, t, c, h // size, size, w // size, size)
    return x.permute(0, 1, 2, 4, 6, 3, 5).reshape(b, t, c * size * size, h // size, w // size)


def pairs(x: torch.Tensor, level: Level) -> torch.Tensor:
    """Components of centred patches, then of frame pairs; the first frame stays alone.

    [B, 1 + (T - 1) / 2, KEPT + MOVING, h, w].
    """
    kept = torch.einsum("btchw,cd->btdhw", x, level.space)
    first, before, after = kept[:, :1], kept[:, 1::2], kept[:, 2::2]
    moving = torch.einsum("btchw,cd->btdhw", (after - before) / 2, level.time)
    still = torch.zeros_like(first[:, :, :MOVING])
    return torch.cat(
        (torch.cat((first, still), 2), torch.cat(((before + after) / 2, moving), 2)), 1
    )


def fit(pixels: torch.Tensor) -> LinearEncoder:
    """Principal components, level by level, of clips [B, T, 3, H, W] in [0, 1]."""
    x, levels = patches(pixels * 2 - 1, 4), []
    for number in range(2):
        x = patches(x, 2) if number else x
        rows = x.movedim(2, -1).flatten(0, -2)
        mean = rows.mean(0)
        space = components(rows - mean, KEPT)
        kept = torch.einsum("btchw,cd->btdhw", x - mean.view(-1, 1, 1), space)
        steps = ((kept[:, 2::2] - kept[:, 1::2]) / 2).movedim(2, -1).flatten(0, -2)
        levels.append(Level(mean, space, components(steps, MOVING)))
        x = pairs(x - mean.view(-1, 1, 1), levels[-1])
    return LinearEncoder(
        (levels[0], levels[1]), components(x.movedim(2, -1).flatten(0, -2), LATENT)
    )


def components(rows: torch.Tensor, number: int) -> torch.Tensor:
    """The strongest principal directions of rows [M, n] about zero, [n, number].

    Signs are fixed so that they are the same everywhere.
    """
    vectors = (
        torch.linalg.eigh(rows.double().T @ rows.double() / len(rows))
        .eigenvectors[:, -number:]
        .flip(1)
    )
    largest = vectors.abs().argmax(0)
    return (vectors * vectors[largest, torch.arange(number)].sign()).float()


@torch.no_grad()
def install(code: LinearEncoder, vae: AutoencoderKLWan) -> None:
    """Write the linear code into the stock encoder."""
    net = vae.encoder
    for parameter in (*net.parameters(), *vae.quant_conv.parameters()):
        parameter.zero_()
    for name, module in net.named_modules():
        if name.endswith(("norm1", "norm2", "norm", "norm_out")):
            module.gamma.fill_(1.0)
    net.conv_in.weight[:12, :, 2, 1, 1] = torch.eye(12)
    down = [block for block in net.down_blocks if hasattr(block, "time_conv")]
    for number, (block, level) in enumerate(zip(down, code.levels)):
        conv, n = block.resample[1], KEPT + MOVING if number else 12
        conv.weight[:KEPT, :n, :2, :2] = (
            _first_patch_order(level.space.T)
            if number == 0
            else level.space.T.reshape(KEPT, n, 2, 2)
        )
        conv.bias[:KEPT] = -level.space.T @ level.mean
        block.time_conv.weight[:KEPT, :KEPT, 1:, 0, 0] = 0.5 * torch.eye(KEPT)[:, :, None]
        block.time_conv.weight[KEPT : KEPT + MOVING, :KEPT, 1, 0, 0] = -0.5 * level.time.T
        block.time_conv.weight[KEPT : KEPT + MOVING, :KEPT, 2, 0, 0] = 0.5 * level.time.T
    for block in net.down_blocks[
        :-1
    ]:  # where the stock encoder widens early, what is there passes as it is
        if isinstance(getattr(block, "conv_shortcut", None), torch.nn.Conv3d):
            n = block.conv_shortcut.weight.shape[1]
            block.conv_shortcut.weight[:n, :, 0, 0, 0] = torch.eye(n)
    widen = net.down_blocks[-1].conv_shortcut
    both = torch.cat((code.last.T, -code.last.T))
    widen.weight[: 2 * LATENT, : KEPT + MOVING, 0, 0, 0] = both
    widen.bias[2 * LATENT : 2 * LATENT + 2] = torch.tensor([LARGE, -LARGE])
    width = widen.weight.shape[0]
    # the norm divides by |x| = LARGE sqrt 2 and multiplies by sqrt width
    undo = LARGE * (2.0 / width) ** 0.5
    net.conv_out.weight[:LATENT, :LATENT, 2, 1, 1] = undo * torch.eye(LATENT)
    net.conv_out.weight[:LATENT, LATENT : 2 * LATENT, 2, 1, 1] = -undo * torch.eye(LATENT)
    net.conv_out.bias[LATENT:] = LOGVAR
    vae.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * LATENT)


def _first_patch_order(space: torch.Tensor) -> torch.Tensor:
    """Reorder [KEPT, 48] over (RGB, 4 rows, 4 columns) to the stock patches' channels.

    Returns [KEPT, 12, 2, 2] over channels (RGB, column, row) and their places.
    """
    # RGB, patch row, row in patch, patch column, column in patch
    x = space.reshape(KEPT, 3, 2, 2, 2, 2)
    return x.permute(0, 1, 5, 3, 2, 4).reshape(KEPT, 12, 2, 2)
