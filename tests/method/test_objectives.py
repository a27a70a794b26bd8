"""Objectives: by hand, against finite differences and against each other where limits coincide, and
what they refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_config import refused
from test_update import Run, advantages, differ
from tiny import draw, embed, new_pipeline, new_rollout, story

from kvpo.common.timing import Phases
from kvpo.config import differences, from_dict, to_dict
from kvpo.method.advantages import UnsafePolicy
from kvpo.method.best_of import BestOf
from kvpo.method.energies import Temperature, VelocityEnergy
from kvpo.method.explorers import RenoiseExplorer, StartNoise
from kvpo.method.objectives.denoised_distance import DenoisedDistance, Distances
from kvpo.method.objectives.forward_process import noise_levels, noised
from kvpo.method.objectives.kernel_grpo import KernelGrpo
from kvpo.method.objectives.kinds import OBJECTIVES
from kvpo.method.objectives.nft import Nft
from kvpo.method.objectives.regression import Regression
from kvpo.method.objectives.rvm import Rvm
from kvpo.method.objectives.sde_grpo import SdeGrpo
from kvpo.method.objectives.step_policy import Transitions, clipped
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.routing import KVRouting
from kvpo.method.sde_explorer import SdeExplorer
from kvpo.method.update import OptimizerConfig, Updater
from kvpo.policy.policy import Policy, PolicyConfig
from kvpo.types import Trajectory

PAIRS = [
    (Regression(temperature=0.5), KVRouting(window_blocks=1)),
    (Nft(beta=0.7, levels=3), StartNoise(window_blocks=1)),
    (Rvm(scale=0.3), KVRouting(window_blocks=1)),
    (KernelGrpo(), RenoiseExplorer(1)),
    (SdeGrpo(), SdeExplorer(steps=2)),
    (DenoisedDistance(kl_beta=0.0), StartNoise(window_blocks=1)),
    (KernelGrpo(), BestOf(1)),
]
IDS = [f"{objective.kind}-{type(explorer).__name__}" for objective, explorer in PAIRS]
A = advantages(1.0, -0.4, -0.6)


class Exact:
    """One group of a tiny generator in float64, whose window is one block: pages hold nothing back."""

    def __init__(self, objective, explorer, policy=PolicyConfig(train="full"), lr=1e-3):
        self.pipeline = new_pipeline()
        self.policy = Policy(self.pipeline.generator, policy, 0)
        self.pipeline.generator.double()
        for name in ("reference", "behaviour", "average"):
            setattr(self.policy, name, self.policy.snapshot())
        sampler = "ode" if isinstance(explorer, SdeExplorer) else "renoise"
        fork = 0 if explorer.independent else 4
        rollout = new_rollout(self.pipeline, story(6), explorer, fork=fork, sampler=sampler)
        t = rollout.trajectory
        kept = Trajectory(t.inputs.double(), t.velocities.double(), t.clean.double())
        self.rollout = replace(rollout, trajectory=kept, prefix=rollout.prefix.double())
        assert all(p.dtype == torch.float64 for p in self.policy.parameters)
        optimizer = OptimizerConfig(clip=1e9, lr=lr, warmup=1)
        self.updater = Updater(
            self.policy, optimizer, objective, Temperature(0.02), UnsafePolicy(), groups=1
        )

    @property
    def replay(self) -> Replay:
        texts = {k: v.double() for k, v in embed(self.pipeline, self.rollout.script).items()}
        return Replay(self.pipeline, self.rollout, texts, CONTEXTS["branch"], VelocityEnergy())

    @property
    def transitions(self) -> Transitions:
        replay = self.replay
        sigmas = self.pipeline.geometry.sigmas
        return Transitions(replay, self.updater.objective.steps(self.rollout, sigmas))

    def accumulate(self, A=A, before=None):
        return self.updater.accumulate(self.replay, A, Phases(), before)

    def gradient(self) -> torch.Tensor:
        taken = torch.cat([p.grad.flatten() for p in self.policy.parameters])
        self.updater.optimizer.zero_grad(set_to_none=True)
        return taken

    def loss(self, A=A) -> float:
        found = self.updater.accumulate(self.replay, A, Phases()).metrics["loss/policy"]
        self.updater.optimizer.zero_grad(set_to_none=True)
        return found


@pytest.mark.parametrize(("objective", "explorer"), PAIRS, ids=IDS)
def test_the_gradient_is_that_of_finite_differences(objective, explorer):
    """Away from theta = old: the behaviour weights are half way back to the start.

    The stock norms compute in float32, which a smaller difference would only see."""
    run = Exact(objective, explorer, PolicyConfig(train="full", behaviour_decay=0.5))
    run.accumulate()
    run.updater.step()
    run.accumulate()
    gradient, flat = run.gradient(), run.policy.parameters
    along = [draw(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(flat)]
    values = []
    for way in (3e-5, -6e-5):
        torch._foreach_add_([p.data for p in flat], along, alpha=way)
        values.append(run.loss())
    numeric = (values[0] - values[1]) / 6e-5
    analytic = float(gradient @ torch.cat([d.flatten() for d in along]))
    assert analytic == pytest.approx(numeric, rel=5e-3) and abs(numeric) > 1e-3


@pytest.mark.parametrize(("objective", "explorer"), PAIRS, ids=IDS)
def test_bad_advantages_and_latents_leave_everything_as_it_was(objective, explorer):
    run = Exact(objective, explorer)
    before = run.policy.snapshot()
    with pytest.raises(ValueError, match="advantages not finite: branch 1 = nan"):
        run.accumulate(advantages(0.5, float("nan"), 0.5))
    t = run.rollout.trajectory
    broken = [x.clone() for x in (t.inputs, t.velocities, t.clean)]
    for x in broken:
        x.view(len(x), -1)[2, 5] = float("inf")
    run.rollout = replace(run.rollout, trajectory=Trajectory(*broken))
    with pytest.raises(ValueError, match=r"branches \[2\] are (not finite|broken)"):
        run.accumulate()
    assert all(torch.equal(p, q) for p, q in zip(run.policy.parameters, before))
    assert all(p.grad is None for p in run.policy.parameters)


@pytest.mark.parametrize(("objective", "explorer"), PAIRS, ids=IDS)
def test_the_size_of_a_pass_changes_nothing(objective, explorer):
    found = []
    for size in (0, 2):
        run = Exact(objective, explorer)
        replay = Replay(
            run.pipeline,
            run.rollout,
            run.replay.embeddings,
            CONTEXTS["branch"],
            VelocityEnergy(),
            rows_per_pass=size,
        )
        run.updater.accumulate(replay, A, Phases())
        found.append(run.gradient())
    assert differ(found[0], found[1]) < 1e-6 and found[0].norm() > 1e-6


# --- Regression ---


def test_the_weights_of_regression_by_hand():
    """A of log 2, 0 and -log 2 at temperature 1: 4/7, 2/7 and 1/7; without rewards, none."""
    log2 = 0.6931471805599453
    A = advantages(log2, 0.0, -log2)
    assert Regression().weights(A).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    lost = replace(A, valid=torch.tensor([True, True, False]))
    assert Regression().weights(lost).tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert Regression(temperature=1e-3).weights(A).tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_regression_draws_the_policy_to_the_best_branch():
    run = Run(objective=Regression(temperature=0.1), optimizer=OptimizerConfig(lr=1e-5, warmup=1))
    first = run.replay().energies()
    update = run.accumulate()
    torch.testing.assert_close(update.energy, first, rtol=1e-6, atol=0)
    run.updater.step()
    assert run.replay().energies()[0] < first[0]


# --- The forward process ---


def test_noised_latents_by_hand():
    """z = (1 - sigma) x0 + sigma eps and target = eps - x0 with one eps for all branches."""
    run = Exact(Nft(), KVRouting(window_blocks=1))
    forward, target = noised(run.replay, 0)
    clean = run.rollout.trajectory.clean[:, :, None]
    assert tuple(forward.sigmas) == pytest.approx(run.pipeline.geometry.sigmas)
    for s, sigma in enumerate(forward.sigmas):
        eps = target[:, :, s] + clean[:, :, 0]
        torch.testing.assert_close(eps, eps[:1].expand_as(eps), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            forward.inputs[:, :, s], (1 - sigma) * clean[:, :, 0] + sigma * eps
        )


def test_drawn_noise_levels_cover_their_range():
    run = Exact(Nft(), KVRouting(window_blocks=1))
    levels = noise_levels(run.replay, 4)
    assert [int((1 - s) * 4) for s in levels] == [0, 1, 2, 3] and all(0 < s <= 1 for s in levels)
    assert levels == noise_levels(run.replay, 4)


def test_nft_by_hand():
    """beta 1/2, A = range / 2, so r = 3/4: old 0, v 2, target 1 gives v+ = 1 and v- = -1, and
    3/4 * 0 + 1/4 * 4 = 1."""
    v, target, old = (torch.full((1, 1, 1, 1, 1), x, dtype=torch.float64) for x in (2.0, 1.0, 0.0))
    half = torch.tensor([2.5], dtype=torch.float64)
    assert Nft(beta=0.5).row_losses(v, target, old, half).item() == pytest.approx(1.0)
    assert Nft(beta=0.5).row_losses(v, target, old, 2 * half).item() == pytest.approx(0.0)
    assert Nft(beta=0.5).row_losses(v, target, old, 9 * half).item() == pytest.approx(0.0)


def test_rvm_by_hand():
    """c = 1/2: half the squared distance to the target, 1, and half that to the old policy, 4."""
    v, target, old = (torch.full((1, 1, 1, 1, 1), x, dtype=torch.float64) for x in (2.0, 1.0, 0.0))
    A_R = torch.tensor([5.0], dtype=torch.float64)
    assert Rvm().row_losses(v, target, old, A_R).item() == pytest.approx(0.5 * 1.0 + 0.5 * 4.0)
    assert Rvm(limit=0.25).row_losses(v, target, old, -A_R).item() == pytest.approx(
        -0.25 * 1.0 + 1.25 * 4.0
    )


def test_nft_is_rvm_with_coefficients_over_beta():
    """Its gradient is beta^2 times that of RVM with c = s / beta, off policy too."""
    beta, gradients = 2.0, []
    for objective in (Nft(beta=beta), Rvm(scale=1 / (5.0 * beta))):
        run = Exact(
            objective, StartNoise(window_blocks=1), PolicyConfig(train="full", behaviour_decay=0.5)
        )
        with torch.no_grad():
            for i, p in enumerate(run.policy.parameters):
                p += 0.01 * draw(*p.shape, seed=i, dtype=torch.float64)
        run.policy.updates = 1  # so the behaviour weights are others
        run.accumulate()
        gradients.append(run.gradient())
    assert differ(gradients[0], beta**2 * gradients[1]) < 1e-9 and gradients[0].norm() > 1e-6


def test_without_advantages_nft_holds_to_the_old_policy():
    """A of 0 leaves beta^2 |v - v_old|^2, of gradient 0 where they are the same."""
    run = Exact(Nft(), StartNoise(window_blocks=1))
    run.accumulate(advantages(0.0, 0.0, 0.0))
    assert run.gradient().norm() < 1e-12


def test_nft_prefers_the_branch_of_the_higher_reward():
    run = Exact(Nft(), StartNoise(window_blocks=1))
    first = run.accumulate().energy
    run.updater.step()
    second = run.accumulate().energy
    assert (second - first)[0] < (second - first)[1:].min()


# --- The kernel ---


def test_log_probabilities_by_hand():
    """x' is the mean and sigma' eps, so log p of the weights that drew it is -mean eps^2 / 2."""
    run = Exact(KernelGrpo(), RenoiseExplorer(1))
    kernel, t = run.transitions, run.rollout.trajectory
    assert list(kernel.steps) == [1, 2]
    (rows, v) = next(kernel.replay.velocities())
    torch.testing.assert_close(v.detach(), kernel.recorded(rows), rtol=1e-4, atol=1e-4)
    sigma, after = run.pipeline.geometry.sigmas[1:3]
    for row, log_p in zip(rows, kernel.log_p(rows, kernel.recorded(rows))):
        if row.step == 1:
            x = t.inputs[row.branch, 0, 1]
            u = t.velocities[row.branch, 0, 1]
            result = t.inputs[row.branch, 0, 2]
            eps = (result - (1 - after) * (x - sigma * u)) / after
            assert 0.5 < eps.std() < 1.5
            assert float(log_p) == pytest.approx(-float(eps.square().mean()) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "explorer", "steps"),
    [(KernelGrpo(), RenoiseExplorer(0), 3), (SdeGrpo(), SdeExplorer(from_step=1), 2)],
)
def test_at_the_old_weights_it_is_reinforce(objective, explorer, steps):
    """-mean_{g,b,s} A_g d log p, by autograd of the log probabilities themselves."""
    run = Exact(objective, explorer)
    moves = run.transitions
    total = 0.0
    for rows, v in moves.replay.velocities():
        A_R = A.values[[r.branch for r in rows]]
        total = total - (A_R * moves.log_p(rows, v)).sum() / (3 * steps)
    total.backward()
    expected = run.gradient()
    metrics = run.accumulate().metrics
    assert metrics["loss/ratio_min"] == metrics["loss/ratio_max"] == 1.0
    assert differ(run.gradient(), expected) < 1e-9 and expected.norm() > 1e-6


def test_the_clip_acts_on_every_step_by_itself():
    """r of 1.5, 0.5 and 1 with A of 1, -1 and 2 at clip 0.2: 1.2, -0.8 and 2, negated."""
    log_r = torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64).log()
    A_R = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    assert clipped(log_r, A_R, 0.2).tolist() == pytest.approx([-1.2, 0.8, -2.0])


def test_branches_of_renoise_share_what_comes_before_their_step():
    pipeline = new_pipeline()
    rollout = new_rollout(pipeline, story(6), RenoiseExplorer(1, window_blocks=2), fork=3)
    z = rollout.trajectory.inputs
    for s in (0, 1):
        torch.testing.assert_close(z[:, 0, s], z[:1, 0, s].expand_as(z[:, 0, s]))
    late = z[:, 0, 2].flatten(1)
    assert all(differ(late[a], late[b]) > 0.1 for a in range(4) for b in range(a))
    plain = new_rollout(pipeline, story(6), StartNoise(window_blocks=2), fork=3)
    torch.testing.assert_close(rollout.latents[-1], plain.latents[-1])


def test_a_step_without_noise_behind_it_is_refused():
    with pytest.raises(ValueError, match="last one with noise behind it is 2; set 2 or less"):
        new_rollout(new_pipeline(), story(6), RenoiseExplorer(3), fork=3)


# --- Distances ---


def test_distances_by_hand():
    """At the weights that rolled out, the anchor's own denoised latents are what is predicted."""
    run = Exact(DenoisedDistance(), StartNoise(window_blocks=1))
    t, sigma = run.rollout.trajectory, torch.tensor(run.pipeline.geometry.sigmas).double()
    x0 = t.inputs - sigma.view(-1, 1, 1, 1, 1) * t.velocities
    expected = (x0[:-1] - x0[-1:]).square().flatten(1).mean(dim=1)
    found = Distances(run.replay)
    torch.testing.assert_close(found.energies(), expected, rtol=1e-4, atol=1e-7)
    assert len(found.anchor.rows) == 1, "one replay, whatever the number of branches"


