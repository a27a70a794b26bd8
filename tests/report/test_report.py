"""The report: everything a run leaves is on the page, nothing is fetched, and what is missing is
said, never a crash."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from kvpo.common.metric_log import MetricLog
from kvpo.common.metrics import PHASES
from kvpo.common.pictures import grid
from kvpo.common.rng import stream
from kvpo.common.video import write_mp4
from kvpo.pages.html import num, seconds
from kvpo.pages.render import source
from kvpo.report.curves import COLOURS, distinct, running_mean, series
from kvpo.report.read_run import Missing, Row, read_evaluations, read_group, read_samples
from kvpo.report.report import write_report
from kvpo.report.routing_map import routing_map
from kvpo.report.samples import group_record
from kvpo.report.videos import _best
from kvpo.types import BranchPlan, RewardTable, Script, Window

STEPS = 40
BRANCHES = 4
SEGMENTS = (
    "a small red circle moves slowly to the left over a dark night",
    "it turns green & rises fast",
)
GEOMETRY = SimpleNamespace(block=3, sink=3, window=12)


def clip(seed: int, frames: int = 24) -> torch.Tensor:
    """A square that moves over a flat ground."""
    video = torch.tensor([24, 28, 60], dtype=torch.uint8)[None, :, None, None].repeat(
        frames, 1, 64, 64
    )
    colour = torch.randint(60, 255, (3, 1, 1), generator=stream(seed, "clip")).to(torch.uint8)
    for t in range(frames):
        x, y = 4 + (2 + seed % 3) * t % 46, round(24 + 14 * math.sin(t / 5 + seed))
        video[t, :, y : y + 14, x : x + 14] = colour
    return video


def write_metrics(run: Path, steps: int = STEPS) -> None:
    noise = torch.randn(steps, 8, generator=stream(0, "noise")).tolist()
    with MetricLog(run) as log:
        for step, n in enumerate(noise):
            values = {
                "loss/policy": 0.01 * n[0],
                "loss/kl": 0.002 * step,
                "loss/entropy": math.log(BRANCHES) - 0.05,
                "loss/clip_fraction": 0.25,
                "loss/approx_kl": 0.001,
            }
            values |= {
                "loss/ratio_min": 0.9,
                "loss/ratio_mean": 1.0,
                "loss/ratio_max": 1.1,
                "policy/tau": 0.004 + 0.001 * n[1] ** 2,
                "policy/evenness": 0.9,
            }
            values |= {
                "optim/grad_norm": 2.0 + abs(n[2]),
                "optim/lr": 1e-4,
                "optim/grad_clipped": 0.0,
                "group/safe": float(n[3] > -1),
                "energy/std": 0.004,
            }
            values |= {
                "agreement/cosine": 0.01 + 0.001 * n[0],
                "agreement/error": 0.003,
                "agreement/groups": min(2 * step + 4, 128),
            }
            for signal in ("local", "global"):
                for k, name in enumerate(("VQ", "MQ", "TA")):
                    mean = 0.6 + 0.004 * step + 0.05 * n[4 + k]
                    values |= {
                        f"reward/{signal}/{name}/{kind}": mean + d
                        for kind, d in (
                            ("mean", 0.0),
                            ("anchor", -0.02),
                            ("best", 0.06),
                            ("std", 0.03),
                        )
                    }
            values |= {
                f"time/{phase}": t
                for phase, t in (
                    ("prefix", 1.5),
                    ("branches", 3.0),
                    ("decode", 0.7),
                    ("reward", 0.4),
                    ("replay_grad", 3.5),
                    ("total", 9.6),
                )
            }
            values |= {"memory/peak_gib": 1.7, "calls/generator": 170, "diversity/pixel": 0.007}
            values |= {
                "conflict/VQ-MQ/rank": 0.3 * n[0],
                "conflict/VQ-MQ/sign": 0.4,
                "conflict/VQ/flat": 0.0,
                "conflict/MQ/flat": 0.1,
            }
            values |= (
                {
                    f"sentinel/motion/{kind}": v
                    for kind, v in (("start", 0.1), ("value", 0.08), ("moved", -1.2))
                }
                if step % 10 == 9
                else {}
            )
            log.write(step, values)
            if step % 10 == 0:
                means = {f"eval/start/{name}/mean": 0.6 for name in ("TA", "direction")}
                means |= {
                    f"eval/ema/{name}/{kind}": v
                    for name in ("TA", "direction")
                    for kind, v in (
                        ("mean", 0.6 + 0.002 * step),
                        ("diff", 0.002 * step),
                        ("low", 0.0015 * step - 0.01),
                        ("high", 0.0025 * step + 0.01),
                    )
                }
                log.write(step, means | {"time/evaluate": 20.0})


def write_evaluation(run: Path) -> None:
    rows = [
        ("VQ", "train", 0.82, 0.79, 0.031, 0.012, 0.050, 0.61),
        ("MQ", "train", 0.66, 0.655, 0.005, -0.010, 0.021, 0.52),
        ("TA", "train", 0.71, 0.60, 0.110, 0.080, 0.139, 0.72),
        ("attribute classifier", "heldout", 0.88, 0.84, 0.040, 0.015, 0.066, 0.58),
        ("flow direction", "heldout", 0.70, 0.69, 0.010, -0.020, 0.041, 0.51),
        ("diversity", "guard", 0.21, 0.24, -0.030, -0.041, -0.018, 0.31),
        ("identity", "heldout", None, 0.9, "NaN", None, None, None),
    ]
    rows = [
        dict(zip(("component", "kind", "a", "b", "diff", "low", "high", "win"), row)) | {"n": 128}
        for row in rows
    ]
    data = {
        "label_a": "EMA, step 40",
        "label_b": "start",
        "scripts": 128,
        "seeds": [0],
        "rows": rows,
        "created": "2026-11-24 21:00",
        "command": "kvpo evaluate runs/mini",
    }
    (run / "evaluation").mkdir()
    (run / "evaluation/ema.json").write_text(json.dumps(data))


def write_samples(run: Path, step: int, which: str) -> None:
    folder = run / f"samples/step-{step:06d}"
    index = []
    for i in range(2):
        write_mp4(folder / f"{i}-{which}.mp4", clip(i + step), factor=2)
        index.append(
            {
                "file": f"{i}-{which}.mp4",
                "script_id": f"story-{i}",
                "texts": SEGMENTS,
                "starts": [0, 4],
                "blocks": 9,
                "seed": 0,
                "which": which,
            }
        )
    (folder / "index.json").write_text(json.dumps(index))


def write_group(run: Path) -> None:
    folder = run / "groups/step-000030"
    plans = (
        *(BranchPlan(frames=tuple(range(3 + g, 8 + g))) for g in range(BRANCHES)),
        BranchPlan(),
    )
    rollout = SimpleNamespace(
        script=Script("story-0", SEGMENTS, (0, 4), 9), window=Window(5, 3), plans=plans
    )
    values = torch.rand(2, BRANCHES + 1, generator=stream(0, "rewards"), dtype=torch.float64)
    table = RewardTable(
        ("VQ", "TA"), values, values.roll(1), torch.ones(BRANCHES + 1, dtype=torch.bool)
    )
    record = group_record(
        rollout,
        table,
        torch.tensor([0.02, math.nan, 0.03, 0.01]),
        torch.tensor([1.0, -1.0, 0.5, -0.5]),
        torch.full((BRANCHES,), 0.25),
    )
    write_mp4(
        folder / "grid.mp4",
        grid(
            [clip(g) for g in range(BRANCHES + 1)],
            [*(f"branch {g}" for g in range(BRANCHES)), "anchor"],
        ),
        factor=1,
    )
    (folder / "routing.png").write_bytes(
        routing_map(plans, rollout.window, GEOMETRY, nearest=1, starts=(0, 4))
    )
    (folder / "group.json").write_text(json.dumps(record, allow_nan=False))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A complete run's folder; tests copy it before they spoil it."""
    run = tmp_path_factory.mktemp("runs") / "mini <seed 0>"
    run.mkdir()
    (run / "config.resolved.yaml").write_text(
        yaml.safe_dump(
            {
                "seed": 0,
                "steps": STEPS,
                "explorer": {"kv_routing": {"draw": "balanced", "nearest": 1}},
                "note": "<b>not bold</b>",
            }
        )
    )
    environment = {
        "git_commit": "fe3bb3a0123456789",
        "hardware": "2 cores",
        "versions": {"torch": "2.13.0"},
        "command": ["kvpo", "align", "mini"],
    }
    (run / "environment.json").write_text(json.dumps(environment))
    write_metrics(run)
    write_evaluation(run)
    write_samples(run, 0, "start")
    write_samples(run, STEPS, "ema")
    write_group(run)
    return run


