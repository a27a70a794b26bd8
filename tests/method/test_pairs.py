"""A random subset of a window's velocities: its energies and gradients are right on average."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from test_align import settings
from tiny import draw, embed, new_pipeline, new_rollout, story, with_geometry

from kvpo.common.progress import Progress
from kvpo.common.rng import stream
from kvpo.config import from_dict
from kvpo.method import pairs as module
from kvpo.method.energies import VelocityEnergy
from kvpo.method.pairs import PairSampling
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.routing import KVRouting
from kvpo.planning.amounts import amounts
from kvpo.train import Alignment

P, S = 2, 2


@pytest.fixture(scope="module")
def group():
    """Three branches, two blocks, two steps, a switch between; and weights that have moved."""
    pipeline = with_geometry(new_pipeline(), steps=S)
    rollout = new_rollout(pipeline, story(7, 4), KVRouting(window_blocks=P), fork=3)
    pipeline.generator.requires_grad_(True)
    for i, p in enumerate(pipeline.generator.parameters()):
        p.data += 0.02 * draw(*p.shape, seed=i)
    return pipeline, rollout


def replay_of(group, factors=None, weights="equal", **kwargs) -> Replay:
    pipeline, rollout = group
    embeddings = embed(pipeline, rollout.script)
    energy = VelocityEnergy(weights)
    return Replay(
        pipeline, rollout, embeddings, CONTEXTS["branch"], energy, factors_PS=factors, **kwargs
    )


def gradient(group, replay: Replay) -> torch.Tensor:
    """Gradient of a fixed mixture of the branches' energies."""
    mixture = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    for branches, share in replay.passes():
        torch.dot(mixture[branches], share).backward()
    parameters = list(group[0].generator.parameters())
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for p in parameters:
        p.grad = None
    return found


def subsets(count: int, worth: int) -> list[torch.Tensor]:
    """The factors of every subset, each as the rule makes them from its own draw."""
    found = []
    for chosen in itertools.combinations(range(worth), count):
        order = torch.tensor([*chosen, *(i for i in range(worth) if i not in chosen)])
        with mock.patch.object(module.torch, "randperm", lambda n, generator, order=order: order):
            found.append(PairSampling(count).factors(torch.ones(P, S), stream(0, "x")))
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_over_all_draws_is_the_whole(group, count):
    """By enumeration: energies to 1e-12, the gradient to float32's rounding; single draws are far."""
    whole = replay_of(group)
    energy, grad = whole.energies(), gradient(group, whole)
    drawn = [replay_of(group, factors) for factors in subsets(count, P * S)]
    energies = torch.stack([replay.energies() for replay in drawn])
    torch.testing.assert_close(energies.mean(dim=0), energy, rtol=1e-6, atol=0.0)
    assert bool(((energies - energy).abs() > 0.02 * energy).any())
    gradients = torch.stack([gradient(group, replay) for replay in drawn])
    assert float((gradients.mean(dim=0) - grad).norm() / grad.norm()) < 1e-5
    assert float((gradients[0] - grad).norm() / grad.norm()) > 0.05


def test_every_subset_is_as_likely():
    seen = torch.zeros(P, S, dtype=torch.float64)
    for i in range(600):
        factors = PairSampling(1).factors(torch.ones(P, S), stream(0, "pairs", i))
        assert sorted(factors.flatten().tolist()) == [0.0, 0.0, 0.0, 4.0]
        seen += factors / 4.0
    assert float((seen - 150).abs().max()) < 45


def test_pairs_without_weight_are_never_drawn():
    weights = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    factors = PairSampling(1).factors(weights, stream(0, "x"))
    assert not factors[:, 0].any() and factors.sum() == 2.0
    assert torch.equal(PairSampling().factors(weights, stream(0, "x")), (weights > 0).double())
    assert torch.equal(PairSampling(9).factors(weights, stream(0, "x")), (weights > 0).double())


def test_what_is_not_drawn_is_not_computed(group):
    """Passes of the drawn velocities alone; and a past that nobody reads is not encoded: blocks
    behind the last that is replayed, and a prompt switch there."""
    pipeline = group[0]

    def calls(factors) -> tuple[int, int]:
        replay, before = replay_of(group, factors, rows_per_pass=1), pipeline.generator.calls
        replay.energies()
        return pipeline.generator.calls - before, sum(map(len, replay.plan))

    first = torch.tensor([[0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert calls(None) == (3 * P * S + 1 + 1, 12), "a clean pass, and the switch's"
    assert calls(first) == (3, 3) and calls(second) == (3 + 1 + 1, 3)


def test_a_run_draws_for_every_group(folder, tmp_path):
    """The setting reaches the replay: fewer velocities, a step all the same, another draw for
    another group; and the planner counts it."""
    config = from_dict(settings(folder, pairs={"count": 3}, rows_per_pass=1))
    whole = from_dict(settings(folder, rows_per_pass=1))
    run = Alignment(config, tmp_path, Progress())
    found = run.step(0)
    assert found["optim/step_norm"] > 0.0
    g = run.parts.pipeline.geometry
    assert amounts(config, g).replay_calls < amounts(whole, g).replay_calls
    start = run.parts.starts(1, [0])[0]
    group = run.group(1, 0, start)
    replays = [run._replay(step, group) for step in (1, 1, 2)]
    assert int((replays[0].weights_PS > 0).sum()) == 3
    assert torch.equal(replays[0].weights_PS, replays[1].weights_PS)
    assert not torch.equal(replays[0].weights_PS, replays[2].weights_PS)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="pairs.count = -1 must be 1 or more, or 0 for all pairs"):
        PairSampling(-1)
