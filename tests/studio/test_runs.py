"""The pane *Runs*: the list, curves that grow, reports, and what no name leads to."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from tabs import TOKEN

from kvpo.pages.render import render
from kvpo.studio.panes import report_policy
from kvpo.studio.runs import MOST_POINTS, Runs, check_run_name, thinned


def line(step: int, **metrics) -> str:
    return json.dumps({"step": step, "unix_time": 1.0, **metrics}) + "\n"


@pytest.fixture
def client(pane_client):
    return pane_client


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "lr-1.5e-4"
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(
        "steps: 60\nexplorer: kv_routing\nobjective: {kind: rvm}\nrewards: [{name: world_vq}, {name: a/b/c, role: guard}]\n"
    )
    (folder / "metrics.jsonl").write_text(
        line(0, **{"loss/kl": 0.0, "reward/local/VQ/mean": 0.4, "optim/lr": 1.0})
        + line(1, **{"loss/kl": "NaN", "reward/local/VQ/mean": 0.5})
    )
    return folder


def test_the_list_and_the_curves_grow_with_the_files(client, run):
    """A line that is being written is left for the next look; a number that is none is no point."""
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "loss/k')
    (found,) = client.get(f"/{TOKEN}/runs").json()
    facts = {"name": "lr-1.5e-4", "step": 2, "steps": 60, "method": "rvm by kv_routing"}
    assert found.items() >= (facts | {"report": False}).items() and found["rewards"] == ["world_vq"]
    curves = client.get(f"/{TOKEN}/runs/lr-1.5e-4/curves").json()
    reward, kl = curves["charts"]
    assert reward["lines"] == [{"label": "VQ", "points": [[1, 0.4], [2, 0.5]]}]
    assert (kl["unit"], kl["lines"][0]["points"]) == ("nats", [[1, 0.0], [2, None]])
    with (run / "metrics.jsonl").open("a") as log:
        log.write('l": 0.25}\n')
    kl = client.get(f"/{TOKEN}/runs/lr-1.5e-4/curves").json()["charts"][1]
    assert kl["lines"][0]["points"][-1] == [3, 0.25]


def test_log_odds_of_a_preference_have_a_chart_of_their_own(tmp_path, run):
    """Beside a preference's log odds the guards, in [0, 1], were one flat line."""
    names = {"preference-a": -1.5, "mean_of_trained": -1.5, "VQ": 0.01}
    with (run / "metrics.jsonl").open("a") as log:
        log.write(line(2, **{f"eval/ema/{name}/diff": value for name, value in names.items()}))
    charts = {chart["title"]: chart for chart in Runs(tmp_path / "runs").curves(run.name)["charts"]}
    title = "Evaluation, difference from the start"
    guards, odds = charts[title], charts[f"{title}: preference"]
    assert [one["label"] for one in guards["lines"]] == ["VQ"] and guards["unit"] == ""
    assert {one["label"] for one in odds["lines"]} == {"preference-a", "mean_of_trained"}
    assert odds["unit"] == "log odds"


def test_a_resumed_run_cuts_its_log_and_is_read_anew(tmp_path, run):
    runs = Runs(tmp_path / "runs")
    assert len(runs.records(run.name)) == 2
    (run / "metrics.jsonl").write_text(line(0, **{"loss/kl": 0.125}))
    assert runs.records(run.name) == [{"step": 0, "loss/kl": 0.125}]


def test_lines_that_are_no_records_are_passed_over(tmp_path, run):
    (run / "metrics.jsonl").write_text(
        "no JSON\n[1]\n{}\n" + '{"step": "NaN"}\n' + "[" * 9000 + "\n" + line(3, **{"loss/kl": 1})
    )
    assert Runs(tmp_path / "runs").records(run.name) == [{"step": 3, "loss/kl": 1.0}]
    for strange in (
        "[:",
        "steps: many\nobjective: x\nrewards: 3",
        "rewards: [3, {name: [1]}]",
        "7",
    ):
        (run / "config.resolved.yaml").write_text(strange)
        facts = Runs(tmp_path / "runs").facts(run.name)
        assert (facts["steps"], facts["method"]) == (None, "tve_ppo by kv_routing")


