"""Replay against the released trainer's own scores and gradients (x0 energy, its floor, its `self`
context, context noise).

Facts of that code which the cases embody: the score is a sum over blocks and steps, without
temperature; only the first steps of a block carry gradient; text keys and values stay the old
policy's, so adapters on them have no effect.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden import case, read_tensors
from peft import LoraConfig
from test_golden_generator import geometry_of, model_of

from kvpo.convert.wan_names import original_to_diffusers
from kvpo.generators.flow import add_noise
from kvpo.method.energies import DenoisedEnergy
from kvpo.method.replay import Replay, SelfContext
from kvpo.policy.policy import ADAPTER_TARGETS
from kvpo.types import BranchPlan, Rollout, Script, Trajectory, Window


class NoisyContext:
    """The replaying weights' own prediction, with the noise that the trainer mixed in before its
    clean pass."""

    def __init__(self, noise, sigma):
        self.noise, self.sigma = noise, sigma  # [branch, block, 1, F, C, H, W]

    def clean(self, rollout, position, rows, last_step):
        own = SelfContext().clean(rollout, position, rows, last_step)
        return add_noise(own, self.noise[:, position, 0], self.sigma)


class LookedUpEnergy(DenoisedEnergy):
    """The trainer looks sigma up at the truncated time step; without the floor that matters."""

    looked_up: tuple = ()

    def step_weights(self, sigmas):
        true = torch.tensor(sigmas, dtype=torch.float64)
        near = torch.tensor(self.looked_up, dtype=torch.float64)
        return true.square() / (2.0 * near.clamp_min(self.floor).square())


def replay_of(config, tensors, which, floor, model):
    """The case as a Replay over our cache."""
    geometry, capacity = geometry_of(config)
    fork, P = config["fork_block"], config["blocks"]
    sigma = torch.tensor(geometry.sigmas).view(1, 1, -1, 1, 1, 1, 1)
    z, x0 = tensors["trajectory_inputs"][:, :, :, 0], tensors["trajectory_x0"][:, :, :, 0]
    velocities = ((z.double() - x0.double()) / sigma.double()).float()
    script = Script("golden", ("text",), (0,), fork + P)
    rollout = Rollout(
        script,
        Window(fork, P),
        (BranchPlan(),) * (config["branches"] + 1),
        Trajectory(z, velocities, x0[:, :, -1]),
        tensors["prefix_x0"][:, 0].flatten(0, 1),
        x0[:, :, -1].flatten(1, 2),
        prefix_cache(config, tensors, geometry, capacity),
    )
    surrogate = LookedUpEnergy(floor)
    object.__setattr__(surrogate, "looked_up", tuple(config["score_sigma_without_floor"]))
    pipeline = SimpleNamespace(generator=model, geometry=geometry)
    context = NoisyContext(tensors[f"context_noise_{which}"], config["context_sigma"])
    return Replay(pipeline, rollout, {"text": tensors["text"][0]}, context, surrogate)


def prefix_cache(config, tensors, geometry, capacity):
    """The past before the fork, written by the old weights."""
    old = model_of(config)
    cache = old.new_cache(
        capacity, geometry.latent_height, geometry.latent_width, sink=geometry.sink
    )
    for block, clean in enumerate(tensors["prefix_context_inputs"]):
        frames = list(range(block * geometry.block, (block + 1) * geometry.block))
        old.commit(
            clean, tensors["text"], frames, cache, geometry.history.past(frames[0], geometry.block)
        )
    return cache


def theta(config):
    """The weights with the released adapter, its effect on text keys and values taken out."""
    model, adapter = model_of(config), read_tensors(config["lora"].removesuffix(".safetensors"))
    model.transformer.add_adapter(
        LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=ADAPTER_TARGETS)
    )
    parameters = dict(model.transformer.named_parameters())
    for name, value in original_to_diffusers(adapter).items():
        name = name.replace(".lora_A.weight", ".lora_A.default.weight").replace(
            ".lora_B.weight", ".lora_B.default.weight"
        )
        silent = "attn2.to_k" in name or "attn2.to_v" in name
        parameters[name].data.copy_(
            torch.zeros_like(value) if silent and "lora_B" in name else value
        )
        parameters[name].requires_grad_(not silent)
    return model


def scores(replay):
    """S_G = -(P S) E_G."""
    return -replay.energies() * replay.rollout.window.blocks * len(replay.sigmas)


@pytest.mark.parametrize("expected, floor", [("scores_old", 1.0), ("scores_old_floor0", 0.0)])
def test_golden_replay_scores_of_the_old_policy(expected, floor):
    config, tensors = golden_replay()
    floor = config["sigma_floor"] if floor else 0.0
    replay = replay_of(config, tensors, "old", floor, model_of(config))
    torch.testing.assert_close(scores(replay), tensors[expected].double(), atol=1e-5, rtol=0)


def test_golden_replay_scores_of_theta():
    config, tensors = golden_replay()
    replay = replay_of(config, tensors, "theta", config["sigma_floor"], theta(config))
    torch.testing.assert_close(scores(replay), tensors["scores_theta"].double(), atol=1e-4, rtol=0)


def test_golden_replay_in_small_passes_is_the_same():
    config, tensors = golden_replay()
    replay = replay_of(config, tensors, "theta", config["sigma_floor"], theta(config))
    replay.members = replace(replay.members, rows_per_pass=5)
    replay.plan = [replay._parts(positions, replay.chunks[0]) for positions in replay._runs()]
    torch.testing.assert_close(scores(replay), tensors["scores_theta"].double(), atol=1e-4, rtol=0)


def backward(config, replay, branch):
    """d score of one branch, over the steps that the trainer differentiates."""
    terms, steps = replay.rollout.window.blocks * len(replay.sigmas), config["log_prob_grad_steps"]
    for (branch_R, share_R), rows in zip(
        replay.passes(), [rows for parts in replay.plan for rows in parts]
    ):
        counted = torch.tensor([r.step < steps for r in rows]) & (branch_R == branch)
        (-terms * share_R[counted].sum()).backward()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_golden_replay_gradients_of_the_adapter():
    config, tensors = golden_replay()
    model = theta(config)
    backward(config, replay_of(config, tensors, "theta", config["sigma_floor"], model), 0)
    gradients = {n: p.grad for n, p in model.transformer.named_parameters() if p.requires_grad}
    checked = 0
    for name, expected in tensors.items():
        if not name.startswith("grad.score0."):
            continue
        ((ours, _),) = original_to_diffusers({name.removeprefix("grad.score0."): expected}).items()
        ours = ours.replace(".lora_A.weight", ".lora_A.default.weight").replace(
            ".lora_B.weight", ".lora_B.default.weight"
        )
        if "attn2.to_k" in ours or "attn2.to_v" in ours:
            assert not expected.any() and ours not in gradients
            continue
        assert relative(gradients[ours], expected) < 1e-3, name
        checked += 1
    assert checked > 0


def test_golden_replay_gradients_of_the_base():
    config, tensors = golden_replay()
    model = model_of(config)
    model.transformer.requires_grad_(True)
    backward(config, replay_of(config, tensors, "old", config["sigma_floor"], model), 1)
    gradients = {n: p.grad for n, p in model.transformer.named_parameters()}
    for name, expected in tensors.items():
        if name.startswith("grad.old_score1."):
            original = name.removeprefix("grad.old_score1.").partition("[")[0]
            ((ours, _),) = original_to_diffusers({original: expected}).items()
            assert relative(gradients[ours][: len(expected)], expected) < 2e-3, name


def golden_replay():
    return case("replay_scores")
