"""Preview decoder: a small network in place of the VAE's decoder, for the rewards of training.

It reads the files of TAEHV (github.com/madebyollin/taehv), whose tensors are numbered by their
place in a chain. `taew2_1` belongs to the latents of Wan2.1, `taew2_2` to those of Wan2.2's 5B:

    decoder.1                     model latents, squashed to 3 tanh(x / 3), into the first width
    decoder.3 4 5                 blocks that see the frame before their own
    decoder.7                     frames made of one frame (1, 2 and 2 in the three stages)
    decoder.8                     after doubling rows and columns, into the next width
    decoder.9 ... 14, 15 ... 20   the second and the third stage, likewise
    decoder.22                    RGB in [0, 1], or patches of it

Every latent frame gives four pixel frames, and a video's first three are dropped, as the VAE gives
one for its first latent frame. Other files of this layout (other widths, latents or patches) are
read alike: what they are is told by their shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, pixel_shuffle, relu

from kvpo.common.finite import check_finite
from kvpo.common.text_files import read_text
from kvpo.common.weights import State, account, read_checkpoint

SOURCE = "https://github.com/madebyollin/taehv"
RELEASED = {16: "taew2_1.safetensors", 48: "taew2_2.safetensors"}
"""Latent channels -> the released file; there are .pth files of the same tensors."""
STAGES = (((3, 4, 5), 7, 8, 1), ((9, 10, 11), 13, 14, 2), ((15, 16, 17), 19, 20, 2))
"""A stage's blocks, its growth in time, its way into the next width, and frames made of one."""
PER_LATENT = 4
"""Pixel frames of a latent frame."""


@dataclass(frozen=True)
class Layout:
    """All that the shapes of a preview decoder's tensors depend on."""

    latents: int
    """Latent channels."""
    patch: int = 1
    """Rows and columns of pixels that the last convolution gives at once."""
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Channels of the stages, and those behind the last; the released files'."""

    def check(self, vae: Mapping[str, Any], source: str) -> None:
        """Refuse a decoder of other latents or pixels than those of a VAE's ``config``.

        ValueError.
        """
        channels, patch = vae.get("z_dim", 16), vae.get("patch_size") or 1
        doubled = len(vae.get("dim_mult", (1, 2, 4, 4))) - 1
        times = 2 ** sum(vae.get("temperal_downsample", (False, True, True)))
        mine, its = (
            f"{c} channels, {s} x {s} pixels and {t} frames of a latent"
            for c, s, t in (
                (self.latents, 8 * self.patch, PER_LATENT),
                (channels, patch * 2**doubled, times),
            )
        )
        if mine != its:
            known = f"; {RELEASED[channels]} of {SOURCE} does" if channels in RELEASED else ""
            raise ValueError(
                f"score.preview: {source} decodes latents of {mine}, but the generator's VAE {its}; give a file that fits it{known}, or leave the setting out"
            )


class SeesBefore(nn.Module):
    """Three convolutions over a frame and the one before it, added to the frame."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.ModuleDict(
            {"0": _conv(2 * width, width), "2": _conv(width, width), "4": _conv(width, width)}
        )

    def forward(self, x_BTCHW: torch.Tensor, before_BCHW: torch.Tensor) -> torch.Tensor:
        past = torch.cat((before_BCHW[:, None], x_BTCHW[:, :-1]), dim=1)
        y = torch.cat((x_BTCHW, past), dim=2).flatten(0, 1)
        y = self.conv["4"](relu(self.conv["2"](relu(self.conv["0"](y)))))
        return relu(y.unflatten(0, x_BTCHW.shape[:2]) + x_BTCHW)


class MakesFrames(nn.Module):
    """A map of each pixel that gives ``times`` frames of one."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)
        self.times = times

    def forward(self, x_BTCHW: torch.Tensor) -> torch.Tensor:
        y = self.conv(x_BTCHW.flatten(0, 1)).unflatten(1, (self.times, -1))
        return y.unflatten(0, x_BTCHW.shape[:2]).flatten(1, 2)


