"""Weights of the denoise steps: hand-worked, exact in the gradient, and free where they are 0."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_config import refused
from test_replay import moved, one_by_one, replay_of, rollout_of  # noqa: F401, `moved` is a fixture
from tiny import new_pipeline, new_rollout, story

from kvpo.common.rng import normal
from kvpo.config import from_dict
from kvpo.generators.flow import add_noise, denoised, warped_sigmas
from kvpo.method.energies import VelocityEnergy
from kvpo.method.routing import KVRouting
from kvpo.method.velocity_penalty import VelocityPenalty, held_velocities
from kvpo.types import Trajectory

SIGMAS = warped_sigmas()
LATE = VelocityEnergy((0.0, 0.0, 1.0, 3.0))


# --- By hand ---


def test_the_kernel_by_hand():
    """1, 15/16, 5/6, 5/8: (1/15)^2 / 2, (15/16)^2 (1/5)^2 / 2, (5/6)^2 (3/5)^2 / 2; behind the
    last 0.35, (5/8)^2 (13/7)^2 / 2."""
    raw = [1 / 450, 225 / 256 / 50, 25 / 36 * 9 / 50, 25 / 64 * 169 / 98]
    assert raw[:3] == pytest.approx([0.0022, 0.0176, 0.125], abs=5e-5)
    mean = sum(raw) / 4
    assert VelocityEnergy("kernel").step_weights(SIGMAS).tolist() == pytest.approx(
        [w / mean for w in raw], rel=1e-6
    )
    assert VelocityEnergy("kernel").step_weights(SIGMAS).tolist() == pytest.approx(
        [0.0109, 0.0859, 0.6109, 3.2923], abs=1e-4
    )


def test_the_kernel_is_the_samplers_own():
    """KL of two Gaussians of one spread: squared distance of their means over twice the
    variance; the means are the sampler's, without its noise."""
    z, u, v = (normal((3, 2, 4, 5), 0, name).double() for name in "zuv")
    weights = VelocityEnergy("kernel").step_weights(SIGMAS)
    nothing = torch.zeros(3, 2, 4, 5, dtype=torch.float64)
    found = []
    for sigma, after in itertools.pairwise(SIGMAS):
        apart = [add_noise(denoised(z, w, sigma), nothing, after) for w in (u, v)]
        found.append(
            float((apart[0] - apart[1]).square().mean() / (2 * after**2) / (u - v).square().mean())
        )
    assert [w / found[0] for w in found] == pytest.approx(
        (weights / weights[0])[:3].tolist(), rel=1e-6
    )


def test_the_last_step_is_seen_through_noise():
    """Without any, it would be the only step: its share goes to 1."""
    shares = [
        float(VelocityEnergy("kernel", last).step_weights(SIGMAS)[-1]) / 4
        for last in (0.6, 0.35, 0.1, 1e-4)
    ]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0, abs=1e-6)


def test_numbers_are_brought_to_mean_one():
    assert LATE.step_weights(SIGMAS).tolist() == [0.0, 0.0, 1.0, 3.0]
    assert VelocityEnergy((1.0, 2.0, 3.0, 10.0)).step_weights(SIGMAS).tolist() == [
        0.25,
        0.5,
        0.75,
        2.5,
    ]
    assert (
        VelocityEnergy().step_weights(SIGMAS).tolist()
        == VelocityEnergy((7.0,) * 4).step_weights(SIGMAS).tolist()
        == [1.0] * 4
    )


# --- In replay ---


def test_weighted_energies_are_the_definition_s(pipeline, moved):  # noqa: F811
    rollout = rollout_of(pipeline, (5,))
    for surrogate in (VelocityEnergy("kernel"), LATE):
        for context in ("branch", "self"):
            torch.testing.assert_close(
                replay_of(moved, rollout, context, surrogate).energies(),
                one_by_one(moved, rollout, context, surrogate),
                rtol=1e-5,
                atol=0,
            )


@pytest.mark.parametrize(
    "weights, steps",
    [((0.0, 0.0, 1.0, 3.0), [2, 3]), ((1.0, 0.0, 0.0, 0.0), [0]), ("kernel", [0, 1, 2, 3])],
)
def test_steps_without_weight_are_not_replayed(pipeline, moved, monkeypatch, weights, steps):  # noqa: F811
    """Neither in a pass nor as one of its rows; what is written between the blocks stays."""
    rollout, rows = rollout_of(pipeline), []
    velocity = type(moved.generator).velocity
    monkeypatch.setattr(
        type(moved.generator),
        "velocity",
        lambda self, x, sigma, *args: rows.append(sigma) or velocity(self, x, sigma, *args),
    )
    replay = replay_of(moved, rollout, surrogate=VelocityEnergy(weights))
    assert sorted({r.step for parts in replay.plan for part in parts for r in part}) == steps
    replay.energies()
    # of 3 branches one velocity serves at the first step of the first block
    shared = 2 * (0 in steps)
    assert sum(len(sigma) for sigma in rows) == 3 * 3 * len(steps) - shared
    assert {round(float(s), 4) for sigma in rows for s in sigma} == {
        round(SIGMAS[s], 4) for s in steps
    }


