"""Costs of a recipe, found without weights.

Its own network, cache, decoder and policy are made and run on tensors without memory.

Every part of a step is run once at its real shapes (`kvpo.planning.peak`); how often it runs is
counted in `kvpo.planning.amounts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from kvpo.config import RunConfig
from kvpo.convert.import_released import FORMATS
from kvpo.convert.wan_base import arguments
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.memory import Bank
from kvpo.generators.pipeline import Geometry
from kvpo.generators.preview import RELEASED, Layout, Preview, layout_of
from kvpo.generators.streaming import FrameDecoder, StreamingDecoder, VaeFrames
from kvpo.planning.amounts import decoded_together, replay_rows, side_by_side
from kvpo.planning.peak import Ledger, cost, fake, flops
from kvpo.policy.adapters import Adapters
from kvpo.policy.policy import Policy
from kvpo.policy.sharding import master_of
from kvpo.runs.loading import folder_of

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
    folder = folder_of(config.pipeline)
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
class Pass:
    """Cost of running one part of the step once."""

    bytes: int
    flops: int


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
class Costs:
    """Bytes and operations of the parts of a step, at the recipe's shapes."""

    weights: int
    vae: int
    text_encoder: int
    trainable: int
    """Trained numbers."""
    sets: int
    """Bytes of masters, copies in the module, behaviour, reference and averaged weights."""
    frame: int
    """Bytes of a latent frame in the cache, all layers."""
    prefix: Pass
    branches: Pass
    replay: Pass
    gradient: Pass
    """Cost of a pass with gradient, without the gradients themselves."""
    full: Decoding
    """The VAE's decoder; its weights are ``vae``, the encoder's with them."""
    preview: Decoding | None
    """The recipe's preview decoder, or the released one that it could have; None: there is none."""
    rows: Mapping[str, int]
    """Part -> rows it was run with."""
    bare: float = 1.0
    """Operations of a pass without the adapter, of those with it."""
    maps: int = 0
    """Bytes of the maps that have an adapter."""

    def decoding(self, config: RunConfig) -> Decoding:
        """Cost of the decoder that a group is scored with."""
        return self.preview if config.score.preview and self.preview else self.full

    def with_trainable(self, share: float) -> Costs:
        """Costs if ``share`` times as many numbers were trained."""
        return replace(self, trainable=int(self.trainable * share), sets=int(self.sets * share))


def costs(config: RunConfig, sizes: Sizes) -> Costs:
    """Run every part once without numbers, and count its bytes and operations."""
    g = sizes.geometry
    B, R = side_by_side(config), replay_rows(config, g)
    model, vae, text = _networks(config, sizes)
    weights = _bytes(model.parameters())
    policy = on_meta(
        lambda: Policy(model, config.policy, config.seed), getattr(torch, config.dtype)
    )
    sets = _sets(config, policy, _bytes(model.parameters()) - weights)
    layout = _preview_layout(config, sizes)
    small = (
        None
        if layout is None
        else on_meta(lambda: Preview(layout), getattr(torch, config.vae_dtype))
    )
    with fake() as ledger:
        materialise(model)
        materialise(vae.requires_grad_(False))
        masters = [master_of(p) for p in model.parameters() if p.requires_grad]  # noqa: F841, they collect the gradients
        if config.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        cache = model.new_cache(
            2 * g.block + max(g.window, g.sink), g.latent_height, g.latent_width, sink=g.sink
        )
        cache.bank = Bank.empty(cache.k, g.bank_keep) if g.bank else None
        row, branches, replay = (_forward(ledger, model, cache, sizes, n) for n in (1, B, R))
        with cost(ledger) as gradient:
            _velocity(model, cache, sizes, R).square().mean().backward()
        with flops() as counted:  # once more: the counter keeps activations alive
            _velocity(model, cache, sizes, R).square().mean().backward()
        grad = Pass(max(0, gradient.bytes - 4 * policy.num_trainable), counted.get_total_flops())
        decoded = decoded_together(config)
        full = _decoding(ledger, VaeFrames(vae), vae, sizes, decoded)
        preview = None
        if small is not None:
            materialise(small.requires_grad_(False))
            preview = _decoding(ledger, small, small, sizes, decoded)
        bare, maps = _without_adapter(policy, lambda: _forward(ledger, model, cache, sizes, 1))
        rows = {"branches": B, "replay": R, "gradient": R, "decode_rows": decoded}
        return Costs(
            weights,
            _bytes(vae.parameters()),
            _bytes(text.parameters()),
            policy.num_trainable,
            sets,
            cache.nbytes // cache.capacity,
            row,
            branches,
            replay,
            grad,
            full,
            preview,
            rows,
            bare,
            maps,
        )


