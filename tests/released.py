"""Tiny files in exactly the released layouts: names, prefixes, nesting, dtypes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny import _seeded, draw, new_text_encoder
from transformers import UMT5Config, UMT5EncoderModel

from kvpo.convert.wan_names import diffusers_to_original
from kvpo.mini.pretraining.networks import new_tokenizer

SIZES = {
    "dim": 24,
    "eps": 1e-6,
    "ffn_dim": 32,
    "freq_dim": 16,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 16,
    "text_len": 24,
    "text_dim": 16,
}
"""Of the original folder's config.json; it has no text_dim, which is 4096 at full size."""


def new_wan(seed: int = 0, channels: int = 16, dim: int = 24) -> WanTransformer3DModel:
    return _seeded(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=dim // 2,
            in_channels=channels,
            out_channels=channels,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
        ),
        seed,
        0.15,
    )


def released_state(
    transformer: WanTransformer3DModel, dtype: torch.dtype = torch.float32, wrapper: str = ""
) -> dict[str, torch.Tensor]:
    """As `longlive_base.pt` names it; ``wrapper`` goes where FSDP leaves its own."""
    return {
        f"model.{wrapper}{name}": tensor.to(dtype)
        for name, tensor in diffusers_to_original(transformer.state_dict()).items()
    }


def released_lora(
    transformer: WanTransformer3DModel, rank: int = 4, seed: int = 9
) -> dict[str, torch.Tensor]:
    """A bare peft adapter on every linear map of the blocks."""
    state = {}
    linear = {
        n: m
        for n, m in transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")
    }
    for i, (name, module) in enumerate(linear.items()):
        (original,) = (
            n.removesuffix(".weight")
            for n in diffusers_to_original({f"{name}.weight": module.weight})
        )
        state[f"base_model.model.{original}.lora_A.weight"] = 0.3 * draw(
            rank, module.in_features, seed=seed + 2 * i
        )
        state[f"base_model.model.{original}.lora_B.weight"] = 0.3 * draw(
            module.out_features, rank, seed=seed + 2 * i + 1
        )
    return state


def original_folder(folder: Path) -> tuple[Path, AutoencoderKLWan, UMT5EncoderModel]:
    """The original Wan2.1 layout, and the modules whose weights it holds."""
    folder.mkdir(parents=True)
    vae = _seeded(lambda: AutoencoderKLWan(base_dim=4), 3, 0.02)
    text_encoder = gated_text_encoder()
    (folder / "config.json").write_text(json.dumps(SIZES))
    torch.save(
        {_original_vae(n): t for n, t in vae.state_dict().items()}, folder / "Wan2.1_VAE.pth"
    )
    torch.save(
        {
            _original_t5(n): t.bfloat16()
            for n, t in text_encoder.state_dict().items()
            if n != "encoder.embed_tokens.weight"
        },
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    new_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return folder, vae, text_encoder


def gated_text_encoder() -> UMT5EncoderModel:
    """Sized like the tiny one, with the released encoder's gated feed-forward and distances."""
    c = new_text_encoder().config
    config = UMT5Config(
        vocab_size=c.vocab_size,
        d_model=c.d_model,
        d_kv=c.d_kv,
        d_ff=c.d_ff,
        num_layers=2,
        num_heads=c.num_heads,
        relative_attention_num_buckets=c.relative_attention_num_buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return _seeded(lambda: UMT5EncoderModel(config), 5, 0.05)


def _original_vae(name: str) -> str:
    for side in ("encoder", "decoder"):
        for new, old in (
            ("mid_block.resnets.0", "middle.0"),
            ("mid_block.attentions.0", "middle.1"),
            ("mid_block.resnets.1", "middle.2"),
            ("norm_out", "head.0"),
            ("conv_out", "head.2"),
            ("conv_in", "conv1"),
            ("down_blocks", "downsamples"),
        ):
            name = name.replace(f"{side}.{new}", f"{side}.{old}")
    if "up_blocks" in name:
        _, _, block, kind, place, rest = name.split(".", 5)
        name = (
            f"decoder.upsamples.{4 * int(block) + (int(place) if kind == 'resnets' else 3)}.{rest}"
        )
    if ".middle.1." not in name:  # attention keeps its names
        for new, old in (
            (".norm1.", ".residual.0."),
            (".conv1.", ".residual.2."),
            (".norm2.", ".residual.3."),
            (".conv2.", ".residual.6."),
            (".conv_shortcut.", ".shortcut."),
        ):
            name = (
                name
                if name.startswith(("encoder.conv1", "decoder.conv1"))
                else name.replace(new, old)
            )
    return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")


def _original_t5(name: str) -> str:
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    for new, old in (
        ("shared.", "token_embedding."),
        ("encoder.block.", "blocks."),
        (".layer.0.layer_norm.", ".norm1."),
        (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
        (".layer.0.SelfAttention.", ".attn."),
        (".layer.1.layer_norm.", ".norm2."),
        (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
        (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
        (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
    ):
        name = name.replace(new, old)
    return name
