"""The objective: hand-worked numbers, finite differences, clipping, and the contrastive
identity."""

from __future__ import annotations

import math

import pytest
import torch

from kvpo.common.rng import normal
from kvpo.method import loss
from kvpo.method.loss import ClippedObjective


def draw(*name, G: int = 6) -> torch.Tensor:
    return normal((G,), 0, *name).double()


def finite_differences(objective, theta, old, ref, A, weight=1.0, h=1e-6) -> torch.Tensor:
    """dL / dlogit_G by central differences."""

    def value(shift):
        return objective(theta + shift, old, ref, A, weight).value

    steps = torch.eye(len(theta), dtype=torch.float64) * h
    return torch.tensor([(value(e) - value(-e)) / (2 * h) for e in steps], dtype=torch.float64)


def test_two_branches_by_hand():
    """pi_theta = (.6, .4), pi_old = (.5, .5), A = (1, -1), clip [.9, 1.2]: r = (1.2, .8) ->
    terms 1.2 and -.9; L = -.15."""
    theta = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    found = ClippedObjective(0.1, 0.2, kl_beta=0.0)(
        theta, torch.zeros(2), None, torch.tensor([1.0, -1.0])
    )
    assert found.value == pytest.approx(-0.15)
    assert found.metrics["loss/ratio_max"] == pytest.approx(1.2) and found.metrics[
        "loss/ratio_min"
    ] == pytest.approx(0.8)


def test_kl_by_hand():
    theta = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.discrete_kl(theta, torch.zeros(2, dtype=torch.float64)).item() == pytest.approx(
        expected
    )
    found = ClippedObjective(kl_beta=10.0)(theta, theta, torch.zeros(2), torch.zeros(2))
    assert found.value == pytest.approx(10.0 * expected) and found.metrics[
        "loss/kl"
    ] == pytest.approx(expected)


def test_at_the_old_policy_every_ratio_is_one():
    theta = draw("theta")
    found = ClippedObjective()(theta, theta, None, draw("A"))
    assert found.value == pytest.approx(-draw("A").mean().item())
    assert (found.metrics["loss/ratio_min"], found.metrics["loss/ratio_max"]) == (1.0, 1.0)
    assert found.metrics["loss/kl"] == 0.0 and found.metrics["loss/clip_fraction"] == 0.0


@pytest.mark.parametrize("spread", (0.01, 0.3, 3.0))
@pytest.mark.parametrize("kl_beta", (0.0, 1.0, 10.0))
@pytest.mark.parametrize("weight", (1.0, 0.5))
def test_cotangents_against_finite_differences(spread, kl_beta, weight):
    old, A, ref = draw("old"), draw("A"), draw("ref")
    theta = old + spread * draw("move")
    objective = ClippedObjective(kl_beta=kl_beta)
    found = objective(theta, old, ref, A, weight).cotangent
    torch.testing.assert_close(
        found, finite_differences(objective, theta, old, ref, A, weight), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("tau", (0.1, 1.0, 4.0))
def test_contrastive_identity_at_the_old_policy(tau):
    """dL/dtheta = 1 / (G tau) sum_g (A_g - G pi_g mean(A)) dE_g/dtheta, for an energy of real
    parameters."""
    G, parameters = 6, torch.nn.Parameter(normal((4,), 0, "parameters").double())
    inputs, targets = normal((G, 5, 4), 0, "z").double(), normal((G, 5), 0, "u").double()

    def energy(p):
        return (torch.tanh(inputs @ p) - targets).square().mean(dim=1)

    A = draw("A", G=G)

    E_G = energy(parameters)
    logits = -E_G / tau
    cotangent = ClippedObjective(kl_beta=0.0)(logits, logits, None, A).cotangent
    (found,) = torch.autograd.grad(logits, parameters, grad_outputs=cotangent)

    pi = torch.softmax(logits.detach(), dim=0)
    jacobian = torch.autograd.functional.jacobian(energy, parameters.detach())
    expected = ((A - G * pi * A.mean())[:, None] * jacobian).sum(dim=0) / (G * tau)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_branches_may_be_replayed_one_at_a_time():
    """Each branch's gradient times its cotangent, summed, is the gradient of the whole loss:
    what lets replay free memory."""
    G = 5
    weights = torch.nn.Parameter(normal((3,), 0, "w").double())
    inputs = normal((G, 3), 0, "x").double()
    old = draw("old", G=G)
    A = draw("A", G=G)
    ref = draw("ref", G=G)

    def logit(g):
        return torch.sin(inputs[g] @ weights)

    together = torch.stack([logit(g) for g in range(G)])
    log_r = loss.log_ratio(together, old)
    whole = loss.clipped_policy_loss(log_r, A, 0.9, 1.2) + 2.0 * loss.discrete_kl(together, ref)
    (expected,) = torch.autograd.grad(whole, weights)

    cotangent = ClippedObjective(0.1, 0.2, kl_beta=2.0)(together, old, ref, A).cotangent
    for g in range(G):
        (cotangent[g] * logit(g)).backward()
    torch.testing.assert_close(weights.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_shift_of_the_logits_changes_nothing():
    theta, old, ref, A = draw("theta"), draw("old"), draw("ref"), draw("A")
    found, shifted = (ClippedObjective()(theta + shift, old, ref, A) for shift in (0.0, 7.0))
    assert shifted.value == pytest.approx(found.value)
    assert found.cotangent.sum().item() == pytest.approx(0.0, abs=1e-12)


def test_a_constant_advantage_has_no_gradient_under_a_uniform_policy():
    """Why the advantages are centred before they are clamped."""
    cotangent = ClippedObjective(kl_beta=0.0)(
        torch.zeros(4), torch.zeros(4), None, torch.full((4,), 3.0)
    ).cotangent
    torch.testing.assert_close(cotangent, torch.zeros(4, dtype=torch.float64), rtol=0.0, atol=1e-15)


@pytest.mark.parametrize(
    ("A", "direction", "learns"),
    [(1.0, 1.0, False), (1.0, -1.0, True), (-1.0, -1.0, False), (-1.0, 1.0, True)],
)
def test_clipping_stops_only_what_has_gone_far_enough(A, direction, learns):
    """A good branch that is already likelier, or a bad one already less likely, gets no further
    push; the way back stays open."""
    log_r = torch.tensor([direction * 0.5], dtype=torch.float64, requires_grad=True)
    loss.clipped_policy_loss(log_r, torch.tensor([A], dtype=torch.float64), 0.9, 1.2).backward()
    assert (log_r.grad.item() != 0.0) == learns


def test_gradient_descent_prefers_the_better_branches():
    theta, A = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, 0.5, -0.5, -1.0])
    cotangent = ClippedObjective()(theta, theta, None, A).cotangent
    assert (-cotangent).argsort(descending=True).tolist() == [0, 1, 2, 3]


