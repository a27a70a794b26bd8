"""The flow-matching convention, in one place.

    x_sigma = (1 - sigma) x0 + sigma eps        v = eps - x0        x0 = x_sigma - sigma v

sigma = 1 is noise, sigma = 0 is data. The network is told ``1000 * sigma`` (of the WARPED sigma:
feeding the unwarped time beside the warped sigma gives noise that never commits, and looks like a
bad model).
"""

from __future__ import annotations

import torch

TIME_SCALE = 1000.0
"""Network time = TIME_SCALE * sigma."""


def warp(s: float, shift: float = 5.0) -> float:
    """Wan's shifted schedule, sigma = shift s / (1 + (shift - 1) s)."""
    if not 0.0 <= s <= 1.0:
        raise ValueError(f"unwarped time {s} is outside [0, 1]; 1 is noise, 0 is data")
    return shift * s / (1.0 + (shift - 1.0) * s)


def warped_sigmas(steps: int = 4, shift: float = 5.0) -> tuple[float, ...]:
    """The few-step schedule of the released models; 4 steps: 1, .9375, .83333, .625.

    The final 0 is not listed.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 denoise step, not {steps}")
    return tuple(warp(1.0 - i / steps, shift) for i in range(steps))


def add_noise(x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """x_sigma.  ``sigma`` broadcasts against ``x0``."""
    return (1.0 - sigma) * x0 + sigma * eps


def velocity_of(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return eps - x0


def denoised(x: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """x0 from the network's velocity, computed in float64 and returned in ``x``'s dtype.

    At sigma near 1 the difference cancels; the released samplers take it in float64 too.
    """
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.double()
    return (x.double() - sigma * v.double()).to(x.dtype)
