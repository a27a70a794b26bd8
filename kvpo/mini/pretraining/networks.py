"""The miniature's networks: the stock classes of a Wan pipeline folder, at tiny sizes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from kvpo.common.rng import stream
from kvpo.mini.stories import vocabulary

BLOCK, SINK, WINDOW = 3, 3, 12
"""Latent frames of a block, of the sink, and of all that a block sees (itself included).

They are the released models' numbers.
"""
STEPS = 4
"""Denoise steps of the few-step sampler."""
TEXT_LEN = 24
LATENT_CHANNELS = 16
TEXT_DIM = 64


def _seeded(build, seed: int, name: str):
    """Build a module whose initial weights depend on (seed, name) only.

    The global generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "init", name).initial_seed())
        return build()


def new_vae(seed: int) -> AutoencoderKLWan:
    """4x in time, 8x in space (2x by patches, 4x by convolutions)."""
    return _seeded(
        lambda: AutoencoderKLWan(
            base_dim=32,
            decoder_base_dim=16,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        ),
        seed,
        "vae",
    )


def new_transformer(seed: int) -> WanTransformer3DModel:
    return _seeded(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=64,
            ffn_dim=384,
            num_layers=6,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=1024,
        ),
        seed,
        "transformer",
    )


def new_text_encoder(seed: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(vocabulary()) + 3,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _seeded(lambda: UMT5EncoderModel(config), seed, "text_encoder")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a word; words outside the grammar are <unk>."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LEN,
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts) -> torch.Tensor:
    """Tokens [P, TEXT_LEN], padded."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TEXT_LEN, return_tensors="pt"
    ).input_ids


def encode_text(encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """Embed tokens [P, L] as [P, L, D].

    Rows after the text are zero and NOT masked in the transformer: Wan's convention.
    """
    mask = (ids != encoder.config.pad_token_id).long()
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[:, :, None]
