"""The penalty on the opening: drawn where the cache still is what the block read, zero at the
start weights, a pull back once they moved."""

from __future__ import annotations

import pytest
import torch
from tiny import embed, new_pipeline, new_rollout, story, with_geometry

from kvpo.common.rng import stream
from kvpo.common.timing import Phases
from kvpo.generators.sampler import SAMPLERS, NamedNoise
from kvpo.method.advantages import UnsafePolicy
from kvpo.method.energies import Temperature
from kvpo.method.objectives.tve_ppo import TvePpo
from kvpo.method.prefix import PrefixPlan, generate_prefixes
from kvpo.method.update import OptimizerConfig, Updater
from kvpo.method.velocity_penalty import VelocityPenalty, held_velocities, replayable
from kvpo.policy.policy import Policy, PolicyConfig
from kvpo.types import Rollout, Window

FORK = 6
CACHE = 9
"""Latent frames; 12 lie before the fork, so some have been evicted by then."""


@pytest.fixture(scope="module")
def pipeline():
    return new_pipeline()


@pytest.mark.parametrize(
    "window, cache_frames",
    [(7, CACHE), (7, 40), (-1, 40)],
    ids=["window", "window, all resident", "all the past"],
)
@pytest.mark.parametrize("starts", [(), (3,), (2, 4), (FORK,)], ids=str)
def test_a_block_can_be_replayed_where_its_past_is_what_it_read(
    pipeline, window, starts, cache_frames
):
    """Against the velocities of the generation itself, block by block: equal where the rule says
    so, and only there."""
    pipeline = with_geometry(pipeline, window=window)
    script, g = story(8, *starts), pipeline.geometry
    embeddings = embed(pipeline, script)
    noise = NamedNoise(pipeline.latent_shape(g.block), 0, ("past",))
    straight: list[torch.Tensor] = []
    (prefix, once), (inputs, _) = generate_prefixes(
        pipeline,
        SAMPLERS["renoise"],
        [
            PrefixPlan(script, Window(FORK, 1), noise, range(FORK)),
            PrefixPlan(script, Window(0, 1), noise),
        ],
        embeddings,
        cache_frames,
    )
    for _ in range(FORK):
        once.advance(observe=lambda i, x, v: straight.append(v[0]))
    # of a rollout the past alone is asked here
    rollout = Rollout(script, None, (), None, None, None, prefix.cache, inputs)
    same = []
    for block, velocities in enumerate(torch.stack(straight).unflatten(0, (FORK, -1))):
        try:
            again = held_velocities(pipeline, rollout, embeddings, block)
        except KeyError:  # its past is no longer resident
            continue
        if (again - velocities).abs().max() < 1e-5:
            same.append(block)
    assert replayable(script, FORK, g, cache_frames) == same
    assert same


def test_blocks_are_drawn_by_name_and_without_repeats(pipeline):
    script, g = story(8), pipeline.geometry

    def draw(n, name):
        return VelocityPenalty(1.0, n).draw(script, FORK, 5, g, 40, stream(0, name))

    assert draw(3, "a") == draw(3, "a") and len(set(draw(3, "a"))) == 3
    assert {b for name in "abcdefghijklmnopqrstuvwx" for b in draw(1, name)} == {0, 1, 2, 3, 4}
    assert draw(99, "a") == [0, 1, 2, 3, 4], "all there are"
    assert VelocityPenalty(0.0).draw(script, FORK, 5, g, 40, stream(0, "a")) == []


class Held:
    def __init__(self, clip: float = 1e9, groups: int = 1):
        self.pipeline = new_pipeline()
        self.rollout = new_rollout(self.pipeline, story(7), fork=4, held=lambda fork: [1, 3])
        self.policy = Policy(self.pipeline.generator, PolicyConfig(train="full"), 0)
        self.updater = Updater(
            self.policy,
            OptimizerConfig(clip=clip),
            TvePpo(),
            Temperature(),
            UnsafePolicy(),
            groups,
        )
        self.embeddings = embed(self.pipeline, self.rollout.script)

    def velocities(self) -> list[torch.Tensor]:
        return [
            held_velocities(self.pipeline, self.rollout, self.embeddings, block)
            for block in self.rollout.held
        ]

    def moved(self) -> Held:
        """One update away from the start weights."""
        with torch.no_grad():
            for i, p in enumerate(self.policy.parameters):
                p += 0.01 * torch.randn(p.shape, generator=stream(0, "move", i))
        self.policy.updated()
        return self

    def hold(self, weight: float = 2.0) -> dict[str, float]:
        return self.updater.hold(VelocityPenalty(weight, 2), self.velocities, Phases())

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.policy.parameters])


def test_nothing_is_held_before_the_first_update():
    run = Held()
    assert run.hold() == {} and all(p.grad is None for p in run.policy.parameters)


def test_the_gradient_is_that_of_the_mean_squared_distance():
    run = Held().moved()
    with run.policy.using(run.policy.reference):
        reference = run.velocities()
    elements = torch.cat([(v - u).flatten() for v, u in zip(run.velocities(), reference)])
    (2.0 * elements.square().mean()).backward()
    whole = run.gradient()
    run.updater.optimizer.zero_grad(set_to_none=True)
    metrics = run.hold()
    torch.testing.assert_close(run.gradient(), whole, rtol=1e-4, atol=1e-6)
    assert metrics["hold/distance"] == pytest.approx(
        float(elements.detach().square().mean()), rel=1e-5
    )
    assert (
        metrics["hold/grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-4)
        and float(whole.norm()) > 1e-3
    )


def test_a_step_along_the_penalty_alone_leads_back():
    run = Held().moved()
    before = run.hold()["hold/distance"]
    run.updater.step()
    assert run.hold()["hold/distance"] < before


def test_the_penalty_is_clipped_like_a_group_and_added_to_what_is_there():
    run = Held(clip=0.5, groups=4).moved()
    for p in run.policy.parameters:
        p.grad = torch.ones_like(p)
    run.hold(weight=1e6)
    assert float((run.gradient() - 1.0).norm()) == pytest.approx(0.5 / 4, rel=1e-3)


@pytest.mark.parametrize(
    "weight, blocks, says",
    [(-1.0, 1, "weight = -1.0"), (float("nan"), 1, "weight = nan"), (1.0, 0, "blocks = 0")],
)
def test_settings_that_can_not_be(weight, blocks, says):
    with pytest.raises(ValueError, match=says):
        VelocityPenalty(weight, blocks)