class Preview(nn.Module):
    """A preview decoder; a `kvpo.generators.streaming.FrameDecoder`."""

    title = "preview decoder"
    least_rows = 1

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout
        first, *_, last = layout.widths
        parts: dict[str, nn.Module] = {"1": _conv(layout.latents, first)}
        for (blocks, grow, on, times), width, following in zip(
            STAGES, layout.widths, layout.widths[1:]
        ):
            parts |= {str(number): SeesBefore(width) for number in blocks}
            parts[str(grow)] = MakesFrames(width, times)
            parts[str(on)] = _conv(width, following, bias=False)
        parts["22"] = _conv(last, 3 * layout.patch**2)
        self.decoder = nn.ModuleDict(parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder["1"].weight.dtype

    @property
    def field(self) -> int:
        """Latent frames before a frame that its pixels depend on.

        8 in this layout. Each block lets one more frame from the start on differ from what it
        would be, at its stage's rate.
        """
        wrong, rate = 0, 1
        for blocks, _grow, _on, times in STAGES:
            wrong, rate = (wrong + len(blocks)) * times, rate * times
        return -(-wrong // rate)

    def blank(self) -> list:
        return [None] * sum(len(blocks) for blocks, *_ in STAGES)

    def prepared(self, latents_BNCHW: torch.Tensor) -> torch.Tensor:
        """Squashed latents: the network takes the generator's own, without mean and scale."""
        return (3 * torch.tanh(latents_BNCHW / 3)).transpose(1, 2).to(self.dtype)

    def frame(self, z_BCNHW: torch.Tensor, state: list, first: bool) -> torch.Tensor:
        x = relu(self.decoder["1"](z_BCNHW[:, :, 0]))[:, None]
        memory = 0
        for blocks, grow, on, _times in STAGES:
            for number in blocks:
                before = torch.zeros_like(x[:, 0]) if state[memory] is None else state[memory]
                state[memory], memory = x[:, -1], memory + 1
                x = self.decoder[str(number)](x, before)
            # a map of single pixels commutes with their repetition, at a quarter of the work
            x = self.decoder[str(grow)](x)
            shape, x = x.shape[:2], interpolate(x.flatten(0, 1), scale_factor=2.0)
            x = self.decoder[str(on)](x).unflatten(0, shape)
        if first:
            x = x[:, PER_LATENT - 1 :]
        y = pixel_shuffle(self.decoder["22"](relu(x.flatten(0, 1))), self.layout.patch)
        return 2 * y.clamp(0, 1).unflatten(0, x.shape[:2]).transpose(1, 2) - 1


def _conv(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


def check_there(path: Path) -> None:
    """Raise FileNotFoundError where there is no file to read a preview decoder from."""
    if not path.is_file():
        raise FileNotFoundError(
            f"score.preview: {path} is not there; fetch a file of {SOURCE}, {' or '.join(RELEASED.values())}, or leave the setting out"
        )


def read_preview(path: Path, pipeline: Path) -> Preview:
    """Read a preview decoder in float32, and check that it fits a pipeline folder's latents.

    Raises FileNotFoundError or ValueError, one line, for a file that is missing, broken, pickled,
    of another layout, or of other latents; FloatingPointError for weights that are not finite.
    """
    state, layout = _read(path)
    config = pipeline / "vae" / "config.json"
    if config.is_file():  # where it is not, the pipeline folder is refused with all it lacks
        layout.check(json.loads(read_text(config)), str(path))
    check_finite(state.items(), str(path), "fetch the file again")
    with torch.device("meta"):
        preview = Preview(layout)
    preview.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    return preview.requires_grad_(False).eval()


def layout_of(path: Path) -> Layout:
    """Layout of a file's decoder; errors as `read_preview`."""
    return _read(path)[1]


def _read(path: Path) -> tuple[State, Layout]:
    """The decoder's tensors and their layout, every tensor accounted for."""
    check_there(path)
    state = {
        name: value
        for name, value in read_checkpoint(path).items()
        if not name.startswith("encoder.")
    }
    layout = _told_by_shapes(state)
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in Preview(layout).state_dict().items()}
    found = {n: _latest(t, wanted.get(n)) for n, t in state.items() if torch.is_tensor(t)}
    account(
        found,
        wanted,
        f"score.preview: {path}",
        f"the decoder of taew2_1 and its like ({SOURCE})",
        "give such a file, or leave the setting out",
    )
    return found, layout


def _told_by_shapes(state: Mapping[str, Any]) -> Layout:
    """Sizes of the layout, from the tensors that have them; the released ones where they lack."""
    usual = Layout(16)

    def sizes(number: int, fallback: tuple[int, int]) -> tuple[int, int]:
        weight = state.get(f"decoder.{number}.weight")
        if weight is None or weight.ndim != 4:
            return fallback
        made, read = weight.shape[:2]
        return made, read

    first, latents = sizes(1, (usual.widths[0], usual.latents))
    second, third, last = (sizes(n, (w, 0))[0] for n, w in zip((8, 14, 20), usual.widths[1:]))
    channels = sizes(22, (3, 0))[0]
    patch = next((p for p in (1, 2, 4, 8) if 3 * p * p == channels), 1)
    return Layout(latents, patch, (first, second, third, last))


def _latest(weight: torch.Tensor, wanted: torch.Size | None) -> torch.Tensor:
    """The last frames' maps of a growth in time that a file has for more frames than are made.

    A file may hold two in the first stage, where one is made: the later one is it.
    """
    if wanted is None or not (wanted[2:] == (1, 1) == weight.shape[2:]):
        return weight
    return weight[-wanted[0] :] if len(weight) == 2 * wanted[0] else weight
