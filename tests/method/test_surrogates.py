"""Energies: hand-worked values, gradients, precision, and the temperature."""

from __future__ import annotations

import pytest
import torch

from kvpo.common.rng import normal
from kvpo.generators import flow
from kvpo.method.energies import DenoisedEnergy, Temperature, VelocityEnergy, squared_residual

SIGMAS = flow.warped_sigmas()
SHAPE = (3, 2, 4, 3, 2, 2, 2)
"""BPSFCHW"""
SURROGATES = (
    VelocityEnergy(),
    DenoisedEnergy(),
    DenoisedEnergy(floor=0.0),
    DenoisedEnergy(floor=0.7),
)


def energy(surrogate, v_BPSFCHW, u_BPSFCHW, sigmas=SIGMAS):
    """E_B = 1 / (P S) sum_{b,s} w_s mean (v - u)^2, put together as `kvpo.method.replay` does."""
    rows = squared_residual(v_BPSFCHW.flatten(0, 2), u_BPSFCHW.flatten(0, 2)).unflatten(
        0, v_BPSFCHW.shape[:3]
    )
    return (rows * surrogate.step_weights(sigmas)).mean(dim=(1, 2))


def velocities(dtype=torch.float64):
    return normal(SHAPE, 0, "v").to(dtype), normal(SHAPE, 0, "u").to(dtype)


def test_velocity_energy_by_hand():
    """Residuals 1 and 3 in two steps, in one of two blocks: (1 + 9) / 2 steps / 2 blocks."""
    v, u = torch.zeros(2, 1, 2, 2, 1, 1, 1, 1, dtype=torch.float64)
    v[0, 0, 0], v[0, 0, 1] = 1.0, 3.0
    assert energy(VelocityEnergy(), v, u, (1.0, 0.5)).tolist() == [2.5]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_own_velocities_have_energy_zero(surrogate):
    v, _ = velocities()
    assert energy(surrogate, v, v.clone()).tolist() == [0.0] * SHAPE[0]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_branches_do_not_mix(surrogate):
    v, u = velocities()
    alone = [energy(surrogate, v[g : g + 1], u[g : g + 1]) for g in range(SHAPE[0])]
    torch.testing.assert_close(energy(surrogate, v, u), torch.cat(alone))


@pytest.mark.parametrize("floor", (0.0, 0.7, 1.0))
def test_denoised_energy_is_the_error_of_x0(floor):
    v, u = velocities()
    z = normal(SHAPE, 0, "z").double()
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)[:, None, None, None, None]
    error = (
        (flow.denoised(z, v, sigma) - flow.denoised(z, u, sigma)).square().mean(dim=(3, 4, 5, 6))
    )
    by_step = error / (2.0 * sigma.flatten().clamp_min(floor).square())
    torch.testing.assert_close(energy(DenoisedEnergy(floor), v, u), by_step.mean(dim=(1, 2)))


def test_floor_zero_is_half_the_velocity_energy():
    v, u = velocities()
    torch.testing.assert_close(
        energy(DenoisedEnergy(floor=0.0), v, u), 0.5 * energy(VelocityEnergy(), v, u)
    )


def test_step_weights_of_the_released_schedule():
    assert DenoisedEnergy().step_weights(SIGMAS).tolist() == pytest.approx(
        [0.5, 0.43945, 0.34722, 0.19531], abs=1e-5
    )
    assert VelocityEnergy().step_weights(SIGMAS).tolist() == [1.0] * 4


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradient_against_finite_differences(surrogate):
    v, u = (x[:2, :1, :, :1, :1, :1] for x in velocities())
    v = v.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: energy(surrogate, v, u), v)


def test_small_residuals_survive_bfloat16():
    """bf16 - bf16 in bf16 rounds; the energy must take the difference in float32."""
    v = torch.full((1, 1, 1, 1, 1), 1.0078125, dtype=torch.bfloat16)
    found = squared_residual(v, torch.full_like(v, 1.0))
    assert found.dtype == torch.float64 and found.item() == 0.0078125**2


def test_mean_is_taken_in_double():
    """1 + 2^-26 is 1 in float32."""
    v = torch.tensor([1.0, 2.0**-13]).reshape(1, 1, 1, 1, 2)
    found = squared_residual(v, torch.zeros_like(v))
    assert found.item() == (1.0 + 2.0**-26) / 2


def test_shapes_that_do_not_fit_are_refused():
    v, u = (x.flatten(0, 2) for x in velocities())
    with pytest.raises(ValueError, match="must have one shape"):
        squared_residual(v, u[:, :1])


@pytest.mark.parametrize("floor", (-0.1, 1.5))
def test_floor_outside_the_sigmas_is_refused(floor):
    with pytest.raises(ValueError, match=rf"floor {floor} must lie in \[0, 1\]"):
        DenoisedEnergy(floor)


def test_sigma_zero_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        DenoisedEnergy().step_weights((1.0, 0.0))


# --- Temperature ---


def test_automatic_temperature_gives_logits_of_spread_one():
    energy = torch.tensor([0.3, 0.5, 0.4, 0.9], dtype=torch.float64)
    tau = Temperature().resolve(energy)
    assert tau == pytest.approx(energy.std().item())
    assert (-energy / tau).std().item() == pytest.approx(1.0)


def test_fixed_temperature_ignores_the_energies():
    assert Temperature(0.25).resolve(torch.zeros(1)) == 0.25


def test_rounding_is_not_amplified():
    """A group whose energies agree to rounding gets the floor, hence logits that agree."""
    energy = 0.5 + 1e-15 * torch.arange(4, dtype=torch.float64)
    assert Temperature(floor=1e-6).resolve(energy) == pytest.approx(0.5e-6)


@pytest.mark.parametrize("value", (0.0, -1.0, float("inf"), float("nan"), "automatic", True, None))
def test_temperatures_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="must be a positive number or 'auto'"):
        Temperature(value)


@pytest.mark.parametrize("floor", (0.0, 1.0))
def test_floors_that_are_no_share_are_refused(floor):
    with pytest.raises(ValueError, match="relative to the mean energy"):
        Temperature(floor=floor)


@pytest.mark.parametrize(
    ("energies", "message"),
    [
        ([0.1, float("nan"), float("inf")], r"branches \[1, 2\] are broken"),
        ([0.1], "use 2 or more branches or a number"),
        ([0.0, 0.0], "explore with KV routing"),
    ],
)
def test_energies_without_a_spread_are_refused(energies, message):
    with pytest.raises(ValueError, match=message):
        Temperature().resolve(torch.tensor(energies))


def test_a_fixed_temperature_still_refuses_broken_energies():
    with pytest.raises(ValueError, match="not all finite"):
        Temperature(1.0).resolve(torch.tensor([0.1, float("nan")]))
