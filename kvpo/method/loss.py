"""Stage 6: the objective, a pure function of G numbers (method.md section 5).

    pi(g) = softmax_g logit_g        r_g = pi_theta(g) / pi_old(g)
    L = -mean_g min(r_g A_g, clip(r_g, 1 - low, 1 + high) A_g) + beta KL(pi_theta || pi_ref)

Because L depends on the weights through G logits only, its cotangents dL / dlogit_g are all that
replay needs: branches are replayed with gradient a few at a time, each multiplied by its own
number, and freed; the gradient is exact. At theta = old, with logit = -E / tau and beta = 0, it is
the contrastive flow-matching objective

    dL / dtheta = 1 / (G tau) sum_g (A_g - G pi_g mean(A)) dE_g / dtheta
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvpo.common.late import Late

if TYPE_CHECKING:
    import torch
else:
    torch = Late("torch")

LOG_RATIO_MAX = 20.0
"""|log r| is clamped here, far outside every clip range, so that a broken replay gives a large loss and not inf."""


@dataclass(frozen=True)
class Loss:
    """The objective of one group."""

    value: float
    cotangent: torch.Tensor
    """dL / dlogit_G float64, detached, the group's weight included."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class ClippedObjective:
    """PPO's clipped objective over a group's branches, with a KL to the reference policy."""

    clip_low: float = 0.1
    """Distance below 1 to which a ratio r counts."""
    clip_high: float = 0.2
    """Distance above 1 to which it counts: r is clipped to [1 - clip_low, 1 + clip_high]."""
    kl_beta: float = 1.0
    """Strength of the KL to the reference policy, in advantage per nat; 0 = none.
    Without clipping, and for a uniform old policy, the optimum is pi_theta ~ pi_ref exp(A / beta):
    a branch one advantage better may end 1 / beta in log odds above where the reference put it.
    Automatic temperature gives logits of spread 1 and A has a spread of about 1 per component, so 1
    lets preferences move pi by about as much as branches differ already; 10 holds it to a tenth of
    that."""
    kl_to: Literal["initial", "old"] = "initial"
    """Reference policy of the KL: `initial` = the start weights, `old` = the behaviour weights.
    With `old` the KL acts only between syncs."""
    kl_watch: bool = True
    """Measure the KL to the start weights where ``kl_beta`` is 0 as well, for the log and the sentinel.
    It costs a replay of the start weights."""

    def __post_init__(self):
        if not (0.0 < self.clip_low < 1.0 and self.clip_high > 0.0):
            raise ValueError(
                f"clip_low = {self.clip_low} must lie in (0, 1) and clip_high = {self.clip_high} above 0; r is clipped to [1 - low, 1 + high]"
            )
        if self.kl_beta < 0.0:
            raise ValueError(
                f"kl_beta = {self.kl_beta} would reward drift from the reference; set 0 or more"
            )
        if not self.kl_beta < math.inf:
            raise ValueError(
                f"kl_beta = {self.kl_beta} is no strength of a penalty; set 0 (none) or a positive number"
            )

    @property
    def asks_reference(self) -> bool:
        """Whether the energies of branches under the start weights are asked for."""
        return self.kl_to == "initial" and (self.kl_beta > 0.0 or self.kl_watch)

    @property
    def watches_kl(self) -> bool:
        """Whether the KL that is logged is one to the start weights."""
        return self.asks_reference

    def __call__(
        self,
        theta_G: torch.Tensor,
        old_G: torch.Tensor,
        ref_G: torch.Tensor | None,
        A_G: torch.Tensor,
        weight: float = 1.0,
    ) -> Loss:
        """The group's loss from logits under the current, the behaviour and the reference weights.

        ``ref_G`` None: the behaviour policy is the reference. ``weight`` scales the whole loss, KL
        included (`kvpo.method.advantages.UnsafePolicy`). ValueError naming quantity and branch
        where an input is not finite.
        """
        ref_G = old_G if ref_G is None else ref_G
        inputs = {
            "logits of theta": theta_G,
            "logits of old": old_G,
            "logits of ref": ref_G,
            "advantages": A_G,
        }
        theta, old, ref, A = _checked(inputs)
        theta.requires_grad_(True)
        log_r = log_ratio(theta, old)
        policy = clipped_policy_loss(log_r, A, 1.0 - self.clip_low, 1.0 + self.clip_high)
        kl = discrete_kl(theta, ref)
        total = weight * (policy + self.kl_beta * kl)
        (cotangent,) = torch.autograd.grad(total, theta)
        return Loss(
            total.item(),
            cotangent,
            self._metrics(theta.detach(), log_r.detach(), policy.item(), kl.item(), weight),
        )

    def _metrics(self, theta, log_r, policy: float, kl: float, weight: float) -> dict[str, float]:
        ratio = log_r.exp()
        return {
            "loss/policy": policy,
            "loss/kl": kl,
            "loss/weight": weight,
            "loss/entropy": entropy(torch.log_softmax(theta, dim=0)).item(),
            "loss/clip_fraction": clip_fraction(ratio, 1.0 - self.clip_low, 1.0 + self.clip_high),
            "loss/ratio_min": ratio.min().item(),
            "loss/ratio_max": ratio.max().item(),
            "loss/ratio_mean": ratio.mean().item(),
            # Estimates KL(pi_old || pi_theta) without bias when branches are drawn from pi_old;
            # here a drift gauge.
            "loss/approx_kl": (ratio - 1.0 - log_r).mean().item(),
        }