def test_a_long_run_is_thinned_and_keeps_its_last_point():
    points = thinned(list(range(3001)), [0.0] * 3000 + [float("inf")])
    assert len(points) <= MOST_POINTS + 1 and points[-1] == [3000, None] and points[0] == [0, 0.0]
    assert thinned([], []) == []


def test_folders_that_are_no_runs_are_not_listed(client, tmp_path, run):
    (tmp_path / "runs" / "studio").mkdir()
    (tmp_path / "runs" / "link").symlink_to(run)
    (tmp_path / "runs" / ".hidden").symlink_to(run)
    assert [found["name"] for found in client.get(f"/{TOKEN}/runs").json()] == [run.name]
    run.joinpath("metrics.jsonl").unlink()
    assert client.get(f"/{TOKEN}/runs/{run.name}/curves").json()["charts"] == []
    assert Runs(tmp_path / "none").listed() == []


def test_a_run_that_can_not_be_read_hides_no_other(client, tmp_path, run):
    """One link among the files of one run ended the whole list in an error."""
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.resolved.yaml").write_text("steps: 1\n")
    (broken / "metrics.jsonl").symlink_to(run / "metrics.jsonl")
    found = {facts["name"]: facts for facts in client.get(f"/{TOKEN}/runs").json()}
    assert found[run.name]["step"] == 2 and "is a link" in found["broken"]["fault"]


def test_a_report_is_served_with_its_own_policy(client, run):
    """It may run the script that this program writes into reports, and nothing else."""
    assert client.get(f"/{TOKEN}/runs/{run.name}/report.html").status_code == 404
    (run / "report.html").write_text("<!doctype html><p>report")
    answer = client.get(f"/{TOKEN}/runs/{run.name}/report.html")
    assert answer.text == "<!doctype html><p>report" and "attachment" not in str(answer.headers)
    policy = answer.headers.get_list("content-security-policy")
    assert policy == [report_policy()] and "sandbox allow-scripts" in policy[0]
    values = {
        "title": "t",
        "kicker": "k",
        "name": "n",
        "facts": "f",
        "written": "w",
        "command": "c",
    }
    text = render("report.html", **values, warnings=[], sections=[])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy[0]


@pytest.mark.parametrize(
    "name", ["..", ".", "../runs", "a/b", "", ".git", "a" * 129, "a\n", "a\0", None, 3, "~", "-x"]
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="no name of a run"):
        check_run_name(name)


@pytest.mark.parametrize("what", ["curves", "report.html"])
@pytest.mark.parametrize("name", ["..", "..%2fruns%2flr-1.5e-4", "%2e%2e", "none", "link", "a%00"])
def test_no_path_leads_out_of_the_folder(client, tmp_path, run, name, what):
    """Nor does a link, to a folder or to a file, which a folder from elsewhere may hold."""
    (tmp_path / "report.html").write_text("secret")
    (tmp_path / "metrics.jsonl").write_text(line(0))
    (tmp_path / "runs" / "link").symlink_to(tmp_path)
    answer = client.get(f"/{TOKEN}/runs/{name}/{what}")
    assert answer.status_code in (403, 404) and "secret" not in answer.text
    for file in ("report.html", "metrics.jsonl"):
        (run / file).unlink(missing_ok=True)
        (run / file).symlink_to(tmp_path / file)
    answer = client.get(f"/{TOKEN}/runs/{run.name}/{what}")
    assert answer.status_code == 404 and "secret" not in answer.text


@pytest.mark.parametrize("path", ["runs", "runs/a/curves", "runs/a/report.html", "learn"])
def test_strangers_read_nothing(client, path):
    assert client.get(f"/wrong/{path}").status_code == 403
    foreign = {"origin": "http://evil.example"}
    assert client.get(f"/{TOKEN}/{path}", headers=foreign).status_code == 403
