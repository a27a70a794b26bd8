"""The public code's advantages and objective, kept only so that its published numbers can be
reproduced.

What is the same arithmetic as ours is ours, imported; the rest differs as follows (docs/method.md
gives the reasons why we do otherwise):

    advantages     std + 1e-8 instead of a floor; a second normalisation per signal; clamped without centring
    KL             log(pi + 1e-10)
    unsafe groups  mechanism_1 drops the loss, mechanism_2 weighs it with an "anchor logit" that is the constant 1/2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvpo.method import loss
from kvpo.method.advantages import anchor_advantage, weigh

STD_EPS = 1e-8
LOG_EPS = 1e-10

Fusion = Literal["none", "std", "zscore"]
Protect = Literal["none", "mechanism_1", "mechanism_2"]


def component_advantages(
    r_KB: torch.Tensor, w_K: torch.Tensor, of_weighted_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A_G in all, A_KG per component) of rewards r_KB whose last row is the anchor.

    ``of_weighted_sum``: one advantage of sum_k w_k r_k instead of the weighted sum of the
    components' advantages.
    """
    A_KG = torch.stack([anchor_advantage(r_B, STD_EPS) for r_B in r_KB])
    return (
        anchor_advantage(weigh(r_KB, w_K), STD_EPS) if of_weighted_sum else weigh(A_KG, w_K)
    ), A_KG


def fuse(
    local_G: torch.Tensor | None,
    global_G: torch.Tensor | None,
    mode: Fusion,
    local: float,
    global_: float,
) -> torch.Tensor:
    """A_G float32 = local norm(A_local) + global_ norm(A_global); a signal that is None does not
    count."""
    signals = [
        (A_G, weight) for A_G, weight in ((local_G, local), (global_G, global_)) if A_G is not None
    ]
    if not signals:
        raise ValueError(
            "neither a local nor a global advantage to fuse; give at least one of them"
        )
    return sum(weight * _normalised(A_G.float(), mode) for A_G, weight in signals)


def _normalised(A_G: torch.Tensor, mode: Fusion) -> torch.Tensor:
    """`std`: A / std over branches (biased); `zscore`: centred before; the division is left out
    where std is nothing."""
    if mode not in ("none", "std", "zscore"):
        raise ValueError(f"fusion mode {mode!r} is unknown; choose none, std or zscore")
    std = A_G.std(unbiased=False)
    if mode == "zscore":
        A_G = A_G - A_G.mean()
    return A_G / (std + STD_EPS) if mode != "none" and std > STD_EPS else A_G


def clamped(A_G: torch.Tensor, bound: float) -> torch.Tensor:
    """A within +-bound, not centred; a bound of 0 or less means none."""
    return A_G.clamp(-bound, bound) if bound > 0.0 else A_G


def branch_log_pi(scores_G: torch.Tensor) -> torch.Tensor:
    """log pi_G = log softmax of the branches' scores."""
    return torch.log_softmax(scores_G, dim=0)


def discrete_kl(theta_G: torch.Tensor, ref_G: torch.Tensor) -> torch.Tensor:
    return loss.discrete_kl(theta_G, ref_G, eps=LOG_EPS)


@dataclass(frozen=True)
class Protection:
    """How much of an unsafe group's loss counts."""

    scale: float
    entropy: float | None = None
    """Of the branches' part of the policy that has the anchor as another choice, nats."""
    pi_anchor: float | None = None


def mechanism_2(log_pi_G: torch.Tensor, safe: bool) -> Protection:
    """The anchor joins the softmax with logit 0, or -inf if safe.

    sum exp log_pi is 1 already, so its share is 1/2 (or 0) whatever the scores.
    """
    anchor = log_pi_G.new_tensor([-torch.inf if safe else 0.0])
    pi = torch.softmax(torch.cat([log_pi_G.detach(), anchor]), dim=0)
    pi_G, pi_anchor = pi[:-1], pi[-1].item()
    return Protection(1.0 - pi_anchor, -(pi_G * (pi_G + LOG_EPS).log()).sum().item(), pi_anchor)


def protection(log_pi_G: torch.Tensor, kind: Protect, safe: bool) -> Protection:
    if kind == "mechanism_2":
        return mechanism_2(log_pi_G, safe)
    if kind not in ("none", "mechanism_1"):
        raise ValueError(f"protection {kind!r} is unknown; choose none, mechanism_1 or mechanism_2")
    return Protection(0.0 if kind == "mechanism_1" and not safe else 1.0)


@dataclass(frozen=True)
class Objective:
    """The objective of one group, and what it is made of."""

    total: float
    gradient: torch.Tensor
    """dL / dscore_G under theta."""
    policy: float
    kl: float
    """The two addends of ``total``: coefficient and protection included."""
    log_ratio: torch.Tensor
    """log r_G."""
    clip_fraction: float
    protection: Protection


def objective(
    theta_G: torch.Tensor,
    old_G: torch.Tensor,
    ref_G: torch.Tensor,
    A_G: torch.Tensor,
    low: float,
    high: float,
    kl_coef: float,
    protect: Protect,
    safe: bool,
) -> Objective:
    """scale (-mean_g min(r A, clip(r, low, high) A) + kl_coef KL(pi_theta || pi_ref)); ``low``,
    ``high`` bound r itself."""
    theta_G = theta_G.detach().clone().requires_grad_(True)
    shield = protection(branch_log_pi(theta_G), protect, safe)
    log_r = loss.log_ratio(theta_G, old_G)
    policy = shield.scale * loss.clipped_policy_loss(log_r, A_G, low, high)
    kl = shield.scale * kl_coef * discrete_kl(theta_G, ref_G)
    (gradient,) = torch.autograd.grad(policy + kl, theta_G)
    # A loss that mechanism_1 dropped reports no clipping, whatever its ratios.
    clip = loss.clip_fraction(log_r.detach().exp(), low, high) if shield.scale > 0.0 else 0.0
    return Objective(
        (policy + kl).item(), gradient, policy.item(), kl.item(), log_r.detach(), clip, shield
    )
