"""Compiled blocks compute what the blocks compute, and are called as they are."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_align import settings
from tiny import RED, draw, embed, new_pipeline, story

from kvpo.common.progress import Progress
from kvpo.config import from_dict
from kvpo.generators import compiled
from kvpo.generators.compiled import compile_blocks
from kvpo.policy.policy import Policy
from kvpo.policy.settings import PolicyConfig
from kvpo.runs.parts import Parts


@pytest.fixture(autouse=True)
def clean():
    """No graphs of one test in the next one, and torch's own limits after it."""
    config = torch._dynamo.config
    kept = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    config.recompile_limit, config.accumulated_recompile_limit = kept
    torch._dynamo.reset()


def three_calls(backend: str | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A clean pass, a denoise pass of branches that read differently, and a replay with gradient.

    Returns velocities and pages, and the gradients of an adapter that does something.
    """
    pipeline = new_pipeline()
    model = pipeline.generator
    policy = Policy(model, PolicyConfig(rank=2), seed=0)
    with torch.no_grad():
        for i, p in enumerate(policy.parameters):
            p.copy_(0.2 * draw(*p.shape, seed=i))
    names = list(model.transformer.state_dict())
    if backend:
        compile_blocks(model, backend)
    text = embed(pipeline, story())[RED][None]
    cache, found = pipeline.new_cache(8), []
    for block in range(2):  # the second reads the first
        frames = [2 * block, 2 * block + 1]
        past = tuple(range(2 * block))
        found.append(model.commit(draw(1, 2, 4, 4, 4, seed=block), text, frames, cache, past))
    branches = cache.fork(2, 4)
    x, reads = draw(2, 2, 4, 4, 4, seed=5), [[0, 1, 2], [0, 2, 3]]
    with torch.no_grad():
        found.append(model.velocity(x, 0.5, text, [4, 5], branches, reads))
    v = model.velocity(x, 0.5, text, [4, 5], branches, reads)
    v.square().mean().backward()
    assert list(model.transformer.state_dict()) == names, "what a checkpoint calls them"
    pages = [page for layers in (cache.k, cache.v) for page in layers]
    return [*found, v.detach(), *pages], [p.grad for p in policy.parameters]


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference, relative to each tensor's largest number."""
    pairs = zip(a, b, strict=True)
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-6)) for x, y in pairs)


def test_graphs_of_the_blocks_compute_the_same():
    """By the compiler's front ends; what makes kernels of the graphs is left to the slow test."""
    plain, graphs = three_calls(None), three_calls("aot_eager")
    assert close(graphs[0], plain[0]) < 1e-5 and close(graphs[1], plain[1]) < 1e-4
    counts = torch._dynamo.utils.counters
    assert not counts["graph_break"], "every block is one graph"


def test_one_graph_serves_all_layers():
    """A layer's number in what a block is given would have made a graph a layer."""
    kinds: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _inputs):
        kinds.append(graph)
        return graph.forward

    pipeline = new_pipeline()
    for block in pipeline.generator.transformer.blocks:
        block.compile(backend=counting, fullgraph=True, dynamic=False)
    text = embed(pipeline, story())[RED][None]
    with torch.no_grad():
        for seed in range(2):
            pipeline.generator.velocity(draw(1, 2, 4, 4, 4, seed=seed), 0.5, text, [0, 1])
    assert len(pipeline.generator.transformer.blocks) == 2 and len(kinds) == 1


@pytest.mark.slow
def test_kernels_of_the_blocks_compute_the_same():
    plain, kernels = three_calls(None), three_calls("inductor")
    assert close(kernels[0], plain[0]) < 1e-4 and close(kernels[1], plain[1]) < 1e-3


def test_without_a_compiler_the_run_is_refused(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("no C++ compiler was found\nlong story")

    monkeypatch.setattr(compiled.torch, "compile", missing)
    with pytest.raises(ValueError, match=r"compile = true can not be used on cpu \(RuntimeError: no C\+\+ compiler was found\); install") as refusal:  # fmt: skip
        compile_blocks(new_pipeline().generator)
    assert "long story" not in str(refusal.value)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_setting_is_off_by_default_and_reaches_the_blocks(folder, monkeypatch, wanted):
    asked = []
    monkeypatch.setattr("kvpo.runs.parts.compile_blocks", asked.append)
    config = from_dict(settings(folder) | ({"compile": True} if wanted else {}))
    run = Parts(config, Progress())
    assert asked == ([run.pipeline.generator] if wanted else [])


def test_with_shards_it_is_refused(folder):
    with pytest.raises(ValueError, match="compile can not be paired with policy.shard"):
        from_dict(settings(folder, compile=True, policy={"train": "full", "shard": True}))


def test_a_deprecation_inside_the_compiler_is_no_reason_to_refuse(monkeypatch):
    """Where warnings are errors, the compiler's first import was taken for a missing compiler.

    It warns once a process, so the tests of this file failed alone and passed behind others.
    """

    def deprecated(function, **_):
        warnings.warn("`torch.jit.script_method` is deprecated", DeprecationWarning, stacklevel=1)
        return function

    monkeypatch.setattr(torch, "compile", deprecated)
    compiled._try(torch.device("cpu"), "inductor")