@pytest.fixture(scope="session")
def page(finished) -> Path:
    """The report of the complete run."""
    return write_report(finished)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Page(HTMLParser):
    """Collects whatever a browser would fetch, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open += [tag] * (tag not in self.VOID)
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action")
        ]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def text_of(path: Path) -> str:
    page = Page(path.read_text())
    assert page.open == []
    return re.sub(r"\s+", " ", "".join(page.words))


def test_page_is_self_contained(page):
    text = page.read_text()
    read = Page(text)
    assert read.open == []
    assert read.addresses and all(address.startswith(("data:", "#")) for address in read.addresses)
    assert (
        "http:" not in text
        and "https:" not in text
        and "@import" not in text
        and not re.search(r"url\((?!#)", text)
    )
    assert (
        text.count("<video") == 5 and text.count("<img") == 1 and text.count('<svg role="img"') > 12
    )


def test_page_says_what_is_clear_and_what_is_not(page):
    words = text_of(page)
    assert (
        "Rewards it was trained on. Better: VQ by 0.0310, TA by 0.110. No clear difference: MQ."
        in words
    )
    assert (
        "Held-out evaluators, never trained on. Better: attribute classifier by 0.0400. No clear difference: flow direction. Not measured: identity."
        in words
    )
    assert "diversity fell while trained rewards rose" in words
    assert "128 scripts, 1 video of each, seed 0" in words and "+0.0120 to +0.0500" in words
    assert SEGMENTS[1] in words and "from block 4 of 9" in words
    assert "<b>not bold</b>" in words and "mini <seed 0>" in words  # escaped, therefore text
    assert "Not shown" not in words and "stopped early" not in words


def test_missing_part_is_said(run):
    for part in ("evaluation", "samples", "groups"):
        shutil.rmtree(run / part)
    for part in ("metrics.jsonl", "environment.json"):
        (run / part).unlink()
    words = text_of(write_report(run))
    for reason in (
        "nothing has been evaluated",
        "no sample videos",
        "no group was recorded",
        "no metrics were logged",
        "no environment.json",
    ):
        assert reason in words
    assert "kv_routing" in words  # what is there is shown


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": [1, ',
        b"[3]\n",
        b'"text"\n',
        b"\xff\xfe\x00\n",
        b'[{"file": null}]',
        b'{"rewards": {}, "plans": 3}',
    ],
)
def test_damaged_parts_never_crash(run, content):
    for part in (
        "evaluation/ema.json",
        "samples/step-000000/index.json",
        "groups/step-000030/group.json",
        "environment.json",
        "config.resolved.yaml",
        "metrics.jsonl",
    ):
        (run / part).write_bytes(content)
    assert "Not shown" in text_of(write_report(run))


def test_damaged_metrics_do_not_hide_the_rest(run):
    (run / "metrics.jsonl").write_bytes(b"\x00\x00\n")
    words = text_of(write_report(run))
    assert (
        "metrics.jsonl line 1 is not a metrics record" in words
        and "Better: VQ" in words
        and SEGMENTS[0] in words
    )


def test_empty_run_is_a_page(tmp_path):
    """Killed right after its config was written: nothing to show, everything said."""
    (tmp_path / "config.resolved.yaml").write_text("steps: 60\n")
    words = text_of(write_report(tmp_path))
    assert words.count("Not shown") >= 7 and "No training step was logged" in words


def test_not_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a run's folder"):
        write_report(tmp_path)


def test_an_evaluation_on_training_prompts_is_warned_of(run, no_curves):
    path = run / "evaluation/ema.json"
    assert "prompts that were trained on" not in text_of(write_report(run))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unseen": False}))
    assert "prompts that were trained on" in text_of(write_report(run))


def test_early_stop_and_nan_are_warned_of(run):
    (run / "metrics.jsonl").unlink()
    with MetricLog(run) as log:
        for step in range(12):
            log.write(
                step,
                {
                    "loss/kl": math.nan if step == 7 else 0.1,
                    "loss/policy": math.inf,
                    "optim/grad_norm": 1.0,
                },
            )
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 12, "loss/k')  # the run was killed here
    words = text_of(write_report(run))
    assert "12 of 40 updates were made" in words
    assert (
        "Loss/kl was not finite in 1 record, first at update 8" in words
        and "1 value not finite, left out" in words
    )


def test_report_replaces_the_old_one(tmp_path):
    for name in ("report.html", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>") and len(
        list(tmp_path.iterdir())
    ) == 2


def test_verdict_follows_the_interval():
    def verdict(low, high, better="higher", n=16):
        return Row("x", "train", 0, 0, (low + high) / 2, low, high, 0.5, n, better).verdict

    assert [
        verdict(0.1, 0.2),
        verdict(-0.2, -0.1),
        verdict(-0.1, 0.2),
        verdict(0.0, 0.2),
        verdict(math.nan, 1.0),
    ] == ["better", "worse", "unclear", "unclear", "unmeasured"]
    assert [verdict(0.1, 0.2, "lower"), verdict(-0.2, -0.1, "lower")] == ["worse", "better"]
    assert verdict(0.1, 0.2, n=15) == "few" and verdict(math.nan, 0.2, n=2) == "unmeasured"


def test_a_handful_of_scripts_has_no_verdict(run, no_curves):
    """Two scripts that both rose gave a narrow interval above 0, and the page said "Better" in
    green."""
    path = run / "evaluation/ema.json"
    record = json.loads(path.read_text())
    rows = [row | {"n": 2} for row in record["rows"]] + [
        record["rows"][0] | {"component": "mean of trained", "n": 2}
    ]
    path.write_text(json.dumps(record | {"rows": rows, "scripts": ["a", "b"]}))
    words, text = text_of(write_report(run)), (run / "report.html").read_text()
    assert (
        "Too few scripts to say: VQ, MQ, TA, mean of trained." in words
        and "Better" not in words
        and 'class="better"' not in text
    )
    assert (
        "Below 16 scripts nothing is called better or worse" in words
        and "2 scripts are too few to call that better or worse" in words
    )


def test_a_point_stands_at_the_updates_made():
    """The evaluation after 75 updates is logged with the 75th step's record, number 74, and was
    drawn there."""
    assert series([{"step": 74, "eval/ema/TA/diff": 0.1}], "eval/{weights}/{component}/diff") == {
        "ema/TA": ([75], [0.1])
    }


def test_lines_of_one_chart_differ():
    """Of eight colours the ninth line had the first one's, and a step has more phases than that."""
    assert len({distinct(i) for i in range(24)}) == 24 and len(set(COLOURS)) == len(COLOURS) >= len(
        PHASES
    )
    style = source("page.css").split("@media (prefers-color-scheme: dark)")
    for mode in (style[0], style[1].split("* {")[0]):
        assert len(set(re.findall(r"--c\d+: (#\w+)", mode))) == len(COLOURS)


