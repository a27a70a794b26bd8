"""A random generator small enough for unit tests: the stock classes in a pipeline folder, a toy
reward, short scripts.

Stock initial values leave norms at 1, biases at 0 and the modulation tables near 0, where many
mistakes cancel; here everything is random. The geometry (blocks of 2, a sink of 1) is deliberately
not the released models'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from kvpo.common.rng import stream
from kvpo.common.timing import Phases
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import SAMPLERS, NamedNoise, StackedNoise, Stream
from kvpo.method.rollout import roll_out
from kvpo.method.routing import KVRouting
from kvpo.method.settings import RolloutConfig
from kvpo.mini.pretraining.networks import new_tokenizer
from kvpo.mini.stories import vocabulary
from kvpo.rewards.base import RewardOutput, RewardSpec, VideoBatch
from kvpo.rewards.measured import scored
from kvpo.types import Rollout, Script

GEOMETRY = Geometry(
    block=2, sink=1, window=7, latent_height=4, latent_width=4, fps=16, text_length=24
)
"""Of 7 frames a routed block reads 1 of the sink, 3 routed, 1 nearest and its own 2: forks from
block 3 on."""
CHANNELS, TEXT_DIM = 4, 16
RED, BLUE, SMALL = "a red circle rises slowly", "it turns blue", "a small green square moves left"


def _seeded(build, seed: int, scale: float):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for parameter in module.parameters():
            parameter.data += scale * torch.randn(parameter.shape)
    return module.requires_grad_(False).eval()


def new_transformer(seed: int = 0, layers: int = 2) -> WanTransformer3DModel:
    return _seeded(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=1024,
        ),
        seed,
        0.15,
    )


def new_vae(seed: int = 1) -> AutoencoderKLWan:
    """4x in time, 8x in space."""
    return _seeded(
        lambda: AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.9, 1.1, 1.3, 0.7],
        ),
        seed,
        0.02,
    )


def new_text_encoder(seed: int = 2) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(vocabulary()) + 3,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _seeded(lambda: UMT5EncoderModel(config), seed, 0.05)


def new_pipeline(geometry: Geometry = GEOMETRY, seed: int = 0) -> Pipeline:
    transformer = new_transformer(seed)
    vae = new_vae(seed + 1)
    text_encoder = new_text_encoder(seed + 2)
    stock = WanPipeline(
        new_tokenizer(),
        text_encoder,
        vae,
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
        transformer,
    )
    return Pipeline(CausalWan(transformer), vae, geometry, stock, "tiny")


def with_geometry(pipeline: Pipeline, **changes) -> Pipeline:
    """The same modules, streaming otherwise."""
    return replace(pipeline, geometry=replace(pipeline.geometry, **changes))


def save_pipeline(folder: Path, **changes) -> Path:
    with_geometry(new_pipeline(), **changes).save(folder)
    return folder


# --- Scripts and streams ---


def story(
    blocks: int = 6, *starts: int, texts: tuple[str, ...] = (RED, BLUE, SMALL), id: str = "story"
) -> Script:
    """A script that switches at ``starts``."""
    return Script(id, texts[: len(starts) + 1], (0, *starts), blocks)


def embed(pipeline: Pipeline, *scripts: Script) -> dict[str, torch.Tensor]:
    texts = sorted({t for s in scripts for t in s.texts})
    return dict(zip(texts, pipeline.encode_text(texts)))


def new_stream(
    pipeline: Pipeline,
    *scripts: Script,
    seed: int = 0,
    capacity: int = 40,
    sampler: str = "renoise",
) -> Stream:
    """One row a script, each with the noise of its own id."""
    shape = pipeline.latent_shape(pipeline.geometry.block)
    noise = StackedNoise(tuple(NamedNoise(shape, seed, (s.id,)) for s in scripts))
    return Stream(
        pipeline.generator,
        pipeline.geometry,
        SAMPLERS[sampler],
        scripts,
        embed(pipeline, *scripts),
        noise,
        pipeline.new_cache(capacity, rows=len(scripts)),
    )


def new_rollout(
    pipeline: Pipeline,
    script: Script | None = None,
    explorer=None,
    branches: int = 3,
    seed: int = 0,
    name=("group",),
    fork: int | None = None,
    horizon=None,
    sampler: str = "renoise",
    cache_frames: int = 33,
    held=lambda fork: (),
    together: int = 0,
) -> Rollout:
    script, explorer = script or story(), explorer or KVRouting(window_blocks=2)
    config = RolloutConfig(branches=branches, cache_frames=cache_frames, together=together)
    return roll_out(
        pipeline,
        SAMPLERS[sampler],
        explorer,
        config,
        script,
        embed(pipeline, script),
        seed,
        name,
        Phases(),
        fork,
        horizon,
        held,
    )


# --- Rewards ---


@dataclass
class Warmth:
    """How red a clip's second half is."""

    spec: RewardSpec = RewardSpec("Warmth", "toy", needs_prompt=False)

    def load(self, device) -> None: ...

    def offload(self) -> None: ...

    def score(self, batch: VideoBatch) -> RewardOutput:
        return scored(
            self.spec,
            batch,
            lambda b: (
                (b.frames[:, b.length // 2 :, 0].float().mean(dim=(1, 2, 3)) / 255.0).clamp(0, 1),
                {},
            ),
        )


@dataclass
class Change:
    """How much a clip changes over time."""

    spec: RewardSpec = RewardSpec("Change", "toy-motion", needs_prompt=False)

    def load(self, device) -> None: ...

    def offload(self) -> None: ...

    def score(self, batch: VideoBatch) -> RewardOutput:
        return scored(
            self.spec,
            batch,
            lambda b: (
                (b.frames[:, 1:].float() - b.frames[:, :-1].float())
                .abs()
                .mean(dim=(1, 2, 3, 4))
                .div(255.0)
                .clamp(0, 1),
                {},
            ),
        )


class Broken(Warmth):
    """Gives NaN and calls it valid."""

    def score(self, batch: VideoBatch) -> RewardOutput:
        return RewardOutput(
            torch.full((len(batch),), float("nan")), torch.ones(len(batch), dtype=torch.bool)
        )


class Unmeasured(Warmth):
    """Measures nothing, and says so."""

    def __init__(self):
        self.spec = RewardSpec("Unmeasured", "toy", needs_prompt=False)

    def score(self, batch: VideoBatch) -> RewardOutput:
        return RewardOutput(
            torch.full((len(batch),), float("nan")), torch.zeros(len(batch), dtype=torch.bool)
        )


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=stream(seed, "tests"), dtype=torch.float64).to(dtype)
