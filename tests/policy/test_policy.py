"""One backbone, several sets of weights."""

from __future__ import annotations

import pytest
import torch
from tiny import draw, new_transformer

from kvpo.common.rng import normal
from kvpo.generators.causal_wan import CausalWan
from kvpo.policy.policy import Policy, PolicyConfig


def new_policy(seed: int = 0, **kwargs) -> Policy:
    return Policy(CausalWan(new_transformer()), PolicyConfig(**({"train": "full"} | kwargs)), seed)


def move(policy: Policy, by: float) -> None:
    for p in policy.parameters:
        p.data += by


def velocity(policy: Policy) -> torch.Tensor:
    return policy.model.velocity(draw(1, 2, 4, 4, 4), 0.5, draw(1, 5, 16), [0, 1])


def test_ema_warms_up():
    """Decay (1 + n) / (10 + n) after n updates: 2/11, 3/12, 4/13 ...; here every update adds 1
    to every weight."""
    policy = new_policy(ema=0.3)
    start, expected = policy.reference[0].clone(), 0.0
    for n, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3), start=1):
        move(policy, 1.0)
        policy.updated()
        expected = decay * expected + (1 - decay) * n
        torch.testing.assert_close(policy.average[0], start + expected, atol=1e-5, rtol=0)
    assert policy.updates == 4 and torch.equal(policy.reference[0], start)


def test_without_decay_the_average_is_the_current():
    policy = new_policy(ema=0.0)
    move(policy, 1.0)
    policy.updated()
    assert all(torch.equal(a, p) for a, p in zip(policy.average, policy.parameters))


def test_the_behaviour_follows_at_its_interval():
    policy, equal = new_policy(sync_interval=2), []
    assert policy.on_policy
    for _ in range(4):
        move(policy, 0.1)
        policy.updated()
        equal.append(
            (policy.on_policy, policy.lag, torch.equal(policy.behaviour[0], policy.parameters[0]))
        )
    assert equal == [(False, 1, False), (True, 0, True)] * 2


def test_using_swaps_without_a_copy_and_without_gradient():
    policy = new_policy()
    reference = velocity(policy).detach()
    move(policy, 0.05)
    current, addresses = velocity(policy).detach(), [p.data_ptr() for p in policy.parameters]
    with policy.using(policy.reference):
        inside = velocity(policy)
        assert [p.data_ptr() for p in policy.parameters] == [w.data_ptr() for w in policy.reference]
        assert not inside.requires_grad and torch.equal(inside, reference)
    assert addresses == [p.data_ptr() for p in policy.parameters]
    assert (
        velocity(policy).requires_grad
        and torch.equal(velocity(policy), current)
        and not torch.equal(current, reference)
    )


def test_using_restores_after_an_error():
    policy = new_policy()
    addresses = [p.data_ptr() for p in policy.parameters]
    with (
        pytest.raises(RuntimeError, match="inside"),
        policy.using(policy.average),
        policy.using(policy.reference),
    ):
        raise RuntimeError("inside")
    assert addresses == [p.data_ptr() for p in policy.parameters] and torch.is_grad_enabled()


def test_sets_do_not_share_memory():
    policy = new_policy()
    sets = (policy.parameters, policy.reference, policy.behaviour, policy.average)
    assert len({w.data_ptr() for s in sets for w in s}) == 4 * len(policy.parameters)


def test_lora_starts_without_effect_and_by_its_own_stream():
    state = torch.get_rng_state()
    a, b, other = (new_policy(seed, train="lora", rank=4) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is nobody's"
    assert all(torch.equal(x, y) for x, y in zip(a.parameters, b.parameters))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters, other.parameters))
    assert torch.equal(velocity(a), velocity(new_policy()))
    assert all((("lora_B" in n) == (not p.any())) for n, p in zip(a.names, a.parameters))


def test_lora_trains_its_adapter_only():
    policy = new_policy(train="lora", rank=4)
    assert len(policy.names) == 2 * 10 * 2 and all("lora_" in n for n in policy.names)
    # Ten maps a block: eight of attention 24 x 24, two of the feed-forward 24 x 32.
    assert policy.num_trainable == 2 * (8 * 4 * (24 + 24) + 2 * 4 * (24 + 32))
    assert [n for n, p in policy.model.transformer.named_parameters() if p.requires_grad] == list(
        policy.names
    )


def test_full_training_trains_everything():
    policy = new_policy()
    assert policy.num_trainable == sum(p.numel() for p in policy.model.transformer.parameters())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_master_weights_are_float32(train):
    """At lr 1e-5 a bf16 weight of size 1 can not move: its neighbours lie 2^-8 apart. The module
    goes on computing in its own dtype."""
    transformer = new_transformer()
    exact = {n: p.clone() for n, p in transformer.named_parameters()}
    policy = Policy(CausalWan(transformer.to(torch.bfloat16)), PolicyConfig(train=train, rank=2), 0)
    assert {
        p.dtype for p in (*policy.parameters, *policy.behaviour, *policy.average, *policy.reference)
    } == {torch.float32}
    computing = dict(policy.model.transformer.named_parameters())
    assert {computing[n].dtype for n in policy.names} == {
        torch.bfloat16
    } and policy.model.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        for _ in range(2):  # two passes: their gradients add up in float32
            velocity(policy).square().mean().backward()
        assert all(p.grad is None for p in computing.values())
        assert any(p.grad.any() for p in policy.parameters)
        optimizer.step()
        optimizer.zero_grad()
        policy.updated()
    moved = [
        float((p - r).detach().abs().max()) for p, r in zip(policy.parameters, policy.reference)
    ]
    assert max(moved) == pytest.approx(3e-5, rel=0.1)
    assert all(
        torch.equal(computing[n], p.bfloat16()) for n, p in zip(policy.names, policy.parameters)
    )
    if train == "full":
        assert all(
            torch.equal(p.bfloat16(), exact[n].bfloat16())
            for n, p in zip(policy.names, policy.reference)
        )


def test_sets_are_swapped_in_in_the_module_s_dtype():
    policy = Policy(CausalWan(new_transformer().to(torch.bfloat16)), PolicyConfig(train="full"), 0)
    start = velocity(policy).detach()
    for w in policy.average:
        w.add_(0.1)
    with policy.using(policy.average):
        assert policy.model.dtype == torch.bfloat16 and (velocity(policy) - start).abs().max() > 0.1
    assert torch.equal(velocity(policy).detach(), start)


def test_drift_by_hand():
    policy = new_policy()
    norm = sum(float(r.square().sum()) for r in policy.reference) ** 0.5
    assert policy.drift() == 0.0
    move(policy, 0.5)
    assert policy.drift() == pytest.approx(0.5 * policy.num_trainable**0.5 / norm, rel=1e-5)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no module that matches .*; set policy.train to full"):
        Policy(CausalWan(new_transformer(layers=0)), PolicyConfig(rank=2), 0)


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"sync_interval": 0}, {"ema": 1.0}, {"ema": -0.1}, {"ema": float("nan")}]
)
def test_bad_settings_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"policy.{name} = "):
        PolicyConfig(**bad)


def test_the_streams_name():
    """Nothing else may draw from the adapter's stream."""
    assert not torch.equal(normal((3,), 0, "lora"), normal((3,), 1, "lora"))
