"""Costs of a recipe, found without weights.

Its own network, cache, decoder and policy are made and run on tensors without memory.

Every part of a step is run once at its real shapes (`kvpo.planning.peak`), the network at two
depths (`kvpo.planning.network`); how often it runs is counted in `kvpo.planning.amounts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from kvpo.config import RunConfig
from kvpo.convert.import_released import FORMATS
from kvpo.convert.wan_base import arguments
from kvpo.generators.geometry import Geometry
from kvpo.generators.preview import RELEASED, Layout, Preview, layout_of
from kvpo.generators.streaming import FrameDecoder, StreamingDecoder, VaeFrames
from kvpo.planning.amounts import decoded_together, replay_rows, side_by_side
from kvpo.planning.network import Network, network_costs
from kvpo.planning.peak import Ledger, Pass, bytes_of, cost, fake, materialise, on_meta
from kvpo.runs.loading import pipeline_folder

WAN_1_3B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
WAN_14B = WAN_1_3B | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_5B = WAN_1_3B | {
    "num_attention_heads": 24,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
}
"""Wan2.2-TI2V-5B."""
VAE_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""VAE of Wan2.2-TI2V-5B; the latents' own mean and scale are no matter of cost."""
BY_SIZE: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = {
    "1.3b": (WAN_1_3B, {}, "Wan2.1-1.3B"),
    "14b": (WAN_14B, {}, "Wan2.1-14B"),
    "5b": (WAN_5B, VAE_2_2, "Wan2.2-5B"),
}
"""Size -> transformer, VAE, name."""
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Shape of a pipeline: everything but weights."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    geometry: Geometry
    source: str


def sizes_of(config: RunConfig, size: str = "") -> Sizes:
    """Read the sizes of the recipe's pipeline folder, or of what `kvpo import` would write there.

    Raises FileNotFoundError if there is no folder yet and its name says no format.
    """
    folder = pipeline_folder(config.pipeline)
    if (folder / "model_index.json").is_file() and not size:
        read = {
            part: arguments(json.loads((folder / part / "config.json").read_text()))
            for part in ("transformer", "vae", "text_encoder")
        }
        return Sizes(
            read["transformer"],
            read["vae"],
            read["text_encoder"],
            Geometry.read(folder / "streaming.json"),
            str(folder),
        )
    if folder.name not in FORMATS:
        raise FileNotFoundError(
            f"{folder} is no pipeline folder, and no format of `kvpo import` has its name; formats are {', '.join(FORMATS)}"
        )
    transformer, vae, name = BY_SIZE[size or FORMATS[folder.name].size]
    return Sizes(
        dict(transformer),
        dict(vae),
        UMT5_XXL,
        FORMATS[folder.name].geometry,
        f"{name} as `kvpo import --format {folder.name}` would write it ({folder} is not there)",
    )


@dataclass(frozen=True)
class Decoding:
    """Cost of a decoder; of its work by latent frame."""

    weights: int
    """Bytes."""
    field: int
    """Latent frames before a frame that the frame's pixels depend on."""
    prefix: Pass
    rows: Pass
    """Cost of a latent frame in `Costs.rows` rows; its bytes include the decoder's state."""


@dataclass(frozen=True)
class Costs(Network):
    """Bytes and operations of the parts of a step, at the recipe's shapes."""

    vae: int
    text_encoder: int
    full: Decoding
    """The VAE's decoder; its weights are ``vae``, the encoder's with them."""
    preview: Decoding | None
    """The recipe's preview decoder, or the released one that it could have; None: there is none."""
    rows: Mapping[str, int]
    """Part -> rows it was run with."""

    @property
    def bare(self) -> float:
        """Operations of a pass without the adapter, of those with it."""
        return self.left_out / self.prefix.flops

    def decoding(self, config: RunConfig) -> Decoding:
        """Cost of the decoder that a group is scored with."""
        return self.preview if config.score.preview and self.preview else self.full

    def with_trainable(self, share: float) -> Costs:
        """Costs if ``share`` times as many numbers were trained."""
        return replace(self, trainable=int(self.trainable * share), sets=int(self.sets * share))


def costs(config: RunConfig, sizes: Sizes) -> Costs:
    """Costs of the parts of a recipe's step."""
    network = network_costs(config, sizes)
    vae_dtype = getattr(torch, config.vae_dtype)
    vae = on_meta(lambda: AutoencoderKLWan(**sizes.vae), vae_dtype)
    text = on_meta(lambda: UMT5EncoderModel(UMT5Config(**sizes.text)), getattr(torch, config.dtype))
    layout = _preview_layout(config, sizes)
    small = None if layout is None else on_meta(lambda: Preview(layout), vae_dtype)
    decoded = decoded_together(config)
    with fake() as ledger:
        materialise(vae.requires_grad_(False))
        full = _decoding(ledger, VaeFrames(vae), vae, sizes, decoded)
        preview = None
        if small is not None:
            materialise(small.requires_grad_(False))
            preview = _decoding(ledger, small, small, sizes, decoded)
    R = replay_rows(config, sizes.geometry)
    rows = {
        "branches": side_by_side(config),
        "replay": R,
        "gradient": R,
        "decode_rows": decoded,
    }
    return Costs(
        **vars(network),
        vae=bytes_of(vae.parameters()),
        text_encoder=bytes_of(text.parameters()),
        full=full,
        preview=preview,
        rows=rows,
    )


def _preview_layout(config: RunConfig, sizes: Sizes) -> Layout | None:
    """Layout of the recipe's preview decoder where its file is there.

    Else that of the released file for the generator's latents; None where there is none.
    """
    path = Path(config.score.preview)
    if config.score.preview and path.is_file():
        layout = layout_of(path)
        layout.check(sizes.vae, str(path))
        return layout
    latents = sizes.vae.get("z_dim", 16)
    wan = sizes.vae.get("base_dim", 96) >= 96  # the width of Wan's own VAEs
    return Layout(latents, 2 if latents == 48 else 1) if wan and latents in RELEASED else None


def _decoding(
    ledger: Ledger, network: FrameDecoder, module: torch.nn.Module, sizes: Sizes, rows: int
) -> Decoding:
    one, several = decoding_of(ledger, network, sizes, 1, rows)
    return Decoding(bytes_of(module.parameters()), network.field, one, several)


@torch.no_grad()
def decoding_of(ledger: Ledger, network: FrameDecoder, sizes: Sizes, *counts: int) -> list[Pass]:
    """Costs of decoding a latent frame in the middle of so many videos side by side, a count each.

    The bytes are the state's and the activations'. The most are decoded once, and fewer are their
    share of it; two at least, because a CPU decodes a row alone as two, and no card does.
    """
    g, decoder, most = sizes.geometry, StreamingDecoder(network), max(*counts, 2)
    channels = sizes.vae.get("z_dim", 16)
    latents = torch.zeros(most, 1, channels, g.latent_height, g.latent_width)
    with cost(ledger) as found:
        for _ in range(2):
            decoder(latents)
        before = ledger.flops
        decoder(latents)
    done = ledger.flops - before
    return [Pass(found.bytes * rows // most, done * rows // most) for rows in counts]


def fake_decoding(sizes: Sizes, dtype: torch.dtype, rows: int) -> Pass:
    """Cost of decoding a latent frame in so many rows, by the decoder alone."""
    vae = on_meta(lambda: AutoencoderKLWan(**sizes.vae), dtype)
    with fake() as ledger:
        materialise(vae.requires_grad_(False))
        (found,) = decoding_of(ledger, VaeFrames(vae), sizes, rows)
        return found
