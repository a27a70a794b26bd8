"""Updates: exact gradients whatever the size of a pass, on and off policy, and nothing changed
where a number is not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import draw, embed, new_pipeline, new_rollout, story

from kvpo.common.timing import Phases
from kvpo.method.advantages import Advantage, UnsafePolicy
from kvpo.method.energies import Temperature, VelocityEnergy
from kvpo.method.objectives.tve_ppo import TvePpo
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.method.routing import KVRouting
from kvpo.method.update import OptimizerConfig, Updater, group_means
from kvpo.policy.policy import Policy, PolicyConfig
from kvpo.types import Trajectory

FORK = 4
UNCLIPPED = OptimizerConfig(clip=1e9)


def advantages(*values: float, safe: bool = True) -> Advantage:
    A = torch.tensor(values, dtype=torch.float64)
    nothing = torch.zeros(0)
    return Advantage(A, A, nothing, nothing, torch.ones(len(A), dtype=torch.bool), safe, {})


A = advantages(1.0, -0.4, -0.6)


class Run:
    """A policy, its updater, and one group to update on."""

    def __init__(
        self,
        starts=(),
        groups=1,
        unsafe=UnsafePolicy(),
        objective=TvePpo(),
        policy=PolicyConfig(train="full"),
        optimizer=UNCLIPPED,
        temperature=Temperature(),
    ):
        self.pipeline = new_pipeline()
        self.rollout = new_rollout(
            self.pipeline, story(7, *starts), KVRouting(window_blocks=2), fork=FORK
        )
        self.policy = Policy(self.pipeline.generator, policy, 0)
        self.updater = Updater(self.policy, optimizer, objective, temperature, unsafe, groups)

    def replay(self, size: int = 0, context: str = "branch") -> Replay:
        return Replay(
            self.pipeline,
            self.rollout,
            embed(self.pipeline, self.rollout.script),
            CONTEXTS[context],
            VelocityEnergy(),
            rows_per_pass=size,
        )

    def accumulate(self, A=A, size: int = 0, context: str = "branch"):
        return self.updater.accumulate(self.replay(size, context), A, Phases())

    def gradient(self) -> torch.Tensor:
        taken = torch.cat([p.grad.flatten() for p in self.policy.parameters])
        self.updater.optimizer.zero_grad(set_to_none=True)
        return taken

    def state(self) -> list[torch.Tensor]:
        sets = (
            self.policy.snapshot(),
            self.policy.behaviour,
            self.policy.average,
            self.policy.reference,
        )
        return [w.clone() for s in sets for w in s]


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("starts", [(), (FORK + 1,)], ids=["one prompt", "switch in the window"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_few_at_a_time_is_all_at_once(context, starts):
    """The loss is a function of G numbers, so its gradient may be taken pass by pass; here
    against autograd through the whole loss."""
    run = Run(starts)
    replay = run.replay(context=context)
    energy = torch.zeros(3, dtype=torch.float64)
    for branch, share in replay.passes():
        energy = energy.index_add(0, branch, share)
    logit = -energy / energy.detach().std()
    ratio = (torch.log_softmax(logit, 0) - torch.log_softmax(logit, 0).detach()).exp()
    (
        -(ratio * A.values).mean()
    ).backward()  # no clip acts at ratio 1, and KL to the same weights has no gradient
    whole = run.gradient()
    for size in (0, 1, 5):
        update = run.accumulate(size=size, context=context)
        assert differ(run.gradient(), whole) < 1e-5
        torch.testing.assert_close(update.energy, energy.detach(), rtol=1e-6, atol=0)
    assert whole.norm() > 1e-3


def test_at_the_old_weights_it_is_contrastive_flow_matching():
    """dL/dtheta = 1/(G tau) sum_g (A_g - G pi_g mean(A)) dE_g/dtheta, for advantages that are
    not centred."""
    run, A_G = Run(temperature=Temperature(0.003)), advantages(2.0, 0.5, -0.5)
    energy, rows = torch.zeros(3, dtype=torch.float64), []
    for branch, share in run.replay().passes():
        energy = energy.index_add(0, branch, share)
    for g in range(3):
        rows.append(
            torch.cat(
                [
                    d.flatten()
                    for d in torch.autograd.grad(
                        energy[g], run.policy.parameters, retain_graph=True
                    )
                ]
            )
        )
    pi = torch.softmax(-energy.detach() / 0.003, 0)
    expected = sum(
        (A_G.values[g] - 3 * pi[g] * A_G.values.mean()) * rows[g].double() for g in range(3)
    ) / (3 * 0.003)
    update = run.accumulate(A_G)
    assert differ(run.gradient().double(), expected) < 1e-5
    torch.testing.assert_close(update.pi, pi, rtol=1e-5, atol=0)
    assert update.metrics["policy/tau"] == 0.003


def test_with_the_anchor_in_the_group_branches_that_all_lose_become_less_likely():
    """Ranked among themselves, branches that are all equally worse than the anchor teach
    nothing."""
    run = Run(optimizer=OptimizerConfig(lr=1e-3, warmup=1))
    run.accumulate(advantages(0.0, 0.0, 0.0))
    assert run.gradient().norm() < 1e-9
    whole = Replay(
        run.pipeline,
        run.rollout,
        run.replay().embeddings,
        CONTEXTS["branch"],
        VelocityEnergy(),
        range(4),
    )
    before = whole.energies()
    assert before[3] < 1e-9 < before[:3].min(), (
        "the anchor's energy is 0 under the weights that made it"
    )
    update = run.updater.accumulate(whole, advantages(-0.5, -0.5, -0.5, 1.5), Phases())
    run.updater.step()
    after = whole.energies()
    tau = update.metrics["policy/tau"]
    share = [float(torch.softmax(-e / tau, 0)[3]) for e in (before, after)]
    assert share[1] > share[0] + 1e-3


def test_one_step_raises_the_best_branch():
    run = Run(optimizer=OptimizerConfig(lr=1e-3, warmup=1))
    before = run.replay().energies()
    tau = float(before.std())
    metrics = run.accumulate(A).metrics | run.updater.step()
    pi, moved = (torch.softmax(-e / tau, 0) for e in (before, run.replay().energies()))
    assert moved[0] > pi[0] + 1e-3
    assert (
        metrics["optim/lr"] == 1e-3
        and metrics["optim/grad_norm"] > 0
        and metrics["optim/drift"] > 0
    )


def test_on_policy_the_ratio_is_one():
    """At every update of a policy that syncs after each, exactly: the old scores are the
    detached new ones."""
    run = Run(optimizer=OptimizerConfig(lr=1e-3, warmup=1))
    for _ in range(3):
        m = run.accumulate().metrics
        assert (
            m["loss/ratio_min"] == m["loss/ratio_max"] == 1.0
            and m["loss/clip_fraction"] == 0.0
            and m["policy/lag"] == 0
        )
        run.updater.step()


def test_off_policy_the_ratio_moves_until_the_sync():
    run = Run(
        policy=PolicyConfig(train="full", sync_interval=2),
        optimizer=OptimizerConfig(lr=1e-3, warmup=1),
    )
    ratios, lags = [], []
    for _ in range(3):
        m = run.accumulate().metrics
        ratios.append((m["loss/ratio_min"], m["loss/ratio_max"]))
        lags.append(m["policy/lag"])
        run.updater.step()
    assert ratios[0] == ratios[2] == (1.0, 1.0) and lags == [0, 1, 0]
    assert ratios[1][0] < 1.0 < ratios[1][1], "the best branch gained, others lost"


def test_the_kl_measures_from_the_start_weights():
    run = Run(optimizer=OptimizerConfig(lr=1e-3, warmup=1))
    kl = []
    for _ in range(3):
        kl.append(run.accumulate().metrics["loss/kl"])
        run.updater.step()
    assert kl[0] == 0.0 < min(kl[1:])


def test_the_kl_may_be_to_the_old_policy():
    """On policy it is then 0 with gradient 0, whatever has been learnt since the start."""
    run = Run(
        objective=TvePpo(kl_beta=10.0, kl_to="old"),
        optimizer=OptimizerConfig(lr=1e-2, warmup=1),
    )
    for _ in range(2):
        update = run.accumulate()
        run.updater.step()
    assert update.metrics["loss/kl"] == 0.0
    plain = Run(objective=TvePpo(kl_beta=0.0), optimizer=OptimizerConfig(lr=1e-2, warmup=1))
    for _ in range(2):
        plain.accumulate()
        plain.updater.step()
    assert all(torch.equal(a, b) for a, b in zip(run.state(), plain.state()))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_kl_to_the_start_is_seen_also_where_nothing_holds_it(beta):
    """With kl_beta 0 it was once the KL to the old policy, 0 in every step, and the sentinel
    that watches it slept."""
    calls, kl = [], []
    for to in ("old", "initial"):
        run = Run(objective=TvePpo(kl_beta=beta, kl_to=to))
        run.accumulate()
        run.updater.step()
        before = run.pipeline.generator.calls
        kl.append(run.accumulate().metrics["loss/kl"])
        calls.append(run.pipeline.generator.calls - before)
    assert calls == [2, 4], "a clean pass and a batch of velocities for each set of weights"
    assert kl[0] == 0.0 < kl[1]


def test_the_kl_that_nobody_asks_for_costs_nothing():
    """With kl_watch off and kl_beta 0 no replay of the start weights, no KL in the log, and the
    same weights bit for bit; with kl_beta above 0 it is needed all the same."""
    states, calls = [], []
    for watch in (True, False):
        objective = TvePpo(kl_beta=0.0, kl_watch=watch)
        run = Run(objective=objective, optimizer=OptimizerConfig(lr=1e-2, warmup=1))
        run.accumulate()
        run.updater.step()
        before = run.pipeline.generator.calls
        assert ("loss/kl" in run.accumulate().metrics) == watch
        calls.append(run.pipeline.generator.calls - before)
        run.updater.step()
        states.append(run.state())
    assert calls == [4, 2] and all(torch.equal(a, b) for a, b in zip(*states))
    assert TvePpo(kl_beta=0.1, kl_watch=False).asks_reference


def test_groups_add_up_to_their_mean():
    run = Run(groups=2)
    run.accumulate(A)
    first = run.gradient()
    run.accumulate(advantages(-1.0, 0.3, 0.7))
    second = run.gradient()
    run.accumulate(A)
    run.accumulate(advantages(-1.0, 0.3, 0.7))
    assert differ(run.gradient(), first + second) < 1e-5
    alone = Run(groups=1)
    alone.accumulate(A)
    assert differ(alone.gradient(), 2 * first) < 1e-5


def test_the_rate_warms_up_from_above_zero():
    """Adam's first step moves every weight by the rate, whatever its gradient's size."""
    run = Run(optimizer=OptimizerConfig(lr=1e-3, warmup=4))
    start, rates = run.policy.snapshot(), []
    for i in range(6):
        run.accumulate()
        rates.append(run.updater.step()["optim/lr"])
        if i == 0:
            moved = max(
                float((p - s).detach().abs().max()) for p, s in zip(run.policy.parameters, start)
            )
            assert moved == pytest.approx(2.5e-4, rel=1e-3)
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_every_group_is_clipped_by_itself():
    """A group with a gradient a thousand times as large weighs no more than the others: here
    both are clipped to 1e-4, and halved by being two."""
    whole = Run()
    whole.accumulate()
    one = whole.gradient()
    run = Run(groups=2, optimizer=OptimizerConfig(clip=1e-4))
    first = run.accumulate().metrics
    run.accumulate(advantages(-1000.0, 400.0, 600.0))
    assert (
        first["optim/grad_norm"] == pytest.approx(float(one.norm()), rel=1e-5)
        and first["optim/grad_clipped"] == 1.0
    )
    assert float(run.gradient().norm()) < 1e-3 * 1e-4, "equal and opposite once both are clipped"
    run.accumulate()
    run.accumulate()
    assert differ(run.gradient(), 1e-4 * one / one.norm()) < 1e-3


# --- Groups without a branch above the anchor ---


def test_an_unsafe_group_is_skipped():
    run = Run(unsafe=UnsafePolicy("skip"))
    before, calls = run.state(), run.pipeline.generator.calls
    update = run.accumulate(advantages(0.1, 0.0, -0.1, safe=False))
    metrics = run.updater.step()
    assert (
        update.metrics == {"group/safe": 0.0, "group/skipped": 1.0}
        and update.energy.isnan().all()
        and update.pi.isnan().all()
    )
    assert (
        metrics["optim/grad_norm"] == 0.0 and same(before, run.state()) and run.policy.updates == 0
    )
    assert run.pipeline.generator.calls == calls, "what is skipped is not replayed"


def test_an_unsafe_group_is_scaled():
    run = Run(unsafe=UnsafePolicy("scale", 0.25))
    run.accumulate(advantages(1.0, -0.4, -0.6, safe=True))
    safe = run.gradient()
    run.accumulate(advantages(1.0, -0.4, -0.6, safe=False))
    assert differ(run.gradient(), 0.25 * safe) < 1e-5


# --- What is not finite ---


def test_a_broken_energy_stops_naming_its_branch():
    run = Run()
    before = run.state()
    t = run.rollout.trajectory
    velocities = t.velocities.clone()
    velocities[1, 0, 2, 0, 0, 0, 0] = float("nan")
    run.rollout = replace(run.rollout, trajectory=Trajectory(t.inputs, velocities, t.clean))
    with pytest.raises(
        ValueError, match=r"old energies .* are not all finite; branches \[1\] are broken"
    ):
        run.accumulate()
    assert (
        same(before, run.state())
        and all(p.grad is None for p in run.policy.parameters)
        and run.policy.updates == 0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_advantage_stops_naming_its_branch(bad):
    run = Run()
    before = run.state()
    with pytest.raises(ValueError, match=f"advantages not finite: branch 2 = {bad}"):
        run.accumulate(advantages(0.5, -0.5, bad))
    assert same(before, run.state()) and all(p.grad is None for p in run.policy.parameters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_stops_naming_its_tensor(bad):
    run = Run()
    run.accumulate()
    run.updater.step()
    before = run.state()
    moments = [run.updater.optimizer.state[p]["exp_avg"].clone() for p in run.policy.parameters]
    run.accumulate()
    at = run.policy.names.index("blocks.1.ffn.net.2.weight")
    run.policy.parameters[at].grad[0, 0] = bad
    with pytest.raises(
        FloatingPointError,
        match=f"gradient norm is {bad if bad != bad else 'inf'} at update 1; not finite in 1 tensors, first blocks.1.ffn.net.2.weight; nothing was updated",
    ):
        run.updater.step()
    assert same(before, run.state()) and run.policy.updates == 1
    assert same(moments, [run.updater.optimizer.state[p]["exp_avg"] for p in run.policy.parameters])


def test_energies_that_are_all_zero_are_refused():
    run = Run()
    t = run.rollout.trajectory
    anchor = (
        t.velocities[-1:].expand_as(t.velocities),
        t.inputs[-1:].expand_as(t.inputs),
        t.clean[-1:].expand_as(t.clean),
    )
    run.rollout = replace(
        run.rollout, trajectory=Trajectory(anchor[1].clone(), anchor[0].clone(), anchor[2].clone())
    )
    assert run.replay().energies().max() < 1e-9
    run.rollout = replace(
        run.rollout,
        trajectory=Trajectory(
            draw(4, 2, 4, 2, 4, 4, 4), torch.zeros(4, 2, 4, 2, 4, 4, 4), anchor[2].clone()
        ),
    )
    run.pipeline.generator.transformer.proj_out.weight.data.zero_()
    run.pipeline.generator.transformer.proj_out.bias.data.zero_()
    with pytest.raises(ValueError, match="all 3 energies are 0"):
        run.accumulate()


def test_group_means_by_hand():
    assert group_means([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": float("nan")}, {"clip": 0.0}, {"warmup": 0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        OptimizerConfig(**bad)