def test_contents_lead_to_every_section_and_the_last_one_explains_the_words(page):
    text = page.read_text()
    assert (
        re.findall(r'<a href="#([^"]+)">', text)
        == re.findall(r'<section id="([^"]+)">', text)
        != []
    )
    for term in ("EMA", "anchor", "tau", "pi", "VQ", "MQ", "TA", "best"):
        assert f"<dt>{term}</dt>" in text
    assert (
        text.index('id="before-and-after"') < text.index('id="result"') < text.index('id="words"')
    )


def test_the_best_branch_is_marked(page):
    """Advantages 1, -1, .5, -.5: the first; where all are equal none is."""
    text = page.read_text()
    assert re.findall(r'<tr class="best"><th>([^<]+)', text) == ["branch 0 "]
    assert _best([0.5, 0.5]) is None and _best([math.nan, 0.1, 0.3]) == 2 and _best([]) is None


def test_none_is_never_printed(run, no_curves):
    """An unset value of environment.json stood there as Python's None."""
    path = run / "environment.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"git_commit": None, "gpus": [None, "H100"]})
    )
    assert "None" not in text_of(write_report(run))


def test_one_set_of_weights_alone_is_no_lost_evaluation(run):
    """A record of `kvpo evaluate` without --against has nothing to compare; it was called lost."""
    (run / "evaluation/alone.json").write_text('{"label": "run:ema", "means": {}, "rows": []}')
    evaluations, problems = read_evaluations(run)
    assert (
        len(evaluations) == 1
        and "alone.json measures one set of weights alone" in problems[0]
        and "lost" not in problems[0]
    )