def test_the_anchor_moves_towards_the_better_branch():
    run = Exact(DenoisedDistance(), StartNoise(window_blocks=1))
    before = Distances(run.replay).energies()
    run.accumulate()
    run.updater.step()
    moved = Distances(run.replay).energies() - before
    assert moved[0] < moved[1:].min()


# --- Stochastic steps of the ode sampler ---


def test_rows_of_an_sde_by_hand():
    """x' of the recorded inputs and velocities: Euler's in the anchor, and at steps that are not
    chosen; elsewhere the shifted mean and noise of each branch's own, of deviation a at s = 1."""
    run = Exact(SdeGrpo(), SdeExplorer(noise_level=0.4, steps=2))
    t, sigmas = run.rollout.trajectory, run.pipeline.geometry.sigmas
    z, u = t.inputs[:, 0], t.velocities[:, 0]
    for i, (s, after) in enumerate(itertools.pairwise(sigmas)):
        euler = z[:, i] + (after - s) * u[:, i]
        exact = slice(None) if i == 2 else slice(-1, None)
        torch.testing.assert_close(z[exact, i + 1], euler[exact], rtol=1e-5, atol=1e-5)
        if i < 2:
            std = 0.4 if i == 0 else 0.4 * (s / (1 - s) * (s - after)) ** 0.5
            mean = euler - std**2 / (2 * s) * (z[:, i] + (1 - s) * u[:, i])
            eps = (z[:-1, i + 1] - mean[:-1]) / std
            assert 0.5 < eps.std() < 1.5
            assert all(differ(eps[a], eps[b]) > 0.1 for a in range(3) for b in range(a))
    plain = new_rollout(run.pipeline, story(6), StartNoise(window_blocks=1), fork=4, sampler="ode")
    torch.testing.assert_close(run.rollout.latents[-1].double(), plain.latents[-1].double())


