"""Energy of a branch, which says how likely it is, and the temperature that makes it a logit.

    E(g) = 1 / (P S) sum_{b,s} w_s mean_{F,C,H,W} (v_{b,s} - u_{b,s})^2        logit_g = -E(g) / tau

u are the velocities stored in the rollout, v those the evaluated weights give at the same inputs in
the unperturbed context (method.md section 4). Kinds of energy differ only in the step weights w_s:

    VelocityEnergy   the trajectory velocity energy (TVE), the paper's: every denoise step counts
                     alike, unless asked otherwise
    DenoisedEnergy   that of the denoised latents, the reference code's: late steps, of small sigma,
                     count less
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from kvpo.common.late import Late
from kvpo.method.step_weights import StepWeights, refuse_bad, step_weights

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")


class Surrogate(Protocol):
    """An energy that ranks branches by how well the unperturbed policy explains them."""

    needs_differing_context: ClassVar[bool]
    """True: branches that the unperturbed policy would have made itself have energy 0.

    Their gradient is zero as well.
    """

    def step_weights(self, sigmas: Sequence[float]) -> torch.Tensor:
        """w_S float64, one weight per denoise step."""
        ...


def squared_residual(v_RFCHW: torch.Tensor, u_RFCHW: torch.Tensor) -> torch.Tensor:
    """mean_{F,C,H,W} (v - u)^2 of every row, e_R float64.

    The difference is taken in float32 at least (bf16 would round away small residuals), the mean in
    float64.
    """
    if v_RFCHW.shape != u_RFCHW.shape:
        raise ValueError(
            f"velocities {tuple(v_RFCHW.shape)} and targets {tuple(u_RFCHW.shape)} must have one shape"
        )
    dtype = torch.promote_types(torch.promote_types(v_RFCHW.dtype, u_RFCHW.dtype), torch.float32)
    residual = v_RFCHW.to(dtype) - u_RFCHW.to(dtype)
    return residual.square().flatten(1).mean(dim=1, dtype=torch.float64)


def added_up(shares: Iterable[tuple[torch.Tensor, torch.Tensor]], members: int) -> torch.Tensor:
    """x_M float64 on the CPU, detached, from (member [R], share of its number [R]) of every pass."""
    found = torch.zeros(members, dtype=torch.float64)
    for member, share in shares:
        found.index_add_(0, member, share.detach().cpu().double())
    return found


@dataclass(frozen=True)
class Temperature:
    """tau of the Gibbs policy, fixed for a group once its old energies are known."""

    value: float | Literal["auto"] = "auto"
    """Divisor of energies: a number in units of energy, or `auto`.
    `auto` is the unbiased std over the group's members of the old policy's energies, so that logits
    have spread 1. Without it pi is uniform to several digits and clip and KL never act."""
    floor: float = 1e-6
    """Lower bound of `auto`: ``floor`` times the mean energy.
    A smaller spread is rounding and must not be amplified."""

    def __post_init__(self):
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if self.value != "auto" and not (number and 0.0 < self.value < math.inf):
            raise ValueError(f"temperature {self.value!r} must be a positive number or 'auto'")
        if not 0.0 < self.floor < 1.0:
            raise ValueError(
                f"temperature floor {self.floor} must lie in (0, 1); it is relative to the mean energy"
            )

    def resolve(self, energy_old_G: torch.Tensor) -> float:
        """tau.  ValueError where energies are not finite, fewer than 2, or all 0."""
        energy = energy_old_G.detach().double().flatten()
        if not energy.isfinite().all():
            raise ValueError(
                f"old energies {energy.tolist()} are not all finite; branches {(~energy.isfinite()).nonzero().flatten().tolist()} are broken; leave them out of the group"
            )
        if self.value != "auto":
            return float(self.value)
        if energy.numel() < 2:
            raise ValueError(
                f"automatic temperature is a spread over branches, but there is {energy.numel()} energy; use 2 or more branches or a number"
            )
        mean = energy.abs().mean().item()
        if mean == 0.0:
            raise ValueError(
                f"all {energy.numel()} energies are 0: the unperturbed policy makes these branches itself, and no gradient can tell them apart; "
                "explore with KV routing, or use an objective that is not an energy"
            )
        return max(energy.std().item(), self.floor * mean)


@dataclass(frozen=True)
class DenoisedEnergy:
    """The reference code's energy: the squared error of the denoised latents.

    w_s = sigma_s^2 / (2 max(sigma_s, floor)^2), so w_s ||v - u||^2 = ||x0_v - x0_u||^2 / (2
    max(sigma_s, floor)^2). It holds because both x0 come from one input: x0_v - x0_u =
    sigma (u - v).
    """

    floor: float = 1.0
    """Smallest sigma that the x0 error is divided by.
    1 gives sigma^2 / 2, the plain x0 error; 0 gives 1/2 at every step, half the velocity energy.
    Between them lie the reference code's other settings, for comparison only."""

    needs_differing_context: ClassVar[bool] = True

    def __post_init__(self):
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"sigma floor {self.floor} must lie in [0, 1], where sigmas lie")

    def step_weights(self, sigmas: Sequence[float]) -> torch.Tensor:
        sigma = torch.tensor([float(s) for s in sigmas], dtype=torch.float64)
        if not (sigma > 0.0).all():
            raise ValueError(
                f"sigmas {sigma.tolist()} must be positive: at 0 nothing is left to denoise"
            )
        return sigma.square() / (2.0 * sigma.clamp_min(self.floor).square())


@dataclass(frozen=True)
class VelocityEnergy:
    """The paper's energy: the mean squared residual of the velocities.

    In units of velocity squared; w_s = 1 unless ``weights`` says otherwise.
    """

    weights: StepWeights = "equal"
    """Weights of the denoise steps: `equal` (the paper's), `kernel`, or a number a step.
    `kernel` is the KL of the `renoise` sampler's own Gaussian steps. Weights are brought to mean 1.
    A step of weight 0 is not replayed, which saves its time: `[0, 0, 1, 1]` halves the replay."""
    last_sigma: float = 0.35
    """Noise level through which the last step's output is seen; `kernel` only.
    The last step has no re-noise of its own, and its exact weight is infinite. At 0.35 the last
    step of the released schedule weighs 5.4 times the one before it: measured on the miniature's
    shipped weights, 72 branches, is 5.3 (share of the change of the final latents, .472 to .072,
    per share of the energy, .31 to .25)."""

    needs_differing_context: ClassVar[bool] = True

    def __post_init__(self):
        refuse_bad(self.weights, self.last_sigma)

    def step_weights(self, sigmas: Sequence[float]) -> torch.Tensor:
        return step_weights(self.weights, sigmas, self.last_sigma)