def test_the_gradient_with_weights_against_finite_differences(monkeypatch):
    """In float64, a few weights of every kind; the fork's block alone, whose past does not move
    with them."""
    # the stock network computes its norms in float32 whatever its dtype
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact = new_pipeline()
    exact.generator.double()
    rollout = new_rollout(exact, story(6), KVRouting(window_blocks=1), fork=4, branches=2)
    t = rollout.trajectory
    rollout = replace(
        rollout, trajectory=Trajectory(t.inputs.double(), t.velocities.double(), t.clean.double())
    )
    pull = torch.tensor([1.0, -0.5], dtype=torch.float64)
    parameters = dict(exact.generator.transformer.named_parameters())
    names = (
        "blocks.0.attn1.to_q.weight",
        "blocks.0.attn2.to_k.weight",
        "blocks.1.scale_shift_table",
        "proj_out.weight",
    )
    for surrogate in (VelocityEnergy("kernel"), LATE):
        replay = replay_of(exact, rollout, surrogate=surrogate)
        replay.embeddings = {k: v.double() for k, v in replay.embeddings.items()}
        for name in names:
            parameters[name].requires_grad_(True).grad = None
        for branch, share in replay.passes():
            (pull[branch] * share).sum().backward()
        for name in names:
            p = parameters[name]
            at, values = p.numel() // 3, []
            for delta in (1e-5, -2e-5):
                p.data.view(-1)[at] += delta
                values.append(float(pull @ replay.energies()))
            p.data.view(-1)[at] += 1e-5
            assert float(p.grad.view(-1)[at]) == pytest.approx(
                (values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9
            ), name


# --- The penalty ---


def test_the_penalty_holds_the_steps_it_is_asked_for(pipeline):
    rollout = new_rollout(pipeline, story(7), fork=4, held=lambda fork: [1])
    embeddings = replay_of(pipeline, rollout).embeddings
    whole = held_velocities(pipeline, rollout, embeddings, 1)
    late = held_velocities(pipeline, rollout, embeddings, 1, (3, 2))
    assert len(whole) == 4 and len(late) == 2
    torch.testing.assert_close(late, whole[2:], rtol=1e-4, atol=1e-6)


# --- What can not be ---


@pytest.mark.parametrize(
    "content, message",
    [
        ({"velocity_energy": {"weights": "late"}}, "velocity_energy.weights"),
        ({"velocity_energy": {"weights": [0, 0, 0, 0]}}, "at least one must be positive"),
        ({"velocity_energy": {"weights": [1, -1, 1, 1]}}, "must not be negative"),
        ({"velocity_energy": {"weights": [1, float("nan")]}}, "must not be negative"),
        (
            {"velocity_energy": {"weights": "kernel", "last_sigma": 0.0}},
            "would leave the last step alone",
        ),
        (
            {"velocity_energy": {"weights": "kernel"}, "sampler": "ode"},
            "which sampler = ode does not take",
        ),
        ({"velocity_penalty": {"steps": [2, 2]}}, "must name each denoise step once"),
    ],
)
def test_settings_that_can_not_be(content, message):
    assert message in refused(content)


def test_weights_that_do_not_fit_the_generator(pipeline):
    with pytest.raises(
        ValueError, match="3 step weights .*, but this generator takes 4 denoise steps"
    ):
        VelocityEnergy((1.0, 1.0, 1.0)).step_weights(SIGMAS)
    with pytest.raises(ValueError, match="need falling noise levels"):
        VelocityEnergy("kernel", 0.7).step_weights(SIGMAS)
    with pytest.raises(ValueError, match="4 denoise steps count from 0 to 3"):
        VelocityPenalty(steps=(4,)).check(pipeline.geometry)


def test_recipes_and_options_say_it_alike():
    assert from_dict({"velocity_energy": {"weights": [0, 0, 1, 3]}}).energy == LATE
    assert (
        from_dict(
            {
                "velocity_energy": {"weights": "kernel"},
                "surrogate": "denoised_energy",
                "sampler": "ode",
            }
        ).sampler
        == "ode"
    ), "of another energy"