def test_log_probabilities_of_an_sde_by_hand():
    """x' is the mean and std eps, so log p of the weights that drew it is -mean eps^2 / 2."""
    run = Exact(SdeGrpo(), SdeExplorer(from_step=1, steps=1))
    moves, t, sigmas = run.transitions, run.rollout.trajectory, run.pipeline.geometry.sigmas
    assert list(moves.steps) == [1] and moves.terms == 1
    (rows, _v) = next(moves.replay.velocities())
    s, after = sigmas[1:3]
    std = 0.3 * (s / (1 - s) * (s - after)) ** 0.5
    for row, log_p in zip(rows, moves.log_p(rows, moves.recorded(rows))):
        x, u = t.inputs[row.branch, 0, 1], t.velocities[row.branch, 0, 1]
        drift = u + std**2 / (s - after) / (2 * s) * (x + (1 - s) * u)
        eps = (t.inputs[row.branch, 0, 2] - x - drift * (after - s)) / std
        assert float(log_p) == pytest.approx(-float(eps.square().mean()) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("explorer", "reason"),
    [
        (SdeExplorer(from_step=3), "the last one that may be stochastic is 2; lower them"),
        (SdeExplorer(from_step=1, steps=3), "the last one that may be stochastic is 2; lower them"),
        (SdeExplorer(noise_level=0.7), "in denoise step 2.*set less than 0.612"),
    ],
)
def test_stochastic_steps_that_do_not_fit_are_refused(explorer, reason):
    with pytest.raises(ValueError, match=reason):
        new_rollout(new_pipeline(), story(6), explorer, fork=3, sampler="ode")