def test_one_bad_evaluation_does_not_hide_the_others(run):
    (run / "evaluation/online.json").write_text('{"label_a": "online"}')
    evaluations, problems = read_evaluations(run)
    assert [e.label_a for e in evaluations] == ["EMA, step 40"] and "online.json" in problems[0]


def test_only_the_newest_step_of_an_evaluation_is_shown(run):
    old = json.loads((run / "evaluation/ema.json").read_text())
    for step, label in ((20, "EMA, step 20"), (40, "online step 40"), (20, "online step 20")):
        day = f"2026-11-24 {step // 10 + 18}:00"
        (run / f"evaluation/{label}.json").write_text(
            json.dumps(old | {"label_a": label, "created": day, "scripts": ["story-0", "story-1"]})
        )
    evaluations, problems = read_evaluations(run)
    assert [e.label_a for e in evaluations] == ["online step 40", "EMA, step 40"] and not problems
    assert evaluations[0].scripts == 2


def test_samples_whose_video_is_gone_are_left_out(run):
    (run / "samples/step-000000/0-start.mp4").unlink()
    assert [s.script_id for s in read_samples(run)] == ["story-1", "story-0", "story-1"]
    shutil.rmtree(run / "samples")
    with pytest.raises(Missing, match="no sample videos"):
        read_samples(run)


def test_group_record_comes_back(finished):
    record = read_group(finished).record
    assert (
        record["plans"][-1] == [] and record["plans"][0] == [3, 4, 5, 6, 7] and record["fork"] == 5
    )
    assert record["energies"][1] is None and len(record["rewards"]["local"]["VQ"]) == BRANCHES + 1


def test_running_mean_skips_what_is_not_finite():
    assert running_mean([1.0, math.nan, 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]


def test_numbers_are_readable():
    assert [num(0.1234), num(-0.5, sign=True), num(0.00001), num(math.nan), num(123.456)] == [
        "0.123",
        "−0.500",
        "0.0000100",
        "–",
        "123",
    ]
    assert [seconds(3.21), seconds(725.0), seconds(7620.0), seconds(math.nan)] == [
        "3.2 s",
        "12 min 5 s",
        "2 h 7 min",
        "–",
    ]
