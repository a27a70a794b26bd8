"""The agreement of groups' gradients: known agreement is found, the sketch is fair, ranks and
resumed runs say the same."""

from __future__ import annotations

import math

import pytest
import torch
from test_align import align, records, settings, write_recipe
from test_config import refused
from test_distributed import torchrun
from test_update import Run, advantages

from kvpo.common.rng import normal
from kvpo.distributed.ranks import Ranks
from kvpo.method.agreement import (
    Agreement,
    AgreementConfig,
    mean_cosine,
    metrics_of,
    needed_groups,
    sentence,
    signal,
)
from kvpo.method.sketch import SIZE, Sketch
from kvpo.method.update import Updater
from kvpo.policy.checkpoint import checkpoints, read_tensors
from kvpo.report.report import write_report


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def groups(N: int, rho: float, seed: int, D: int = 3000) -> torch.Tensor:
    """N gradients of length 1: a common direction, and noise of their own; two of them have the
    cosine ``rho`` on average."""
    common = unit(normal((D,), seed, "common").double())
    noise = unit(normal((N, D), seed, "noise").double())
    return unit(math.sqrt(rho) * common + math.sqrt(1.0 - rho) * noise)


# --- The sketch ---


def test_inner_products_are_kept_on_average():
    """Over 200 projections: the mean is the true product within its error, the spread is that of
    a count sketch."""
    a = [normal((37, 111), 0, "a"), normal((9000,), 1, "a")]
    b = [0.3 * x + normal(tuple(x.shape), 2, "b") for x in a]

    def flat(x):
        return torch.cat([t.flatten() for t in x]).double()

    true = float(flat(a) @ flat(b))
    found = torch.tensor([float(Sketch(2, s)(a) @ Sketch(2, s)(b)) for s in range(200)])
    spread = math.sqrt((float(flat(a).square().sum() * flat(b).square().sum()) + true**2) / SIZE)
    assert abs(float(found.mean()) - true) < 4 * spread / math.sqrt(200)
    assert 0.8 * spread < float(found.std()) < 1.2 * spread


@pytest.mark.parametrize("period", [1, 64, SIZE])
def test_a_gradient_of_few_columns_is_spread_too(period):
    """All of it in one column of a matrix, as of a dead input: without the rows' shifts it would
    all fall on one place."""
    x, y = torch.zeros(2, 300 * SIZE // 64)
    x[::period], y[::period] = (unit(normal((len(x[::period]),), 0, name)) for name in "xy")
    true = float(x.double() @ y.double())
    found = torch.tensor([float(Sketch(1, s)([x]) @ Sketch(1, s)([y])) for s in range(60)])
    count = len(x[::period])
    assert float(found.std()) < 1.5 / math.sqrt(min(SIZE, count)) and abs(
        float(found.mean()) - true
    ) < 4 * float(found.std()) / math.sqrt(60)


def test_a_sketch_is_linear_and_named():
    a, b = normal((5000,), 0, "a"), normal((5000,), 0, "b")
    sketch = Sketch(1, 3)
    torch.testing.assert_close(sketch([a + b]), sketch([a]) + sketch([b]), rtol=1e-5, atol=1e-5)
    assert torch.equal(sketch([a]), Sketch(1, 3)([a])) and not torch.equal(
        sketch([a]), Sketch(1, 4)([a])
    )
    assert not Sketch(2, 3)([None, None]).any() and torch.equal(
        Sketch(2, 3)([a, None]), Sketch(2, 3)([a, torch.zeros(7)])
    )


def test_large_tensors_are_taken_in_parts(monkeypatch):
    x = normal((3 * SIZE + 17,), 0, "x")
    whole = Sketch(1, 0)([x])
    monkeypatch.setattr("kvpo.method.sketch.PART", SIZE)
    torch.testing.assert_close(Sketch(1, 0)([x]), whole, rtol=0, atol=1e-9)


# --- Known agreement ---


@pytest.mark.parametrize("rho", [0.0, 0.02, 0.3])
def test_known_agreement_is_found(rho):
    """Over 60 sets of 24 gradients, measured on their sketches: the mean is rho, and the error
    is the spread from set to set."""
    found = []
    for seed in range(60):
        sketch = Sketch(1, seed)
        found.append(mean_cosine(torch.stack([sketch([g]) for g in groups(24, rho, seed)])))
    cosines, errors = torch.tensor(found, dtype=torch.float64).T
    assert float(cosines.mean()) == pytest.approx(
        rho, abs=4 * float(cosines.std()) / math.sqrt(60) + 1e-3
    )
    assert (
        0.7 * float(cosines.std())
        < float(errors.square().mean().sqrt())
        < 1.5 * float(cosines.std())
    )


def test_the_mean_cosine_by_hand():
    """Three vectors in a plane at 0, 60 and 90 degrees: cosines .5, 0 and .866, mean .455."""
    x = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 1.0]])
    cosine, error = mean_cosine(x)
    assert cosine == pytest.approx((0.5 + math.sqrt(0.75)) / 3) and error > 0


def test_groups_needed_by_hand():
    assert needed_groups(0.01) == 100.0 and needed_groups(0.0) == needed_groups(-0.1) == math.inf
    assert (
        signal(100, 0.01) == 0.5
        and signal(2, 0.01) == pytest.approx(0.02 / 1.02)
        and signal(2, -0.1) == 0.0
    )


