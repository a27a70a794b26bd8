"""Evaluation: paired, with an interval that is what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from tiny import BLUE, RED, SMALL, Change, Unmeasured, Warmth, draw, new_pipeline, story

from kvpo.common.rng import stream
from kvpo.evaluation.evaluate import (
    EvaluateConfig,
    Scored,
    bootstrap_interval,
    compare,
    evaluate,
    kinds_of,
    means,
    means_table,
    table,
    write_comparison,
    write_means,
)
from kvpo.generators.generate import generate
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.score import ScoreConfig, global_clips
from kvpo.rewards.base import VideoBatch
from kvpo.rewards.registry import RewardEntry
from kvpo.rewards.scorer import Scorer
from kvpo.types import Window

CLIPS = ScoreConfig(clip_frames=8, min_frames=4)
NAN = math.nan


def scored(**rows: list[float]) -> Scored:
    return Scored(tuple(rows), torch.tensor(list(rows.values()), dtype=torch.float64), ())


def test_win_rates_and_means_by_hand():
    """Two wins, a loss and a tie that counts half; the pairs that lack a number on either side
    do not count."""
    a, b = scored(VQ=[0.9, 0.8, 0.1, 0.5, NAN, 0.3]), scored(VQ=[0.5, 0.4, 0.7, 0.5, 0.1, NAN])
    total, row = compare(a, b, ["train"])
    assert row["component"] == "VQ" and row["kind"] == "train" and row["n"] == 4
    assert (
        row["win"] == pytest.approx(2.5 / 4)
        and row["a"] == pytest.approx(0.575)
        and row["b"] == pytest.approx(0.525)
        and row["diff"] == pytest.approx(0.05)
    )
    assert row["low"] <= row["diff"] <= row["high"]
    assert {k: v for k, v in total.items() if k not in ("component", "low", "high")} == {
        k: v for k, v in row.items() if k not in ("component", "low", "high")
    }


def test_the_total_is_over_trained_components_and_scripts_that_have_all():
    a = scored(VQ=[0.2, 0.4, 0.6], TA=[0.4, NAN, 0.8], flow=[0.0, 0.0, 0.0])
    b = scored(VQ=[0.1, 0.1, 0.1], TA=[0.1, 0.1, 0.1], flow=[0.9, 0.9, 0.9])
    total, *rows = compare(a, b, ["train", "train", "heldout"])
    assert total["component"] == "mean of trained" and total["n"] == 2
    assert (
        total["a"] == pytest.approx((0.3 + 0.7) / 2)
        and total["diff"] == pytest.approx((0.2 + 0.6) / 2)
        and total["win"] == 1.0
    )
    assert (
        [(r["component"], r["n"]) for r in rows] == [("VQ", 3), ("TA", 2), ("flow", 3)]
        and rows[2]["diff"] == pytest.approx(-0.9)
        and rows[2]["win"] == 0.0
    )


@pytest.mark.parametrize("values", [[NAN, NAN, NAN], [0.5, NAN, NAN]])
def test_too_few_pairs_say_nothing(values):
    rows = compare(scored(VQ=values), scored(VQ=[0.1, 0.2, 0.3]), ["train"])
    assert all(r["diff"] is None and r["low"] is None and r["win"] is None for r in rows) and rows[
        1
    ]["n"] == sum(v == v for v in values)
    assert "could not be measured on enough scripts" in table(rows, "A", "B")


def test_the_bootstrap_is_near_the_normal_interval():
    """Of 400 nearly normal differences: mean +- 1.96 standard errors, to a tenth of an error."""
    diff = 0.3 + draw(400, dtype=torch.float64)
    error = float(diff.std()) / 20.0
    low, high = bootstrap_interval(diff, stream(0, "tests", "bootstrap"))
    assert low == pytest.approx(float(diff.mean()) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(float(diff.mean()) + 1.96 * error, abs=0.1 * error)
    narrow = bootstrap_interval(diff, stream(0, "tests", "bootstrap"), level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.05)


def test_the_bootstrap_covers_as_often_as_it_says():
    """100 samples of 40 with mean 0: about 95 % of the intervals hold it (a bootstrap of 40
    covers a little less)."""
    samples = draw(100, 40, seed=5, dtype=torch.float64)
    hits = sum(
        low <= 0.0 <= high
        for low, high in (
            bootstrap_interval(s, stream(0, "cover", i)) for i, s in enumerate(samples)
        )
    )
    assert 0.89 <= hits / 100 <= 0.99


def test_the_interval_is_bca_by_hand():
    """Percentiles of the resampled means, moved by bias z0 and acceleration a, from Efron's
    formulas and resamples of our own.

    Percentile intervals were used once: of skewed differences they lie too far from the long
    tail."""
    diff = draw(24, dtype=torch.float64).exp().numpy()
    n, normal = len(diff), NormalDist()
    boot = diff[np.random.default_rng(1).integers(n, size=(40000, n))].mean(axis=1)
    z0 = normal.inv_cdf((boot < diff.mean()).mean())
    # the jackknife's means, from their own mean
    apart = diff.mean() - (diff.sum() - diff) / (n - 1)
    a = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    shares = [normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in (-1.959964, 1.959964)]
    low, high = bootstrap_interval(torch.from_numpy(diff), stream(0, "tests", "bca"))
    error = diff.std(ddof=1) / n**0.5
    assert (low, high) == pytest.approx(tuple(np.quantile(boot, shares)), abs=0.12 * error)
    plain = np.quantile(boot, (0.025, 0.975))
    assert low > plain[0] + 0.05 * error and high > plain[1] + 0.2 * error, (
        "the test would not tell BCa from percentiles"
    )


@pytest.mark.parametrize("values", [[0.25] * 5, [0.1 + 0.2, 0.3, 0.3], [0.0] * 4])
def test_equal_differences_have_an_interval_of_no_width(values):
    """There is no distribution to resample: scipy alone warns, and gives NaN."""
    low, high = bootstrap_interval(
        torch.tensor(values, dtype=torch.float64), stream(0, "tests", "equal")
    )
    assert low == high == pytest.approx(values[0])


@pytest.mark.parametrize("values", [[0.1, 0.3], [0.0, 0.0, 1e-9], [0.0] * 63 + [1.0]])
def test_an_interval_of_odd_samples_is_still_one(values):
    low, high = bootstrap_interval(
        torch.tensor(values, dtype=torch.float64), stream(0, "tests", "odd")
    )
    assert min(values) <= low <= sum(values) / len(values) <= high <= max(values) and low < high


def test_one_set_of_weights_has_intervals_too():
    """`kvpo evaluate` without --against once gave bare means, which do not say how far other
    scripts would move them."""
    found = scored(VQ=[0.2, 0.4, 0.6, 0.8], TA=[0.4, NAN, NAN, NAN], flow=[NAN] * 4)
    total, vq, ta, flow = means(found, ["train", "heldout", "heldout"])
    assert (
        vq["mean"] == pytest.approx(0.5)
        and vq["sd"] == pytest.approx(0.2582, abs=1e-4)
        and vq["n"] == 4
    )
    assert 0.2 < vq["low"] < 0.5 < vq["high"] < 0.8 and total | {
        "component": "VQ"
    } == pytest.approx(vq | {"low": total["low"], "high": total["high"]})
    assert (ta["mean"], ta["low"], ta["n"]) == (pytest.approx(0.4), None, 1) and (
        flow["mean"],
        flow["n"],
    ) == (None, 0)
    assert "[" in means_table([vq]) and "not be measured on enough" in means_table([ta])


def test_the_record_has_the_numbers_of_every_script(tmp_path):
    """Of a run's evaluations only means were kept: nobody could look which script fell, or test
    otherwise."""
    a, b = scored(VQ=[0.9, 0.8, 0.1]), scored(VQ=[0.5, 0.6, NAN])
    path = write_comparison(
        tmp_path / "x.json",
        compare(a, b, ["train"]),
        "A",
        "B",
        SCRIPTS,
        EvaluateConfig(),
        "",
        scored=(a, b),
    )
    record = json.loads(path.read_text())
    assert (
        record["values"] == {"VQ": [0.9, 0.8, 0.1]}
        and record["values_against"] == {"VQ": [0.5, 0.6, None]}
        and len(record["scripts"]) == 3
    )
    record = json.loads(
        write_means(
            tmp_path / "y.json", means(b, ["train"]), "B", SCRIPTS, EvaluateConfig(), "", True, b
        ).read_text()
    )
    assert (
        record["values"] == {"VQ": [0.5, 0.6, None]}
        and record["means"]["VQ"] == pytest.approx(0.55)
        and record["rows"][1]["low"] is not None
    )


def test_an_interval_is_reproducible_and_each_component_has_its_own_stream():
    a = scored(VQ=[0.9, 0.8, 0.1], TA=[0.9, 0.8, 0.1])
    b = scored(VQ=[0.5, 0.6, 0.3], TA=[0.5, 0.6, 0.3])
    assert compare(a, b, ["train", "train"]) == compare(a, b, ["train", "train"])


def test_equal_weights_tie():
    a = scored(VQ=[0.3, 0.6, 0.9])
    _, row = compare(a, a, ["train"])
    assert (row["diff"], row["low"], row["high"], row["win"]) == (0.0, 0.0, 0.0, 0.5)


# --- Generating and scoring ---

SCRIPTS = (story(6, 3, id="a"), story(6, id="b"), story(6, 2, 4, id="c", texts=(SMALL, RED, BLUE)))


def measured(
    pipeline, batch: int, rewards=(Warmth(), Change()), scripts=SCRIPTS, clips=CLIPS
) -> Scored:
    return evaluate(
        pipeline,
        SAMPLERS["renoise"],
        scripts,
        rewards,
        clips,
        EvaluateConfig(scripts=3, batch=batch, videos=2),
    )


def test_the_batch_does_not_matter(pipeline):
    """Scripts that switch at other blocks go through together; the smallest cache is enough for
    that."""
    done = []
    together = evaluate(
        pipeline,
        SAMPLERS["renoise"],
        SCRIPTS,
        [Warmth(), Change()],
        CLIPS,
        EvaluateConfig(scripts=3, batch=2, videos=2),
        done.append,
    )
    apart = measured(pipeline, 1)
    torch.testing.assert_close(together.r_KN, apart.r_KN, atol=1e-3, rtol=0)
    assert (
        together.components == ("Warmth", "Change")
        and together.r_KN.shape == (2, 3)
        and done == [2, 3]
    )
    assert len(together.videos) == 2 and together.videos[0].shape == (45, 3, 32, 32)
    assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(together.videos, apart.videos))


def test_a_script_of_several_seeds_is_their_mean(pipeline):
    """The first seed's noise is that of an evaluation of one seed, so more seeds refine the same
    number; how far they differ is a number of its own, also where a batch ends between them."""
    config = EvaluateConfig(scripts=3, batch=3, videos=2, seeds=2)
    done = []
    result = evaluate(
        pipeline, SAMPLERS["renoise"], SCRIPTS, [Warmth()], CLIPS, config, done.append
    )
    assert (
        result.components == ("Warmth", "diversity")
        and result.r_KN.shape == (2, 3)
        and done == [1, 3]
        and len(result.videos) == 2
    )
    for i, script in enumerate(SCRIPTS):
        first, second = (
            measured_video(pipeline, script, name)
            for name in (("evaluate", script.id), ("evaluate", script.id, 1))
        )
        assert first != second and float(result.r_KN[0, i]) == pytest.approx(
            (first + second) / 2, abs=1e-3
        )
        one, other = (
            generate(pipeline, SAMPLERS["renoise"], [script], 1000, [name])[0]
            for name in (("evaluate", script.id), ("evaluate", script.id, 1))
        )
        apart = float(((one.double() - other.double()) / 255).square().mean())
        assert apart > 1e-4 and float(result.r_KN[1, i]) == pytest.approx(apart, rel=2e-2)


def measured_video(pipeline, script, name) -> float:
    """Warmth of one video of the script, its clips found as an evaluation finds them."""
    (video,) = generate(pipeline, SAMPLERS["renoise"], [script], 1000, [name])
    clips = global_clips(script, Window(0, 1), pipeline.geometry, CLIPS)
    return sum(
        Warmth().score(VideoBatch(video[None, c.first : c.stop], 16.0, ("x",))).scores.item()
        for c in clips
    ) / len(clips)


@pytest.mark.parametrize(
    ("role", "family", "kind"),
    [
        ("eval", "other", "heldout"),
        ("eval", "toy", "related"),
        ("guard", "toy", "guard"),
        ("train", "toy", "train"),
    ],
)
def test_an_evaluator_of_a_family_that_the_weights_were_trained_on_is_not_held_out(
    role, family, kind
):
    """Another recipe's evaluators may see as this run's rewards did."""
    scorer = Scorer(Warmth(), RewardEntry("tiny:Warmth", role=role))
    scorer.reward.spec = replace(scorer.spec, family=family)
    assert kinds_of([scorer], 1, {"toy"}) == [kind] and kinds_of([scorer], 2, {"toy"}) == [
        kind,
        "guard",
    ]


def test_a_scripts_number_is_the_mean_over_its_segments(pipeline):
    (video,) = generate(pipeline, SAMPLERS["renoise"], SCRIPTS[:1], 1000, [("evaluate", "a")])
    # segments show frames 0..20 and 21..44, clips lie in their middle
    clips = [
        video[6:14],
        video[29:37],
    ]
    expected = sum(float(c[4:, 0].float().mean() / 255.0) for c in clips) / 2
    assert float(measured(pipeline, 1, [Warmth()]).r_KN[0, 0]) == pytest.approx(expected, abs=1e-6)


def test_other_weights_see_the_same_noise(pipeline):
    """Paired: the same weights give the same videos, bit for bit, and other weights others."""
    again, other = new_pipeline(), new_pipeline()
    for p in other.generator.parameters():
        p.data *= 1.05
    names = [("evaluate", s.id) for s in SCRIPTS]
    a, b, c = (
        generate(p, SAMPLERS["renoise"], SCRIPTS, 0, names) for p in (pipeline, again, other)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, generate(pipeline, SAMPLERS["renoise"], SCRIPTS, 1, names))


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_rank_without_a_script_has_an_empty_table(pipeline, seeds):
    """Of more ranks than scripts: it ended a run at its evaluation once."""
    result = evaluate(
        pipeline, SAMPLERS["renoise"], [], [Warmth()], CLIPS, EvaluateConfig(seeds=seeds)
    )
    assert (
        result.r_KN.shape == (len(result.components), 0)
        and len(result.components) == seeds
        and result.videos == ()
    )


def test_what_can_not_be_measured_is_nan(pipeline):
    result = measured(pipeline, 3, [Warmth(), Unmeasured()])
    assert result.r_KN[0].isfinite().all() and result.r_KN[1].isnan().all()


def test_scripts_without_a_long_enough_clip_are_nan(pipeline):
    """They crashed the evaluation once, after all videos had been made."""
    result = measured(pipeline, 3, [Warmth()], clips=ScoreConfig(30, 30))
    assert result.r_KN[0].isnan().tolist() == [True, False, True]


def test_videos_of_one_batch_are_equally_long(pipeline):
    with pytest.raises(ValueError, match=r"equally long, not \[3, 6\] blocks"):
        generate(
            pipeline, SAMPLERS["renoise"], [story(3, id="x"), story(6, id="y")], 0, [("x",), ("y",)]
        )


def test_the_record_can_be_read(tmp_path):
    rows = compare(scored(VQ=[0.9, 0.8, 0.1]), scored(VQ=[0.5, 0.6, NAN]), ["train"])
    path = write_comparison(
        tmp_path / "evaluation" / "x.json",
        rows,
        "A",
        "B",
        SCRIPTS,
        EvaluateConfig(seed=7, seeds=2),
        "kvpo evaluate",
    )
    record = json.loads(path.read_text())
    assert (
        record["scripts"] == ["a", "b", "c"]
        and (record["seed"], record["videos"]) == (7, 2)
        and record["rows"] == rows
        and record["label_b"] == "B"
        and record["unseen"] is True
    )


@pytest.mark.parametrize(
    "bad", [{"every": -1}, {"scripts": 1}, {"batch": 0}, {"videos": -1}, {"seeds": 0}]
)
def test_bad_settings_are_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"evaluate.{name} = {value} must be "):
        EvaluateConfig(**bad)
