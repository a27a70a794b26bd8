"""Stage 1 of pretraining: the autoencoder.

Its encoder is computed (``kvpo.mini.pretraining.linear_encoder``), its decoder trained.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from kvpo.common.rng import stream
from kvpo.generators.streaming import latent_scale
from kvpo.mini.pretraining.linear_encoder import LinearEncoder, fit
from kvpo.mini.stories import write_story
from kvpo.mini.world import SIZE, pixel_frames

CLIP_LATENTS = 7
"""Latent frames of a training clip.

Four are too few: what the causal convolutions remember later in a stream then never occurs.
"""
CROP = 32
"""Side of an object crop, pixels."""
STRONGEST = 2.0
"""Variance (before the common scale) that no latent channel may exceed.

Only the place's brightness would.
"""
GRAIN = 0.1
"""Deviation of the noise on the decoder's inputs, in model units.

Generated latents are never exact.
"""


def clip(
    seed: int, *name: int | str, latents: int = CLIP_LATENTS, crop: bool = False
) -> torch.Tensor:
    """Render a random stretch of a random story, RGB [T, 3, 64, 64] in [0, 1].

    ``crop``: only the 32x32 around its object.
    """
    story = write_story(seed, "vae", *name, blocks=8, habits=True)
    truth, g = story.truth(), stream(seed, "vae-clip", *name)
    first = int(torch.randint(len(truth.scene) - pixel_frames(latents), (), generator=g))
    stop = first + pixel_frames(latents)
    pixels = story.show(truth, first, stop)
    if not crop:
        return pixels
    middle = truth.centre[(first + stop) // 2] % SIZE + torch.randint(-12, 13, (2,), generator=g)
    # Whole latent cells, so that a crop is a piece of a picture's latent grid.
    x, y = (int(v) for v in ((middle - CROP / 2).clamp(0, SIZE - CROP) / 8).round() * 8)
    return pixels[:, :, y : y + CROP, x : x + CROP]


def fit_encoder(seed: int, clips: int) -> LinearEncoder:
    """Fit the code on object crops.

    On whole pictures the places would take most of its components.
    """
    return fit(torch.stack([clip(seed, "fit", i, crop=True) for i in range(clips)]))


def set_latent_scale(vae: AutoencoderKLWan, code: LinearEncoder, seed: int, clips: int) -> None:
    """Put the latents' mean and scale into the config.

    Scale = sqrt(deviation), not the deviation itself: whitening makes the weak channels as loud as
    the strong ones and the flow model then learns noise (measured: no progress in 750 steps). The
    whole is brought to unit variance, which is what the noise schedule expects.
    """
    z = torch.cat([code.raw(clip(seed, "scale", i)[None]) for i in range(clips)])
    mean, deviation = z.mean((0, 1, 3, 4)), z.std((0, 1, 3, 4))
    scale = deviation / deviation.clamp(max=STRONGEST).sqrt()
    scale = scale * ((z - mean.view(-1, 1, 1)) / scale.view(-1, 1, 1)).std()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=scale.tolist())


def encode(vae: AutoencoderKLWan, code: LinearEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """RGB [B, T, 3, H, W] in [0, 1] -> model latents [B, N, C, h, w]."""
    z = code.raw(pixels)
    mean, scale = latent_scale(vae, z)
    return (z - mean) / scale


def decoder_loss(vae: AutoencoderKLWan, code: LinearEncoder, seed: int, batch: int, device="cpu"):
    """loss(step): L1 + MSE with the object weighted up.

    Three steps in four see twice as many object crops instead of pictures: half the pixels, and
    four times the share of those that are hard to learn (the object covers some 4 % of a picture).
    """

    def loss(step: int):
        crop = step % 4 != 0
        pixels = torch.stack(
            [clip(seed, step, i, crop=crop) for i in range(2 * batch if crop else batch)]
        )
        z = code.raw(pixels)
        z = z + GRAIN * latent_scale(vae, z)[1] * torch.randn(
            z.shape, generator=stream(seed, "decoder-grain", step)
        )
        pixels = pixels.transpose(1, 2).to(device) * 2 - 1
        with torch.autocast(pixels.device.type, torch.bfloat16):  # a quarter of the time less
            error = vae.decode(z.transpose(1, 2).to(device)).sample.float() - pixels
        weight = 1 + 4 * (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) > 0.5).float()
        rebuild = (weight * (error.abs() + 2 * error.square())).sum() / weight.sum() / 3
        return rebuild, {"mse": float(error.detach().square().mean()) / 4, "crop": crop}

    return loss
