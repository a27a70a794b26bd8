"""The samplers on velocities whose answer is known."""

from __future__ import annotations

import pytest
import torch
from tiny import draw, new_stream, story

from kvpo.common.rng import normal
from kvpo.generators.flow import add_noise, warped_sigmas
from kvpo.generators.sampler import NamedNoise, Ode, Renoise, StackedNoise, denoise_block

SIGMAS = warped_sigmas()


def never(step):
    raise AssertionError("the ode sampler needs no noise")


def test_ode_is_exact_on_straight_lines():
    """v = eps - x0 along the whole path: Euler steps of any size end at x0, and stay on the line
    between."""
    x0, eps, seen = draw(1, 2, 4, 4, 4), draw(1, 2, 4, 4, 4, seed=1), []
    clean = denoise_block(
        lambda x, sigma: eps - x0, Ode(), SIGMAS, eps, never, lambda i, x, v: seen.append(x)
    )
    torch.testing.assert_close(clean, x0, atol=1e-6, rtol=0)
    for sigma, x in zip(SIGMAS, seen, strict=True):
        torch.testing.assert_close(x, add_noise(x0, eps, sigma), atol=1e-6, rtol=0)


def test_ode_has_order_one():
    """dx/dsigma = x: twice the steps, half the error."""

    def error(steps: int) -> float:
        sigmas = [1.0 - i / steps for i in range(steps)]
        return abs(
            float(
                denoise_block(
                    lambda x, s: x, Ode(), sigmas, torch.ones(1, dtype=torch.float64), never
                )
            )
            - 2.718281828459045**-1
        )

    errors = [error(n) for n in (16, 32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1) and errors[1] / errors[
        2
    ] == pytest.approx(2.0, abs=0.05)


def test_renoise_by_hand():
    """Every step: the predicted clean latents, re-noised with that step's own noise."""
    start, noises = draw(1, 2, 4, 4, 4), [draw(1, 2, 4, 4, 4, seed=i) for i in (1, 2, 3)]
    x, expected = start.double(), []
    for i, sigma in enumerate(SIGMAS):
        x0 = x - sigma * (0.3 * x + sigma)
        expected.append(x0)
        if i < 3:
            x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * noises[i].double()
    seen = []
    clean = denoise_block(
        lambda x, s: 0.3 * x + s,
        Renoise(),
        SIGMAS,
        start,
        noises.__getitem__,
        lambda i, x, v: seen.append((i, x, v)),
    )
    torch.testing.assert_close(clean, expected[-1].float(), atol=1e-5, rtol=0)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    for (_, x, v), x0, sigma in zip(seen, expected, SIGMAS):
        torch.testing.assert_close(x - sigma * v, x0.float(), atol=1e-5, rtol=0)


def test_one_step():
    clean = denoise_block(lambda x, s: x, Renoise(), [1.0], torch.ones(3), never)
    assert torch.equal(clean, torch.zeros(3))


def test_named_noise_is_its_stream():
    noise = NamedNoise((2, 4, 4, 4), 3, ("train", 5))
    assert torch.equal(noise.start(2), normal((2, 4, 4, 4), 3, "train", 5, "start", 2))
    assert torch.equal(noise.renoise(2, 1), normal((2, 4, 4, 4), 3, "train", 5, "renoise", 2, 1))
    other = NamedNoise((2, 4, 4, 4), 3, ("train", 6))
    stacked = StackedNoise((noise, other))
    assert torch.equal(stacked.start(0), torch.stack((noise.start(0), other.start(0))))
    assert torch.equal(
        stacked.renoise(0, 2), torch.stack((noise.renoise(0, 2), other.renoise(0, 2)))
    )


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_a_stream_is_deterministic(pipeline, sampler):
    a, b = (new_stream(pipeline, story(3, 2), sampler=sampler) for _ in range(2))
    for _ in range(3):
        assert torch.equal(a.advance(), b.advance())


def test_the_samplers_differ(pipeline):
    a, b = (new_stream(pipeline, story(1), sampler=s) for s in ("renoise", "ode"))
    assert (a.advance() - b.advance()).abs().max() > 1e-2
