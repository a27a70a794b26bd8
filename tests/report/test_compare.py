"""`kvpo compare`: gains, cost and settings of several runs, from their folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kvpo.commands import main as cli
from kvpo.common.video import write_mp4
from kvpo.report.compare import read_runs, setting_differences, text_table, warnings

ROWS = (("mean of trained", "train"), ("identity", "heldout"), ("world_facts", "guard"))


def write_run(
    folder: Path, gains: dict[int, float], kind: str | None = "nft", lr: float = 1e-5, seed: int = 0
) -> Path:
    """A run's folder with what a comparison reads: two evaluated steps of ten seconds each."""
    objective = {"kind": kind} if kind else {"kl_beta": 1.0}
    config = {"objective": objective, "optimizer": {"lr": lr}, "steps": 2, "seed": 0}
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": s, "unix_time": 0.0, "time/total": 10.0, "calls/generator": 7} for s in (0, 1)
    ]
    lines.append({"step": 1, "unix_time": 0.0, "eval/ema/identity": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, gain in gains.items():
        rows = [
            {"component": name, "kind": of, "a": 0.5 + gain, "b": 0.5, "diff": gain, "win": 0.75}
            | {"low": gain - 0.01, "high": gain + 0.01, "n": 32}
            for name, of in ROWS
        ]
        found = {"label_a": f"ema step {step}", "label_b": "start", "scripts": ["s1", "s2"]}
        path = folder / f"evaluation/ema-step-{step:06d}.json"
        path.write_text(json.dumps(found | {"seed": seed, "rows": rows}))
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [
        write_run(tmp_path / "a", {1: 0.02, 2: 0.05}),
        write_run(tmp_path / "b", {2: -0.03}, kind=None, lr=2e-5),
    ]


def test_gains_and_cost_are_those_of_the_last_evaluation(two):
    a, b = read_runs(two)
    assert (a.method, b.method) == ("nft by kv_routing", "tve_ppo by kv_routing")
    assert (a.last.step, a.last.rows["identity"].diff, len(a.gains)) == (2, 0.05, 2)
    assert (a.seconds, a.calls, a.clock) == (20.0, 14.0, {1: 10.0, 2: 20.0})
    head, first, second = text_table([a, b]).splitlines()
    assert re.split(r"  +", head)[:3] == ["run", "method", "updates"]
    assert "+0.0500 [+0.0400, +0.0600]" in first and "−0.0300 [−0.0400, −0.0200]" in second


def test_only_settings_that_differ_are_listed(two):
    found = dict(setting_differences(read_runs(two)))
    assert found["optimizer.lr"] == ["1e-05", "2e-05"]
    assert found["objective.kind"] == ['"nft"', "–"]
    assert not {"steps", "seed"} & {*found}


def test_evaluations_of_other_scripts_are_warned_of(two, tmp_path):
    assert not any("different scripts" in line for line in warnings(read_runs(two)))
    other = write_run(tmp_path / "c", {2: 0.1}, seed=1)
    assert any("different scripts" in line for line in warnings(read_runs([*two, other])))


def test_the_page_has_everything_inside(two, tmp_path, capsys):
    for folder in two:
        samples = folder / "samples/step-000002"
        samples.mkdir(parents=True)
        write_mp4(samples / "ema-00.mp4", torch.zeros(8, 3, 32, 32, dtype=torch.uint8), 8.0)
        entry = {"file": "ema-00.mp4", "script_id": "s1", "texts": ["a < b"], "starts": [0]}
        entry |= {"blocks": 2, "seed": 0, "which": "ema"}
        (samples / "index.json").write_text(json.dumps([entry]))
    out = tmp_path / "compare.html"
    assert cli.main(["compare", *map(str, two), "--out", str(out)]) == 0
    assert "written to" in capsys.readouterr().out
    text = out.read_text()
    assert text.count("<video") == 2 and "a &lt; b" in text and "optimizer.lr" in text
    assert "Gain against minutes of training" in text and not re.search(r'src="(?!data:)', text)


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (["a"], "1 run can not be compared with itself"),
        (["a", "a"], "is given twice"),
        (["a", "nowhere"], "is no run's folder"),
        (["a", "young"], "has no evaluation of its trained weights"),
    ],
)
def test_what_can_not_be_compared(two, tmp_path, capsys, folders, reason):
    write_run(tmp_path / "young", {})
    code = cli.main(["compare", *(str(tmp_path / f) for f in folders)])
    assert code == 1 and reason in capsys.readouterr().err


def test_its_help_needs_no_network():
    script = "import sys; from kvpo.commands.main import main; main(['compare', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