def log_ratio(theta_G: torch.Tensor, old_G: torch.Tensor) -> torch.Tensor:
    """log pi_theta - log pi_old per branch, clamped to +- LOG_RATIO_MAX."""
    return (torch.log_softmax(theta_G, dim=0) - torch.log_softmax(old_G, dim=0)).clamp(
        -LOG_RATIO_MAX, LOG_RATIO_MAX
    )


def clipped_policy_loss(
    log_r_G: torch.Tensor, A_G: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """-mean_g min(r A, clip(r, low, high) A), a scalar; ``low`` and ``high`` bound the ratio itself."""
    r_G = log_r_G.exp()
    return -torch.minimum(r_G * A_G, r_G.clamp(low, high) * A_G).mean()


def discrete_kl(theta_G: torch.Tensor, ref_G: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """KL(pi_theta || pi_ref) in nats, from logits.

    ``eps`` is added inside log pi_theta, as in the reference code.
    """
    log_pi, log_ref = torch.log_softmax(theta_G, dim=0), torch.log_softmax(ref_G, dim=0)
    pi = log_pi.exp()
    return (pi * ((log_pi if eps == 0.0 else (pi + eps).log()) - log_ref)).sum()


def entropy(log_pi: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, from log pi.

    The largest is log G, a uniform policy, which no clip or KL can tell from another.
    """
    return -(log_pi.exp() * log_pi).sum()


def clip_fraction(ratio_G: torch.Tensor, low: float, high: float) -> float:
    """Share of branches whose ratio lies outside [low, high]."""
    return ((ratio_G < low) | (ratio_G > high)).double().mean().item()


def _checked(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Detached float64 copies of one common length G >= 2, all finite."""
    tensors = {
        name: torch.as_tensor(x).detach().to("cpu", torch.float64, copy=True)
        for name, x in inputs.items()
    }
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 1 or s[0] < 2 for s in shapes.values()):
        raise ValueError(
            f"the objective needs one number per branch, of 2 or more branches, but got {shapes}; give vectors of one length"
        )
    for name, x in tensors.items():
        bad = (~x.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name} not finite: "
                + ", ".join(f"branch {g} = {x[g].item()}" for g in bad)
                + "; leave this group out of the update"
            )
    return list(tensors.values())
