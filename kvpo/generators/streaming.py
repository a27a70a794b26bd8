"""Decoding of latents to pixels while they are generated.

The causal VAE's decoder keeps its state outside the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    unpatchify,
)

from kvpo.common.finite import is_finite


def latent_scale(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scale of the VAE's latents, [C, 1, 1] each: model latent = (z - mean) / scale."""
    return tuple(
        torch.tensor(v).view(-1, 1, 1).to(like)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )


def receptive_field(vae: AutoencoderKLWan) -> int:
    """Latent frames before a frame that the decoder's pixels of it depend on.

    A decoder that starts so many frames earlier, as if a video began there, gives the same pixels:
    38 for Wan's, 28 for the miniature's. Counted layer by layer: after a causal convolution over k
    frames, k - 1 more frames from the start on are not yet what they would be. An upsampling in
    time leaves the start's frame out of what its convolution sees, and doubles the rate.
    """
    wrong, rate = 0, 1  # frames from the start on that differ, at so many a latent frame
    for layer in _in_time(vae):
        if isinstance(layer, WanResample):
            wrong = 2 * (max(wrong, rate) + layer.time_conv.kernel_size[0] - 1)
            rate *= 2
        else:
            wrong += layer.kernel_size[0] - 1
    return -(-wrong // rate)


def _in_time(vae: AutoencoderKLWan) -> Iterator[WanCausalConv3d | WanResample]:
    """The decoder's layers that mix frames, in the order in which they act."""
    decoder = vae.decoder
    yield decoder.conv_in
    for part in (decoder.mid_block, *decoder.up_blocks):
        for block in part.resnets:
            yield from (block.conv1, block.conv2)
        for layer in part.modules():
            if isinstance(layer, WanResample) and layer.mode == "upsample3d":
                yield layer
    yield decoder.conv_out


class StreamingDecoder:
    """Decoder of a stream of latent frames.

    The first gives 1 pixel frame, every later one 4 (in Wan's VAE).

    ``fork`` continues from the same state in several branches: a clip from the middle of a video is
    decoded as that, not as if its first latent started a video.
    """

    def __init__(self, vae: AutoencoderKLWan, skipped: Sequence[int] = ()):
        """``skipped``: latent frames of each stream before the first that is decoded.

        None: they begin with their video. Errors name frames of the video.
        """
        self.vae, self.skipped = vae, tuple(skipped)
        self._cache: list = [None] * vae._cached_conv_counts["decoder"]
        self._frames = 0
        """Latent frames decoded so far."""

    def fork(self, rows: int) -> StreamingDecoder:
        """Make a decoder of ``rows`` streams that all continue from this one's state.

        This one stays as it is.
        """
        other = StreamingDecoder(self.vae, self.skipped * (rows if len(self.skipped) == 1 else 1))
        # The convolutions replace their entries and never write into them, so sharing the memory is
        # safe.
        other._cache = self._each(lambda x: x.expand(rows, *x.shape[1:]))
        other._frames = self._frames
        return other

    def part(self, first: int, count: int) -> StreamingDecoder:
        """``count`` of the streams, which go on by themselves."""
        other = StreamingDecoder(self.vae, self.skipped[first : first + count])
        other._cache, other._frames = self._each(lambda x: x[first : first + count]), self._frames
        return other

    @torch.no_grad()
    def __call__(self, latents_BNCHW: torch.Tensor) -> torch.Tensor:
        """Model latents [B, N, C, h, w] -> uint8 pixels [B, T, 3, H, W] RGB.

        FloatingPointError that names the frame where latents or pixels are not finite: as bytes
        these would be black.
        """
        if not is_finite(
            latents_BNCHW
        ):  # asked once for all frames: on a GPU every question waits for the device
            self._name_fault(
                latents_BNCHW.transpose(0, 1),
                "latents",
                "the generator has made them: look at its weights, or lower the learning rate they were trained at",
            )
        mean, scale = latent_scale(self.vae, latents_BNCHW)
        if alone := len(latents_BNCHW) == 1 and latents_BNCHW.device.type == "cpu":
            # For a single float32 row torch leaves oneDNN for a convolution that takes twice the
            # time of two rows here.
            latents_BNCHW = latents_BNCHW.expand(2, -1, -1, -1, -1)
            self._cache = self._each(lambda x: x.expand(2, *x.shape[1:]))
        z = self.vae.post_quant_conv(
            (latents_BNCHW * scale + mean).transpose(1, 2).to(self.vae.dtype)
        )
        frames = []
        for i in range(z.shape[2]):
            decoded = self.vae.decoder(
                z[:, :, i : i + 1],
                feat_cache=self._cache,
                feat_idx=[0],
                first_chunk=not self._frames,
            )
            if not is_finite(decoded):
                self._name_fault(
                    decoded[None],
                    "pixels",
                    f"the VAE in {str(self.vae.dtype).removeprefix('torch.')} has made them of finite latents: decode in float32, or look at its weights",
                )
            frames.append(self._pixels(decoded))
            self._frames += 1
        pixels = torch.cat(frames, dim=1)
        if alone:
            pixels, self._cache = pixels[:1], self._each(lambda x: x[:1])
        return pixels

    def _name_fault(self, frames: Iterable[torch.Tensor], what: str, way_out: str) -> None:
        """Raise FloatingPointError for the first of ``frames`` that is not finite.

        ``frames``: one [B, ...] each, from the next to be decoded on.
        """
        for frame, x in enumerate(frames, self._frames):
            if not is_finite(x):
                rows = [row for row, one in enumerate(x) if not is_finite(one)]
                before = self.skipped[rows[0]] if self.skipped else 0
                where = f"latent frame {before + frame}" + (
                    f" of video {', '.join(map(str, rows))} of {len(x)}" if len(x) > 1 else ""
                )
                raise FloatingPointError(f"the {what} of {where} are NaN or infinite; {way_out}")

    def _pixels(self, decoded: torch.Tensor) -> torch.Tensor:
        """Pixels uint8 [B, T, 3, H, W], a quarter of the decoder's float32.

        They are made frame by frame: a long video in float would not fit.
        """
        if (patch := self.vae.config.patch_size) is not None:
            decoded = unpatchify(decoded, patch)
        return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).transpose(1, 2)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> list:
        """Map every tensor of the state with ``change``.

        An entry of a convolution that has met nothing yet is no tensor, and stays.
        """
        return [change(x) if isinstance(x, torch.Tensor) else x for x in self._cache]
