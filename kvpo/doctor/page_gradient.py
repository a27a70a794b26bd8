"""Share of the gradient that the pages leave out.

It is the energies' gradient with and without what earlier blocks have written.

In training a pass reads pages that carry no gradient: theta reaches a block of the window through
its own pass, not through what the blocks before it left in the cache. Here the clean passes keep
their graph, so autograd goes through every page of the window, and what it finds is checked against
finite differences of the energies as they are. The prefix's pages stay as the rollout left them, as
in training. A window of one block reads no page of its own: there both gradients are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import WanTransformer3DModel

from kvpo.common.rng import normal
from kvpo.common.timing import Phases
from kvpo.config import RunConfig
from kvpo.generators.attention import LayerView, PagedSelfAttention, _project
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.rope import rotate
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.energies import Surrogate
from kvpo.method.replay import CONTEXTS, Context, Replay
from kvpo.method.rollout import roll_out
from kvpo.method.settings import RolloutConfig
from kvpo.types import Rollout, Script, Trajectory

DIRECTIONS, STEP = 4, 1e-6
"""Random directions of the finite differences, and how far they go along them."""


@dataclass(frozen=True)
class LeftOut:
    """The gradient of training against the one through the pages."""

    cosine: float
    relative: float
    """|training's - exact| / |exact|."""
    difference: float
    """Largest relative error of the exact one against finite differences, over directions.

    NaN where none were taken.
    """


class _PagesWithGradient(PagedSelfAttention):
    """Self-attention that writes the keys and values of a pass to its pages, graph and all."""

    def __call__(self, attn, hidden, encoder, mask, view: LayerView):
        out = super().__call__(attn, hidden, encoder, mask, replace(view, write=None))
        if view.write is not None:
            _, k, v = _project(attn, hidden.reshape(view.batch, -1, hidden.shape[-1]), None)
            k_pages, v_pages, row, slots = view.write
            for pages, x in ((k_pages, rotate(k, view.angles)), (v_pages, v)):
                pages[row, slots] = x.unflatten(1, (len(slots), -1)).to(pages.dtype)
        return out


class _Through(CausalWan):
    """The same weights; clean passes keep their graph."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__(transformer)
        for block in transformer.blocks:
            block.attn1.set_processor(_PagesWithGradient())

    commit = CausalWan.commit.__wrapped__


class _ReplayThrough(Replay):
    _commit = Replay._commit.__wrapped__


def left_out(
    pipeline: Pipeline,
    rollout: Rollout,
    embeddings: Mapping[str, torch.Tensor],
    context: Context,
    energy: Surrogate,
    parameters: Sequence[torch.nn.Parameter],
    seed: int,
    differences: bool = False,
) -> LeftOut:
    """Compare the gradients of a sum of the branches' energies with and without the pages.

    The energies' weights add up to 0, as an update takes them; only contexts that are known
    beforehand are allowed.
    """
    pull = normal((rollout.num_branches,), seed, "doctor", "pull").double()
    pull -= pull.mean()
    args = (rollout, embeddings, context, energy)
    ours = _gradient(Replay(pipeline, *args), pull, parameters)
    try:
        exact = _gradient(
            _ReplayThrough(
                replace(pipeline, generator=_Through(pipeline.generator.transformer)), *args
            ),
            pull,
            parameters,
        )
    finally:
        CausalWan(pipeline.generator.transformer)  # its own attention again
    worst = float("nan")
    if differences:
        worst = max(
            _error(
                Replay(pipeline, *args), pull, parameters, exact, (seed, "doctor", "direction", i)
            )
            for i in range(DIRECTIONS)
        )
    flat_ours, flat = (torch.cat([g.flatten().double() for g in grads]) for grads in (ours, exact))
    return LeftOut(
        float(flat_ours @ flat / (flat_ours.norm() * flat.norm())),
        float((flat_ours - flat).norm() / flat.norm()),
        worst,
    )


def _gradient(
    replay: Replay, pull_G: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> list[torch.Tensor]:
    value = sum(
        (pull_G[branch].to(share.device) * share).sum() for branch, share in replay.passes()
    )
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True))
    ]


@torch.no_grad()
def _error(
    replay: Replay,
    pull_G: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    exact: Sequence[torch.Tensor],
    name: tuple,
) -> float:
    """Relative error of the derivative along a random direction."""
    along = [normal(tuple(p.shape), *name, i).to(p) for i, p in enumerate(parameters)]
    values = []
    for way in (STEP, -2 * STEP):
        torch._foreach_add_(list(parameters), along, alpha=way)
        values.append(float(pull_G @ replay.energies()))
    torch._foreach_add_(list(parameters), along, alpha=STEP)
    numeric = (values[0] - values[1]) / (2 * STEP)
    analytic = float(sum((g * d).sum() for g, d in zip(exact, along)))
    return abs(numeric - analytic) / max(abs(numeric), abs(analytic))


# --- A generator of a few thousand weights, in float64 ---


def on_a_tiny_generator(config: RunConfig, pipeline: Pipeline) -> LeftOut:
    """Compare on random weights, with finite differences.

    The window, history and steps are the recipe's.
    """
    g = replace(
        pipeline.geometry, latent_height=4, latent_width=4, text_length=8, bank=0, bank_keep=0
    )
    explorer = config.kv_routing
    forks = explorer.eligible_forks(config.data.blocks, g)
    fork = forks[min(1, len(forks) - 1)]
    script = Script("doctor", ("a prompt",), (0,), fork + explorer.window_blocks)
    rolled = RolloutConfig(
        branches=3, cache_frames=max(config.rollout.cache_frames, g.resident(script.blocks))
    )
    with _in_double():
        transformer = _tiny(config.seed).double()
        tiny = replace(pipeline, generator=CausalWan(transformer), geometry=g)
        embeddings = {"a prompt": normal((8, 16), config.seed, "doctor", "text").double()}
        rollout = roll_out(
            tiny,
            SAMPLERS[config.sampler],
            explorer,
            rolled,
            script,
            embeddings,
            config.seed,
            ("doctor",),
            Phases(),
            fork,
        )
        # noise, and so all latents of the rollout, are float32: a pass gives what it is given
        t = rollout.trajectory
        assert t.inputs is not None and t.velocities is not None, "all of it was recorded"
        rollout = replace(
            rollout,
            trajectory=Trajectory(t.inputs.double(), t.velocities.double(), t.clean.double()),
            prefix=rollout.prefix.double(),
        )
        parameters = list(transformer.requires_grad_(True).parameters())
        return left_out(
            tiny,
            rollout,
            embeddings,
            known(config),
            config.energy,
            parameters,
            config.seed,
            differences=True,
        )


def known(config: RunConfig) -> Context:
    """The recipe's context, or `branch` where that is the policy's own prediction.

    No gradient is taken through that prediction in training either.
    """
    return CONTEXTS["branch" if config.context == "self" else config.context]


def _tiny(seed: int) -> WanTransformer3DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what diffusers draws by itself; what follows is from named streams
        net = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=1024,
        )
    for name, p in net.named_parameters():
        p.data += 0.15 * normal(tuple(p.shape), seed, "doctor", "tiny", name)
    return net.requires_grad_(False).eval()


@contextmanager
def _in_double() -> Iterator[None]:
    """Compute the stock network's norms in float64 while the body runs.

    It computes them in float32 whatever its dtype, and no finite difference is exact enough then.
    """
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = single