def test_a_mean_of_that_many_is_half_signal():
    """What the number promises: the squared cosine of the mean of 1 / rho gradients with the
    common direction is a half."""
    rho, D = 0.05, 3000
    squares = []
    for seed in range(40):
        x = groups(20, rho, seed, D)
        squares.append(
            float(unit(x.mean(dim=0)) @ unit(normal((D,), seed, "common").double())) ** 2
        )
    assert sum(squares) / 40 == pytest.approx(signal(20, rho), abs=0.05) == 0.5


def test_the_sentence():
    clear = sentence(0.012, 0.002, 128, 2)
    assert (
        "mean cosine of 0.012 (standard error 0.002): about 83 groups (62 to 125) until" in clear
        and "a step has 2, and 2% of its squared length is signal" in clear
    )
    none = sentence(0.001, 0.003, 64, 2)
    assert "can not be told from none: at least 143 groups are needed" in none
    assert "more groups than can be said are needed" in sentence(-0.02, 0.003, 64, 2)


def test_too_few_groups_say_nothing():
    assert metrics_of(groups(3, 0.5, 0)) == {} and set(metrics_of(groups(4, 0.5, 0))) == {
        "agreement/cosine",
        "agreement/error",
        "agreement/groups",
        "agreement/needed",
    }
    assert "agreement/needed" not in metrics_of(torch.cat([groups(2, 0.0, 0), -groups(2, 0.0, 0)]))


# --- In an updater, over ranks, over steps ---


def test_an_update_gives_the_sketch_of_the_gradient_before_its_clip():
    run = Run()
    run.accumulate()
    gradient = [p.grad.clone() for p in run.policy.parameters]
    clipped = Run(groups=2)
    clipped.updater = Updater(
        clipped.policy,
        clipped.updater.config.__class__(clip=1e-4),
        run.updater.objective,
        run.updater.temperature,
        run.updater.unsafe,
        2,
        sketch=Sketch(len(gradient), 0),
    )
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    for _ in range(2):  # the second is added to the first, and is none the less the group's own
        torch.testing.assert_close(
            clipped.accumulate().sketch,
            Sketch(len(gradient), 0)(gradient) / float(norm),
            rtol=1e-3,
            atol=1e-5,
        )
    assert (
        clipped.accumulate(advantages(0.0, 0.0, 0.0)).sketch is None
        and Run().accumulate().sketch is None
    )


def test_a_window_of_groups_whatever_the_ranks(monkeypatch):
    x = groups(10, 0.2, 0, SIZE).float()
    alone, pair = Agreement(AgreementConfig(6)), Agreement(AgreementConfig(6))
    for step in range(5):
        for i in (1, 0):
            alone.note(i, x[2 * step + i])
        first = alone.take(Ranks())
        pair.note(1, x[2 * step + 1])
        monkeypatch.setattr(Ranks, "gather", lambda self, value: [{0: x[2 * step]}, value])  # noqa: B023, called at once
        assert pair.take(Ranks(1, 2)) == first
        monkeypatch.undo()
    assert first["agreement/groups"] == 6 and first == metrics_of(x[4:])
    again = Agreement(AgreementConfig(6))
    again.restore(alone.state())
    assert torch.equal(again.state()["agreement.sketches"], x[4:])


def test_off_is_nothing():
    off = Agreement(AgreementConfig(0))
    off.note(0, torch.ones(SIZE))
    assert off.take(Ranks()) == {} and off.state() == {}
    assert "agreement.window = 3 must be 4 or more" in refused({"agreement": {"window": 3}})


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("agreement")
    path = write_recipe(
        home / "tiny.yaml",
        settings(
            folder,
            groups=2,
            steps=3,
            agreement={"window": 5},
            evaluate={"scripts": 2, "batch": 2, "videos": 0},
        ),
    )
    assert align(path, home / "run") == 0
    return home / "run", path


def test_a_resumed_run_says_what_the_uninterrupted_one_does(run, tmp_path):
    out, path = run
    assert align(path, tmp_path / "run", "--steps", "2") == 0
    assert align(path, tmp_path / "run", "--resume") == 0
    a, b = (
        [
            {k: v for k, v in r.items() if k.startswith("agreement/")}
            for r in records(o, evaluations=False)
        ]
        for o in (out, tmp_path / "run")
    )
    assert a == b and a[0] == {} and [r["agreement/groups"] for r in a[1:]] == [4, 5]


def test_two_ranks_say_what_one_does(run, tmp_path):
    out, path = run
    code, said = torchrun(path, tmp_path / "run", "--steps", "1", "--optimizer.eps", "1e-3")
    assert code == 0, said
    ours, theirs = (
        read_tensors(checkpoints(o / "checkpoints")[0], "agreement.")["agreement.sketches"]
        for o in (tmp_path / "run", out)
    )
    torch.testing.assert_close(ours, theirs[:2], rtol=1e-3, atol=1e-5)


def test_a_report_says_it(run):
    text = write_report(run[0]).read_text()
    assert (
        "Over the last 5 groups, gradients of two groups have a mean cosine of" in text
        and "a step has 2" in text
    )
    assert (
        "Mean cosine between groups&#x27; gradients" in text
        or "Mean cosine between groups' gradients" in text
    )