def test_broken_replay_gives_a_large_loss_and_not_infinity():
    theta = torch.tensor([1e4, 0.0])
    found = ClippedObjective(kl_beta=0.0)(theta, -theta, None, torch.tensor([-1.0, 1.0]))
    assert math.isfinite(found.value) and found.metrics["loss/ratio_max"] == pytest.approx(
        math.exp(loss.LOG_RATIO_MAX)
    )


def test_no_reference_means_the_old_policy():
    theta, old, A = draw("theta"), draw("old"), draw("A")
    assert (
        ClippedObjective()(theta, old, None, A).value
        == ClippedObjective()(theta, old, old, A).value
    )


def test_weight_scales_everything_and_zero_drops_the_group():
    theta, old, ref, A = draw("theta"), draw("old"), draw("ref"), draw("A")
    whole, half, none = (
        ClippedObjective()(theta, old, ref, A, weight) for weight in (1.0, 0.5, 0.0)
    )
    assert half.value == pytest.approx(0.5 * whole.value)
    torch.testing.assert_close(half.cotangent, 0.5 * whole.cotangent)
    assert none.value == 0.0 and not none.cotangent.any()


def test_inputs_are_left_alone():
    """Live logits with a graph may be passed; the loss detaches and copies them."""
    theta = draw("theta").requires_grad_(True)
    found = ClippedObjective()(theta * 1.0, draw("old"), None, draw("A"))
    assert (
        theta.grad is None
        and not found.cotangent.requires_grad
        and found.cotangent.dtype == torch.float64
    )


def test_entropy_of_a_uniform_policy_is_log_g():
    assert loss.entropy(torch.log_softmax(torch.zeros(8), dim=0)).item() == pytest.approx(
        math.log(8)
    )


def test_metrics_are_plain_finite_numbers():
    metrics = ClippedObjective()(draw("theta"), draw("old"), draw("ref"), draw("A")).metrics
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "name", ("logits of theta", "logits of old", "logits of ref", "advantages")
)
def test_a_number_that_is_not_finite_is_named(name):
    inputs = {
        key: draw(key)
        for key in ("logits of theta", "logits of old", "logits of ref", "advantages")
    }
    inputs[name][2] = float("nan")
    with pytest.raises(ValueError, match=f"{name} not finite: branch 2 = nan"):
        ClippedObjective()(*inputs.values())


@pytest.mark.parametrize("shapes", [(3, 2), (1, 1)])
def test_one_number_per_branch_of_two_or_more(shapes):
    a, b = (torch.zeros(n) for n in shapes)
    with pytest.raises(ValueError, match="one number per branch, of 2 or more branches"):
        ClippedObjective()(a, b, None, a)


@pytest.mark.parametrize(
    "bad", [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0}, {"kl_beta": -1.0}]
)
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        ClippedObjective(**bad)