def test_stochastic_steps_are_those_of_the_ode_sampler():
    with pytest.raises(ValueError, match="the sampler is renoise; use sampler ode"):
        new_rollout(new_pipeline(), story(6), SdeExplorer(), fork=3)


# --- What is recorded, and which pairs there are ---


def pair_of(kind: str) -> dict:
    """The recipe of an objective with an explorer that it can be paired with."""
    explorer = {"kernel_grpo": "renoise", "sde_grpo": "sde"}.get(kind, "kv_routing")
    sampler = "ode" if kind == "sde_grpo" else "renoise"
    return {"objective": {"kind": kind}, "explorer": explorer, "sampler": sampler}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_nothing_is_recorded_that_is_not_needed(kind):
    config = from_dict(pair_of(kind))
    assert config.recorded == OBJECTIVES[kind].needs
    from kvpo.generators.sampler import SAMPLERS
    from kvpo.method.rollout import roll_out
    from kvpo.method.settings import RolloutConfig

    pipeline, script = new_pipeline(), story(6)
    t = roll_out(
        pipeline,
        SAMPLERS[config.sampler],
        replace(config.exploring, window_blocks=1),
        RolloutConfig(branches=2),
        script,
        embed(pipeline, script),
        0,
        ("group",),
        Phases(),
        fork=4,
        needs=config.recorded,
    ).trajectory
    assert (t.inputs is not None) == ("inputs" in config.recorded)
    assert (t.velocities is not None) == ("velocities" in config.recorded)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"objective": {"kind": "tve_ppo"}, "explorer": "start_noise"}, "identically 0"),
        ({"objective": {"kind": "regression"}, "explorer": "renoise"}, "identically 0"),
        ({"objective": {"kind": "kernel_grpo"}}, "share the noise behind every step"),
        ({"objective": {"kind": "kernel_grpo"}, "sampler": "ode"}, "draws no noise"),
        ({"explorer": "renoise", "sampler": "ode"}, "every branch would be the anchor"),
        ({"explorer": "sde"}, "draws noise behind its steps already"),
        ({"explorer": "sde", "sampler": "ode"}, "identically 0"),
        ({"objective": {"kind": "sde_grpo"}}, "renoise has another kernel"),
        ({"objective": {"kind": "sde_grpo"}, "sampler": "ode"}, "take no stochastic steps"),
        ({"explorer": "best_of"}, "identically 0"),
        ({"objective": {"kind": "denoised_distance"}, "explorer": "best_of"}, "other pasts than"),
        ({"explorer": "best_of", "best_of": {"window_blocks": -1}}, "0 for the whole video"),
        ({"explorer": "sde", "sde": {"noise_level": 0}}, "noise_level = 0.0 must be positive"),
        ({"explorer": "sde", "sde": {"steps": -1}}, "steps = -1 a number of them"),
        ({"objective": {"kind": "rvm"}, "context": "self"}, "use branch or anchor"),
        ({"objective": {"kind": "nftt"}}, "did you mean nft?"),
        ({"objective": {"kind": "other"}}, "choose one of tve_ppo, regression"),
        ({"objective": {"kind": "nft", "clip": 1}}, "unknown key objective.clip"),
        ({"objective": {"kind": "nft", "beta": 0}}, "must be positive"),
        ({"objective": {"kind": "nft", "levels": -1}}, "objective.levels = -1"),
        ({"objective": {"kind": "rvm", "limit": 2}}, "lie in (0, 1]"),
        ({"objective": {"kind": "kernel_grpo", "clip": 1.0}}, "must lie in (0, 1)"),
        ({"objective": {"kind": "regression", "temperature": 0}}, "must be positive"),
        ({"objective": {"kind": "denoised_distance", "kl_beta": -1}}, "would reward drift"),
    ],
)
def test_pairs_and_values_that_are_refused(content, reason):
    assert reason in refused(content)


