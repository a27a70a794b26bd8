"""The flow convention: schedule, round trips, and the identity that ties the two energies
together."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvpo.common.rng import normal
from kvpo.generators import flow

SIGMAS = (1.0, 0.9375, 5.0 / 6.0, 0.625, 0.01)


def pair(dtype=torch.float64):
    """(x0, eps) BNCHW."""
    return normal((2, 3, 4, 5, 6), 0, "x0").to(dtype), normal((2, 3, 4, 5, 6), 0, "eps").to(dtype)


def test_schedule_of_the_released_models():
    assert flow.warped_sigmas() == pytest.approx((1.0, 0.9375, 0.8333333333, 0.625), abs=1e-9)
    assert [flow.TIME_SCALE * s for s in flow.warped_sigmas()] == pytest.approx(
        [1000.0, 937.5, 833.3333, 625.0], abs=1e-3
    )


def test_warp_ends_where_it_begins_and_bends_towards_noise():
    assert flow.warp(0.0) == 0.0 and flow.warp(1.0) == 1.0
    assert flow.warp(0.3, shift=1.0) == 0.3
    assert flow.warp(0.3, shift=5.0) > 0.3


@pytest.mark.parametrize("steps", (1, 3, 8))
def test_schedule_starts_at_noise_and_falls(steps):
    sigmas = flow.warped_sigmas(steps)
    assert len(sigmas) == steps and sigmas[0] == 1.0
    assert all(a > b > 0.0 for a, b in itertools.pairwise(sigmas))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_clean_comes_back_from_the_velocity(sigma):
    x0, eps = pair()
    x, v = flow.add_noise(x0, eps, sigma), flow.velocity_of(x0, eps)
    torch.testing.assert_close(flow.denoised(x, v, sigma), x0, rtol=0.0, atol=1e-12)


def test_velocity_is_the_derivative_of_the_path():
    x0, eps = pair()
    h, sigma = 1e-6, 0.4
    slope = (flow.add_noise(x0, eps, sigma + h) - flow.add_noise(x0, eps, sigma - h)) / (2 * h)
    torch.testing.assert_close(slope, flow.velocity_of(x0, eps), rtol=0.0, atol=1e-8)


def test_ends_of_the_path_are_exact():
    x0, eps = pair(torch.float32)
    assert torch.equal(flow.add_noise(x0, eps, 0.0), x0)
    assert torch.equal(flow.add_noise(x0, eps, 1.0), eps)


def test_one_sigma_per_frame():
    """Sigma broadcasts, so one call may hold frames of different noise levels."""
    x0, eps = pair()
    sigma = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)[None, :, None, None, None]
    x = flow.add_noise(x0, eps, sigma)
    for n, s in enumerate((1.0, 0.5, 0.1)):
        torch.testing.assert_close(x[:, n], flow.add_noise(x0[:, n], eps[:, n], s))
    torch.testing.assert_close(flow.denoised(x, flow.velocity_of(x0, eps), sigma), x0)


def test_denoising_keeps_the_dtype_and_computes_in_double():
    x0, eps = pair(torch.float32)
    x, v = flow.add_noise(x0, eps, 1.0), flow.velocity_of(x0, eps)
    found = flow.denoised(x, v, 1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, (x.double() - v.double()).float())


@pytest.mark.parametrize("sigma", SIGMAS)
def test_error_of_x0_is_sigma_times_error_of_velocity(sigma):
    """||x0 - x0'||^2 = sigma^2 ||v - v'||^2 at one input: what makes the denoised energy a weighted velocity energy."""
    x, v = pair()
    other = normal(x.shape, 0, "other").double()
    error = (flow.denoised(x, v, sigma) - flow.denoised(x, other, sigma)).square().mean()
    torch.testing.assert_close(error, sigma**2 * (v - other).square().mean())


@pytest.mark.parametrize("s", (-0.01, 1.01, 937.5, float("nan")))
def test_time_outside_the_unit_interval_is_refused(s):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]; 1 is noise"):
        flow.warp(s)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1 denoise step, not 0"):
        flow.warped_sigmas(0)