def _networks(
    config: RunConfig, sizes: Sizes
) -> tuple[CausalWan, AutoencoderKLWan, UMT5EncoderModel]:
    """The generator, the VAE and the text encoder, without memory."""
    dtype, vae_dtype = getattr(torch, config.dtype), getattr(torch, config.vae_dtype)
    return (
        on_meta(lambda: CausalWan(WanTransformer3DModel(**sizes.transformer)), dtype),
        on_meta(lambda: AutoencoderKLWan(**sizes.vae), vae_dtype),
        on_meta(lambda: UMT5EncoderModel(UMT5Config(**sizes.text)), dtype),
    )


def _sets(config: RunConfig, policy: Policy, added: int) -> int:
    """Bytes of all sets of trained weights; ``added``: those that the policy put into the module."""
    sets = (*policy.parameters, *policy.reference, *policy.behaviour, *policy.average)
    found = _bytes(sets) + added
    if config.policy.train == "full" and config.dtype == "float32":
        found -= _bytes(policy.parameters)  # they are the module's own
    return found


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
    prefix, many = (decoding_of(ledger, network, sizes, n) for n in (1, rows))
    return Decoding(_bytes(module.parameters()), network.field, prefix, many)


def _without_adapter(policy: Policy, forward: Callable[[], Pass]) -> tuple[float, int]:
    """Share of a pass's operations that is left without the adapter, and its maps' bytes."""
    if policy.config.train != "lora":
        return 1.0, 0
    adapters = Adapters(policy.model.transformer, policy.names)
    whole = forward().flops
    with adapters.left_out():
        return forward().flops / whole, _bytes(adapters.bases)


def on_meta(build, dtype: torch.dtype):
    """Build a module in ``dtype`` and without memory."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(torch.float32)


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def materialise(module: torch.nn.Module) -> None:
    """Replace tensors on meta by ones that operations can be run on.

    peft can not be run on fake ones.
    """
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(
                    torch.zeros_like(p, device="cpu"), requires_grad=p.requires_grad
                )
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.zeros_like(b, device="cpu")


def _velocity(model: CausalWan, cache, sizes: Sizes, rows: int) -> torch.Tensor:
    """Velocity of ``rows`` blocks that read a whole window."""
    g = sizes.geometry
    start = max(sizes.geometry.window, sizes.geometry.sink + sizes.geometry.block)
    cache.slots = {f: i % cache.capacity for i, f in enumerate(range(start))}
    x = torch.zeros(
        rows, g.block, sizes.transformer["in_channels"], g.latent_height, g.latent_width
    )
    text = torch.zeros(1, g.text_length, sizes.transformer["text_dim"], dtype=model.dtype)
    past = tuple(f for f in g.history.past(start, g.block) if f >= 0)
    past = (*past, *past[: g.bank])  # the bank's pages are as large as any
    return model.velocity(
        x,
        torch.full((rows,), 0.5),
        text,
        [list(range(start, start + g.block))] * rows,
        cache,
        [past] * rows,
        [0] * rows,
    )


@torch.no_grad()
def _forward(ledger: Ledger, model: CausalWan, cache, sizes: Sizes, rows: int) -> Pass:
    with flops() as counted, cost(ledger) as found:
        _velocity(model, cache, sizes, rows)
    return Pass(found.bytes, counted.get_total_flops())


@torch.no_grad()
def decoding_of(ledger: Ledger, network: FrameDecoder, sizes: Sizes, rows: int) -> Pass:
    """Cost of decoding a latent frame in the middle of a video.

    The bytes are the state's and the activations'. A row alone counts as half of two: on a CPU the
    VAE decodes it as two.
    """
    g, decoder, many = sizes.geometry, StreamingDecoder(network), max(rows, 2)
    channels = sizes.vae.get("z_dim", 16)
    latents = torch.zeros(many, 1, channels, g.latent_height, g.latent_width)
    with cost(ledger) as found:
        for _ in range(2):
            decoder(latents)
        with flops() as counted:
            decoder(latents)
    return Pass(found.bytes * rows // many, counted.get_total_flops() * rows // many)


def fake_decoding(sizes: Sizes, dtype: torch.dtype, rows: int) -> Pass:
    """Cost of decoding a latent frame in so many rows, by the decoder alone."""
    vae = on_meta(lambda: AutoencoderKLWan(**sizes.vae), dtype)
    with fake() as ledger:
        materialise(vae.requires_grad_(False))
        return decoding_of(ledger, VaeFrames(vae), sizes, rows)
