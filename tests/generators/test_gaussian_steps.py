"""Gaussian denoise steps: samplers' own, and the SDE that keeps the ODE's marginals."""

from __future__ import annotations

import pytest
import torch
from tiny import draw

from kvpo.generators.flow import denoised, warped_sigmas
from kvpo.generators.gaussian_steps import renoise_step, sde_stds, sde_step
from kvpo.generators.sampler import Ode, OwnSteps, Renoise

RELEASED = (1.0, 0.9375, 5 / 6, 0.625)


def gaussian_velocity(s: float, spread: float) -> float:
    """v(x) / x of data N(0, spread^2): E[eps - x0 | x] at noise level s."""
    return (s - (1 - s) * spread**2) / variance(s, spread)


def variance(s: float, spread: float) -> float:
    """Variance of a state at noise level s of that data: (1 - s)^2 spread^2 + s^2."""
    return (1 - s) ** 2 * spread**2 + s**2


def stepped(before: float, s: float, after: float, noise_level: float, spread: float) -> float:
    """Variance behind one Euler-Maruyama step from a state of variance ``before``."""
    std = sde_stds((s, after), noise_level)[0]
    step = sde_step(s, after, std)
    return (step.on_x + step.on_v * gaussian_velocity(s, spread)) ** 2 * before + step.std**2


def test_a_step_of_the_sde_by_hand():
    """s 0.8 to 0.6 with noise of 0.4: pull 0.16 / 1.6 = 0.1, so 0.9 x - 0.22 v + 0.4 eps; a = 1
    has noise of sqrt(4 * 0.2) there, and at s = 1 the next level stands for s: sqrt(0.2 / 0.2)."""
    step = sde_step(0.8, 0.6, 0.4)
    assert (step.on_x, step.on_v, step.std) == pytest.approx((0.9, -0.22, 0.4))
    assert sde_stds((1.0, 0.8, 0.6), 1.0) == pytest.approx((1.0, 0.8**0.5, 0.0))


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_marginals_are_those_of_the_ode(noise_level, spread):
    """Of Gaussian data the variance is known at every level. One short step from it errs in second
    order (a quarter at half the length), and a thousand steps end at the data's variance."""
    errors = []
    for ds in (1e-3, 5e-4):
        after = stepped(variance(0.6, spread), 0.6, 0.6 - ds, noise_level, spread)
        errors.append(abs(after - variance(0.6 - ds, spread)))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)
    found, n = 1.0, 2000
    for i in range(n - 1):
        found = stepped(found, 1 - i / n, 1 - (i + 1) / n, noise_level, spread)
    assert found == pytest.approx(variance(1 / n, spread), rel=0.02)


def test_a_wrong_drift_has_other_marginals():
    """Noise without its drift, or with the drift of the other sign, errs in first order."""
    after, std = 0.599, sde_stds((0.6, 0.599), 0.7)[0]
    right, v = variance(after, 1.0), gaussian_velocity(0.6, 1.0)
    exact = stepped(variance(0.6, 1.0), 0.6, after, 0.7, 1.0)
    bare = sde_step(0.6, after, 0.0)
    undriven = (bare.on_x + bare.on_v * v) ** 2 * variance(0.6, 1.0) + std**2
    assert abs(undriven - right) > 100 * abs(exact - right)


def test_the_excess_of_long_steps():
    """What `SdeExplorer.noise_level` says of the released schedule: of unit noise, alone in a state
    that has none of the data, up to 7 % too much variance at 0.3 and 23 % at 0.5."""
    for noise_level, most in ((0.3, 0.07), (0.5, 0.23)):
        stds = sde_stds(RELEASED, noise_level)
        excess = [
            ((after - std**2 / (2 * s)) ** 2 + std**2) / after**2 - 1
            for s, after, std in zip(RELEASED, RELEASED[1:], stds)
        ]
        assert max(excess) == pytest.approx(most, abs=0.005)
    assert warped_sigmas() == pytest.approx(RELEASED)


def test_samplers_take_their_gaussian_steps():
    x, v, eps = (draw(2, 1, 4, 2, 2, seed=i, dtype=torch.float64) for i in range(3))
    x0 = denoised(x, v, 0.8)
    torch.testing.assert_close(
        Renoise().next(x, v, x0, 0.8, 0.6, lambda: eps), renoise_step(0.8, 0.6).of(x, v, eps)
    )
    euler = Ode().next(x, v, x0, 0.8, 0.6, None)
    torch.testing.assert_close(euler, sde_step(0.8, 0.6, 0.0).of(x, v, eps))
    mixed = OwnSteps((0.8, 0.6), ((0.4, 0.0), ())).next(x, v, x0, 0.8, 0.6, lambda: eps)
    torch.testing.assert_close(mixed[0], sde_step(0.8, 0.6, 0.4).of(x, v, eps)[0])
    assert torch.equal(mixed[1], euler[1])