@pytest.mark.parametrize(
    "objective",
    [
        {"kl_beta": float("nan")},
        {"kl_beta": float("inf")},
        {"kind": "denoised_distance", "kl_beta": float("nan")},
        {"kind": "nft", "beta": float("inf")},
        {"kind": "nft", "advantage_range": float("inf")},
        {"kind": "rvm", "scale": float("inf")},
    ],
)
def test_strengths_that_are_no_numbers_are_refused(objective):
    """`--objective.kl-beta nan` was taken: the first update ended with a gradient of NaN in 177
    tensors, and advice to lower the learning rate. `--objective.kind nft
    --objective.advantage-range inf` trained to its end and had no advantage but 0."""
    with pytest.raises(ValueError, match=r"(nan|inf)\b.* positive number"):
        from_dict({"objective": objective})


def test_older_recipes_knew_one_objective():
    """Recipes and run folders from before there were several name no kind."""
    old = from_dict({"objective": {"kl_beta": 2.0, "kl_to": "old"}})
    assert old.objective.kind == "tve_ppo" and old.objective.kl_beta == 2.0
    assert not differences(to_dict(old), to_dict(from_dict(to_dict(old))))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_settings_come_back(kind):
    config = from_dict(pair_of(kind))
    assert from_dict(to_dict(config)) == config


def test_the_old_policy_may_be_a_moving_average():
    """decay 3/4: a quarter of every update enters, and nothing is on policy after the first."""
    run = Run(
        policy=PolicyConfig(train="full", behaviour_decay=0.75),
        optimizer=OptimizerConfig(lr=1e-3, warmup=1),
    )
    start = run.policy.snapshot()
    assert run.policy.on_policy
    run.accumulate()
    run.updater.step()
    for old, now, first in zip(run.policy.behaviour, run.policy.parameters, start):
        torch.testing.assert_close(old, 0.75 * first + 0.25 * now.detach())
    assert not run.policy.on_policy and run.policy.lag == 0
