"""Shapes that `kvpo bench` measures: of a generator, and of one group on it.

Weights are random in any case. Random weights make no video, but the same shapes are the same work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from kvpo.common.rng import normal, stream
from kvpo.config import RunConfig
from kvpo.convert.import_released import LONGLIVE_2
from kvpo.generators.backends import use_backend
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.routing import KVRouting
from kvpo.method.settings import RolloutConfig
from kvpo.method.update import Updater
from kvpo.planning.costs import UMT5_XXL, VAE_2_2, WAN_1_3B, WAN_5B, WAN_14B, Sizes, sizes_of
from kvpo.policy.policy import Policy
from kvpo.policy.settings import PolicyConfig
from kvpo.runs.loading import pipeline_folder
from kvpo.types import Script

WAN_GEOMETRY = Geometry(
    block=3, sink=3, window=12, latent_height=60, latent_width=104, fps=16, text_length=512
)
"""Streaming of the released 1.3B models: 480 x 832 pixels."""
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}
TINY_VAE = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_scales": [],
}
TINY_GEOMETRY = replace(WAN_GEOMETRY, latent_height=4, latent_width=4, text_length=8)
NAMED: Mapping[str, Sizes] = {
    "tiny": Sizes(WAN_1_3B | TINY, TINY_VAE, UMT5_XXL, TINY_GEOMETRY, "tiny"),
    "wan-1.3b": Sizes(WAN_1_3B, {}, UMT5_XXL, WAN_GEOMETRY, "wan-1.3b"),
    "wan-5b": Sizes(WAN_5B, VAE_2_2, UMT5_XXL, LONGLIVE_2, "wan-5b"),
    "wan-14b": Sizes(WAN_14B, {}, UMT5_XXL, WAN_GEOMETRY, "wan-14b"),
}
"""Sizes that need no folder; `tiny` is for a CPU and for tests."""


def named_sizes(name: str) -> Sizes:
    """The sizes of that name, or of a pipeline folder, a run, or `mini`.

    Raises FileNotFoundError, which lists the named ones, where it is none of these.
    """
    if name in NAMED:
        return NAMED[name]
    folder = pipeline_folder(name)
    try:
        return replace(sizes_of(RunConfig(pipeline=str(folder))), source=name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no size and no generator ({error}); give one of {', '.join(NAMED)}, a folder, a run or mini"
        ) from None


@dataclass(frozen=True)
class Load:
    """The group that is measured: few branches of a short window, so that minutes are enough."""

    branches: int = 4
    window_blocks: int = 3
    """Blocks explored after the fork."""
    rank: int = 256
    """LoRA rank; 0 = all weights are trained."""
    rows_per_pass: int = 16
    """Most velocities replayed together."""
    attention: Literal["sdpa", "cudnn", "efficient", "math", "flash", "flash3"] = "sdpa"
    """Kernel of the attention."""
    fork: int | None = None
    """Fork block; None = the first one whose window is full."""


def settings_of(load: Load, dtype: Literal["float32", "bfloat16"]) -> RunConfig:
    """The recipe that the group stands for."""
    policy = PolicyConfig(rank=load.rank) if load.rank else PolicyConfig(train="full")
    return replace(
        RunConfig(),
        attention=load.attention,
        dtype=dtype,
        vae_dtype=dtype,
        gradient_checkpointing=True,
        rows_per_pass=load.rows_per_pass,
        kv_routing=KVRouting(window_blocks=load.window_blocks),
        rollout=RolloutConfig(branches=load.branches),
        policy=policy,
    )


def script_of(load: Load, geometry: Geometry) -> tuple[Script, int]:
    """One prompt's script that ends with the window, and its fork block.

    ValueError where no block can be a fork.
    """
    explorer = KVRouting(window_blocks=load.window_blocks)
    long = 3 * (-(-max(geometry.window, 1) // geometry.block)) + load.window_blocks
    first = explorer.eligible_forks(long, geometry)[0]
    fork = first if load.fork is None else load.fork
    if fork < first:
        raise ValueError(
            f"block {fork} can not be a fork with a window of {load.window_blocks} blocks; give {first} or a later one"
        )
    return Script("bench", ("a",), (0,), fork + load.window_blocks), fork


def new_parts(config: RunConfig, sizes: Sizes, device: torch.device) -> SimpleNamespace:
    """The parts of a run that roll out, decode and replay, around random weights.

    They have a run's own names: config, pipeline, policy, updater, sampler.
    """
    dtype = getattr(torch, config.dtype)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(stream(0, "bench").initial_seed())
        transformer = _cast(WanTransformer3DModel(**sizes.transformer), dtype).eval()
        vae = _cast(AutoencoderKLWan(**sizes.vae), dtype).eval().requires_grad_(False)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    pipeline = Pipeline(CausalWan(transformer), vae, sizes.geometry, None, sizes.source)
    use_backend(pipeline.generator, config.attention)
    policy = Policy(pipeline.generator, config.policy, config.seed)
    updater = Updater(
        policy, config.optimizer, config.objective, config.temperature, config.unsafe, groups=1
    )
    return SimpleNamespace(
        config=config,
        pipeline=pipeline,
        policy=policy,
        updater=updater,
        sampler=SAMPLERS[config.sampler],
    )


def _cast(module, dtype: torch.dtype):
    """The module in ``dtype``, but for what its loader keeps in float32, too."""
    kept = set(module._keep_in_fp32_modules or ())
    for name, p in module.named_parameters():
        if not kept & set(name.split(".")):
            p.data = p.data.to(dtype)
    return module


def embeddings_of(parts: SimpleNamespace, script: Script) -> dict[str, torch.Tensor]:
    """Random text, prompt -> [L, D]."""
    g, model = parts.pipeline.geometry, parts.pipeline.generator
    shape = (g.text_length, model.transformer.config.text_dim)
    return {
        text: normal(shape, 0, "text", text).to(model.device, model.dtype) for text in script.texts
    }
