"""Passes without gradient: an adapter of no effect is left out, one that is merged is in the map."""

from __future__ import annotations

import pytest
import torch
from tiny import draw, new_transformer

from kvpo.generators.causal_wan import CausalWan
from kvpo.planning.peak import flops
from kvpo.policy.policy import Policy, PolicyConfig


def new_policy(dtype: torch.dtype = torch.float32, **kwargs) -> Policy:
    return Policy(CausalWan(new_transformer().to(dtype)), PolicyConfig(rank=4, **kwargs), 0)


def velocity(policy: Policy) -> torch.Tensor:
    return policy.model.velocity(draw(1, 2, 4, 4, 4), 0.5, draw(1, 5, 16), [0, 1])


def update(policy: Policy, size: float, seed: int = 0) -> None:
    """Move every weight; an update whose sizes are drawn."""
    for i, p in enumerate(policy.parameters):
        p.data += size * draw(*p.shape, seed=seed + i)
    policy.updated()


def test_merged_weights_are_the_adapter_to_rounding():
    """Float32: 1e-5 of the largest velocity, where the adapter itself moves it by far more."""
    policy = new_policy(merge_rollouts=True)
    start = velocity(policy).detach()
    update(policy, 0.1)
    plain = velocity(policy).detach()
    with policy.rolling_out():
        merged = velocity(policy)
    scale = float(plain.abs().max())
    assert float((plain - start).abs().max()) > 0.05 * scale
    assert float((merged - plain).abs().max()) < 1e-5 * scale and not merged.requires_grad


def test_merged_weights_in_bfloat16_are_the_adapter_to_its_rounding():
    """2 % of the largest velocity: as far as bfloat16 and float32 lie apart at all."""
    policy, exact = new_policy(torch.bfloat16, merge_rollouts=True), new_policy()
    update(policy, 0.1), update(exact, 0.1)
    plain, truth = velocity(policy).detach(), velocity(exact).detach()
    with policy.rolling_out():
        merged = velocity(policy)
    scale = float(truth.abs().max())
    assert float((merged - plain).abs().max()) < 0.02 * scale
    assert float((merged - truth).abs().max()) < 0.02 * scale


def test_a_young_adapter_is_lost_when_merged_in_bfloat16():
    """Why it is off by default: changes of 1/1000 of the weights are rounded away, all of them,
    and what is rolled out is the start weights."""
    policy = new_policy(torch.bfloat16, merge_rollouts=True)
    layers = policy._rolling.adapters
    before = [w.clone() for w in layers.bases]
    for name, p in zip(policy.names, policy.parameters):
        if "lora_B" in name:
            p.data.fill_(1e-6)
    policy.updated()
    assert any(bool(p.any()) for p in policy.behaviour)
    merged = layers.merged(policy.behaviour)
    same = sum(int((a == b).sum()) for a, b in zip(before, merged))
    assert same / sum(w.numel() for w in before) > 0.99


def test_the_second_set_is_made_anew_after_an_update_and_only_then():
    policy = new_policy(merge_rollouts=True)
    for n in range(2):
        update(policy, 0.1, seed=100 * n)
        with policy.rolling_out():
            first = velocity(policy)
            address = [w.data_ptr() for w in policy._rolling.adapters.bases]
        with policy.rolling_out():
            assert address == [w.data_ptr() for w in policy._rolling.adapters.bases]
        torch.testing.assert_close(first, velocity(policy).detach(), atol=1e-5, rtol=1e-5)


def test_gradients_come_back_after_a_merged_pass():
    """The adapter is left out for the body alone: a pass after it trains as one before it."""
    policy = new_policy(merge_rollouts=True)
    update(policy, 0.1)

    def gradient() -> torch.Tensor:
        velocity(policy).square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in policy.parameters])
        for p in policy.parameters:
            p.grad = None
        return found

    before = gradient()
    with policy.rolling_out(), policy.using(policy.reference):
        velocity(policy)
    assert torch.equal(gradient(), before) and bool(before.any())


def test_the_reference_adapter_is_left_out_bit_for_bit():
    """B = 0 adds nothing; its products are not made."""
    policy = new_policy()
    start = velocity(policy).detach()
    with flops() as whole:
        velocity(policy)
    update(policy, 0.1)
    with policy.using(policy.reference), flops() as less:
        found = velocity(policy)
    assert torch.equal(found, start)
    tokens, text = 2 * 4, 5
    # ten maps a block, two of which read the text, in two blocks of rank 4
    adapter = 2 * 4 * (tokens * 6 * 48 + text * 2 * 48 + tokens * 2 * (24 + 32))
    assert whole.get_total_flops() - less.get_total_flops() == 2 * adapter
    with policy.using(policy.behaviour):
        assert not torch.equal(velocity(policy), start)


def test_a_set_that_was_zero_is_seen_to_have_changed():
    policy = new_policy()
    with policy.using(policy.behaviour):
        start = velocity(policy)
    update(policy, 0.1)
    with policy.using(policy.behaviour):
        assert torch.equal(velocity(policy), velocity(policy).detach())
        assert not torch.equal(velocity(policy), start)


def test_merging_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="policy.merge_rollouts merges an adapter"):
        PolicyConfig(train="full", merge_rollouts=True)
