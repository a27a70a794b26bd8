"""The real width at the real grid, two layers deep: 1,560 tokens of 1,536 numbers a frame, in
bf16, on a CPU."""

from __future__ import annotations

import pytest
import torch

from kvpo.common.rng import normal
from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.convert.wan_base import new_transformer
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import SAMPLERS, NamedNoise, Stream
from kvpo.method.advantages import Advantages
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.rollout import roll_out
from kvpo.method.routing import KVRouting
from kvpo.method.settings import RolloutConfig
from kvpo.method.update import Updater
from kvpo.planning.amounts import with_changes
from kvpo.planning.costs import UMT5_XXL, WAN_1_3B, Sizes, costs
from kvpo.planning.memory import stages
from kvpo.policy.policy import Policy, PolicyConfig
from kvpo.types import RewardTable, Script

SHAPE = WAN_1_3B | {"num_layers": 2}
GEOMETRY = Geometry(
    block=3, sink=1, window=6, latent_height=60, latent_width=104, fps=16, text_length=512, steps=2
)
"""A window small enough to fork at block 2; two steps instead of four."""


def full_size() -> Pipeline:
    transformer = new_transformer(SHAPE)
    state = {
        n: 0.02 * normal(tuple(p.shape), 0, "weights", n) for n, p in transformer.named_parameters()
    }
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = type(transformer)(**SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    for n, p in transformer.named_parameters():
        p.data.copy_(state[n] + (1.0 if "norm" in n and n.endswith("weight") else 0.0))
    return Pipeline(
        CausalWan(transformer.requires_grad_(False).eval()), None, GEOMETRY, None, "full size"
    )


@pytest.mark.slow
def test_two_blocks_and_a_step():
    pipeline, script = full_size(), Script("s", ("a prompt",), (0,), 3)
    model, g = pipeline.generator, pipeline.geometry
    embeddings = {"a prompt": normal((512, 4096), 0, "text").bfloat16()}
    assert model.dtype == torch.bfloat16 and model.grid(60, 104) == (30, 52)

    stream = Stream(
        model,
        g,
        SAMPLERS["renoise"],
        [script],
        embeddings,
        NamedNoise(pipeline.latent_shape(3), 0, ("s",)),
        pipeline.new_cache(6),
    )
    blocks = [stream.advance() for _ in range(2)]
    assert all(
        b.shape == (1, 3, 16, 60, 104) and b.dtype == torch.float32 and b.isfinite().all()
        for b in blocks
    )
    assert (
        stream.cache.k[0].shape == (1, 6, 1560, 12, 128)
        and stream.cache.k[0].dtype == torch.bfloat16
    )

    config = RunConfig(
        dtype="bfloat16",
        gradient_checkpointing=True,
        rows_per_pass=2,
        policy=PolicyConfig(rank=16),
        rollout=RolloutConfig(branches=2, cache_frames=9),
        kv_routing=KVRouting(window_blocks=1),
    )
    model.transformer.enable_gradient_checkpointing()
    policy = Policy(model, config.policy, 0)
    updater = Updater(
        policy, config.optimizer, config.objective, config.temperature, config.unsafe, groups=1
    )
    with torch.no_grad():
        rollout = roll_out(
            pipeline,
            SAMPLERS["renoise"],
            config.exploring,
            config.rollout,
            script,
            embeddings,
            0,
            ("group",),
            Phases(),
            fork=2,
        )
    assert rollout.trajectory.inputs.shape == (3, 1, 2, 3, 16, 60, 104)
    replay = Replay(
        pipeline, rollout, embeddings, CONTEXTS["branch"], config.energy, rows_per_pass=2
    )
    anchor = Replay(
        pipeline, rollout, embeddings, CONTEXTS["branch"], config.energy, [2]
    ).energies()
    advantage = Advantages()(
        RewardTable(
            ("r",),
            torch.tensor([[1.0, 0.0, 0.5]]).double(),
            torch.tensor([[1.0, 0.0, 0.5]]).double(),
            torch.ones(3, dtype=torch.bool),
        )
    )
    update = updater.accumulate(replay, advantage, Phases())
    assert anchor.max() < 1e-4 * update.energy.min(), (
        "bf16 in passes of other sizes may round otherwise, but explains its own anchor"
    )
    assert update.energy.isfinite().all() and update.metrics["optim/grad_norm"] > 0.0
    updater.step()
    assert (
        all(p.dtype == torch.float32 and p.isfinite().all() for p in policy.parameters)
        and policy.drift() > 0.0
    )

    sizes = Sizes(
        SHAPE, {"base_dim": 4}, UMT5_XXL | {"num_layers": 1, "vocab_size": 8}, g, "two layers"
    )
    planned = costs(with_changes(config, {"data.blocks": 3, "data.segments": 1}), sizes)
    assert planned.frame == 2 * 2 * 1560 * 1536 * 2 == stream.cache.nbytes // 6
    assert planned.trainable == policy.num_trainable and stages(
        with_changes(config, {"data.blocks": 3, "data.segments": 1}), sizes, planned
    )
