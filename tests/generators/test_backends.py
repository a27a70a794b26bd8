"""Attention kernels by name: the same numbers, or one clear refusal."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from tiny import draw, new_transformer

from kvpo.commands.bench import Bench
from kvpo.config import RunConfig
from kvpo.generators.backends import BACKENDS, use_backend
from kvpo.generators.causal_wan import CausalWan


def velocity_and_gradient(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a block that reads two frames of past, on that backend."""
    model = CausalWan(new_transformer().requires_grad_(True))
    use_backend(model, name)
    cache, text = model.new_cache(8, 4, 4), draw(1, 5, 16)
    model.commit(draw(1, 2, 4, 4, 4, seed=1), text, [0, 1], cache)
    v = model.velocity(draw(1, 2, 4, 4, 4), 0.5, text, [2, 3], cache, (0, 1))
    v.square().mean().backward()
    return v.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_another_kernel_gives_the_same_numbers():
    """Float32 on a CPU: velocities to 1e-5, the gradient to 1e-4 of its length."""
    (v, grad), (other, of_other) = map(velocity_and_gradient, ("sdpa", "math"))
    torch.testing.assert_close(other, v, atol=1e-5, rtol=1e-5)
    assert float((of_other - grad).norm() / grad.norm()) < 1e-4


def test_the_kernel_is_the_one_that_was_named(monkeypatch):
    """Every attention of every block asks for it, and `sdpa` takes it back."""
    from kvpo.generators import attention

    asked, dispatch = [], attention.dispatch_attention_fn

    def watched(*args, backend=None, **kwargs):
        asked.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    velocity_and_gradient("math")
    assert set(asked) == {BACKENDS["math"]} and len(asked) == 2 * 2 * 2
    asked.clear()
    velocity_and_gradient("sdpa")
    assert set(asked) == {None}


@pytest.mark.parametrize("name", ["flash", "flash3"])
def test_a_kernel_that_is_not_here_is_refused(name):
    model = CausalWan(new_transformer())
    with pytest.raises(
        ValueError, match=f"attention = {name} can not be used on cpu .* choose sdp"
    ):
        use_backend(model, name)
    assert all(b.attn1.processor._attention_backend is None for b in model.transformer.blocks)


def test_the_names_are_the_same_everywhere():
    for kind in (RunConfig, Bench):
        assert get_args(get_type_hints(kind)["attention"]) == tuple(BACKENDS)
