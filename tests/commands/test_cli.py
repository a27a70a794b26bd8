"""The command line: every option in the help, every mistake in one line, and the right exit
code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from test_align import align, settings, write_recipe
from tiny import BLUE, GEOMETRY, RED, save_pipeline, story

from kvpo.commands import main as cli
from kvpo.commands.explore import shared_forks, widest_fork
from kvpo.commands.settings import Settings
from kvpo.common.progress import Progress
from kvpo.config import RunConfig
from kvpo.method.prompt_explorer import PromptExplorer
from kvpo.method.routing import KVRouting
from kvpo.runs.loading import load_generator


def options(kind: type, prefix: str = "") -> list[str]:
    """--optimizer.lr ... of all settings, from the dataclasses themselves."""
    found, hints = [], get_type_hints(kind)
    for field in fields(kind):
        name = prefix + field.name.replace("_", "-")
        found += (
            options(hints[field.name], f"{name}.")
            if is_dataclass(hints[field.name])
            else [f"--{name.rstrip('-')}"]
        )
    return found


def run(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


# --- Help and usage ---


def test_a_reader_that_has_seen_enough_is_no_error():
    """`kvpo --help | head -1` once ended in a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "kvpo", "--help"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("argv", [("--help",), ("-h",)])
def test_help_lists_the_commands(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0 and all(
        f"  {name} " in out and summary in out for name, summary in cli.COMMANDS.items()
    )


def test_no_command(capsys):
    code, out, err = run(capsys)
    assert code == 2 and not out and err.startswith("usage: kvpo COMMAND")


@pytest.mark.parametrize(
    ("name", "near"), [("alin", "align"), ("evalute", "evaluate"), ("reprot", "report")]
)
def test_a_mistyped_command(capsys, name, near):
    code, _, err = run(capsys, name, "mini")
    assert code == 2 and f"there is no command {name!r}; did you mean {near}?" in err


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_mentions_every_option(capsys, name):
    code, out, _ = run(capsys, name, "--help-all")
    command = cli.find(name)
    hints = get_type_hints(command, include_extras=True)
    wanted = [
        f"--{f.name.replace('_', '-')}"
        for f in fields(command)
        if hints[f.name] != Settings and f.name not in (*positional(command), "do")
    ]
    if Settings in hints.values():
        wanted += [
            o for o in options(RunConfig) if not o.startswith(("--rewards", "--advantages.weights"))
        ]
    assert code == 0 and not [o for o in wanted if o not in out]
    assert ("positional arguments" in out) == bool(positional(command))


@pytest.mark.parametrize("name", ["align", "plan", "doctor", "explore"])
def test_help_fits_two_screens(capsys, name):
    """`kvpo align --help` had 750 lines, its own three options among ninety of the recipe's."""
    code, out, _ = run(capsys, name, "longlive", "--help")
    command, hints = cli.find(name), get_type_hints(RunConfig)
    sections = [f.name for f in fields(RunConfig) if is_dataclass(hints[f.name])]
    own = [f.name for f in fields(command) if f.name not in (*positional(command), "settings")]
    wanted = [f"--{option.replace('_', '-')}" for option in (*own, "help")]
    assert code == 0 and len(out.splitlines()) < 90 and "--optimizer.eps" not in out
    assert not [text for text in (*wanted, *(f"  --{s}.* " for s in sections)) if text not in out]
    assert "kvpo config show longlive lists them" in out and f"kvpo {name} --help-all" in out


def test_help_of_a_recipe_that_is_not_there(capsys):
    assert run(capsys, "align", "minni", "--help")[::2] == run(capsys, "align", "minni")[::2]


def positional(command: type) -> list[str]:
    return [
        f.name
        for f in fields(command)
        if f.name
        in (
            "recipe",
            "generator",
            "run",
            "runs",
            "out",
            "paths",
            "a",
            "b",
            "name",
            "answers",
            "action",
        )
        and str(f.type).startswith("Positional")
    ]


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (("align", "RECIPE", "--optimizer.lrr", "1"), "--optimizer.lr"),
        (("align", "RECIPE", "--step", "1"), "--steps"),
        (("evaluate", "--agianst", "mini"), "--against"),
        (("generate", "--promt", "x"), "--prompt"),
    ],
)
def test_a_mistyped_option_gets_a_suggestion(capsys, tmp_path, folder, argv, near):
    recipe = write_recipe(tmp_path / "tiny.yaml", settings(folder))
    code, out, err = run(capsys, *(recipe if a == "RECIPE" else a for a in argv))
    assert code == 2 and near in out + err


@pytest.mark.parametrize(
    "argv", [("--steps", "many"), ("--sampler", "euler"), ("--policy.train", "all")]
)
def test_a_value_of_the_wrong_kind(capsys, tmp_path, folder, argv):
    recipe = write_recipe(tmp_path / "tiny.yaml", settings(folder))
    code, out, err = run(capsys, "align", recipe, "--out", str(tmp_path / "run"), *argv)
    assert code == 2 and argv[1] in out + err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--explorer", "start_noise"),
            "objective tve_ppo can not be paired with explorer start_noise and sampler renoise",
        ),
        (
            ("--rollout.branches", "1"),
            "rollout.branches = 1, but a group compares at least 2 branches",
        ),
        (
            ("--rollout.branches", "0"),
            "rollout.branches = 0, but a group compares at least 2 branches",
        ),
        (("--steps", "0"), "steps = 0 must be 1 or more"),
    ],
)
def test_an_illegal_value(capsys, tmp_path, folder, argv, message):
    recipe = write_recipe(tmp_path / "tiny.yaml", settings(folder))
    code, out, err = run(capsys, "align", recipe, "--out", str(tmp_path / "run"), *argv)
    assert (
        code in (1, 2)
        and message in " ".join((out + err).replace("│", " ").split())
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("align", "minni"), "kvpo align: there is no recipe 'minni'; shipped are "),
        (("config", "show", "minni"), "kvpo config: there is no recipe 'minni'; shipped are "),
        (("doctor", "minni"), "kvpo doctor: there is no recipe 'minni'"),
        (("report", "nowhere"), "kvpo report: nowhere is no run folder"),
        (("generate", "nowhere", "--prompt", RED), "kvpo generate: nowhere is no pipeline folder"),
        (
            ("generate", "nowhere"),
            "kvpo generate: one of --prompt and --prompts is needed; give either --prompt",
        ),
        (
            ("generate", "mini", "--prompt", RED, BLUE, "--blocks", "1"),
            "kvpo generate: 2 segments in a video of 1 block: ",
        ),
        (
            ("evaluate", "nowhere:ema", "--scripts", "2"),
            "kvpo evaluate: nowhere:ema is no pipeline folder",
        ),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 1 and err.startswith(message) and len(err.strip().splitlines()) == 1


def test_a_recipe_that_is_wrong(capsys, tmp_path):
    path = write_recipe(tmp_path / "bad.yaml", {"optimizer": {"lrr": 1}})
    assert run(capsys, "align", path)[::2] == (
        1,
        f"kvpo align: {path}: unknown key optimizer.lrr; did you mean optimizer.lr?\n",
    )


def test_a_run_says_in_one_line_what_it_will_do(capsys, tmp_path, folder):
    """The output of a run that goes into a file began with its end."""
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder, steps=1))
    assert align(recipe, tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0][9:]
        == f"kvpo align {recipe} in {tmp_path / 'run'} on cpu: 1 step of 1 group with 3 branches, videos of 6 blocks, evaluated at the end, saved every 1 step"
    )
    assert (
        lines[1][9:].startswith("step 1/1  Change ")
        and "  Warmth " in lines[1]
        and lines[-1].startswith("report: ")
    )


def test_interrupted(capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.find("report"), "__call__", stop)
    assert run(capsys, "report", "x") == (130, "", "kvpo report: interrupted\n")


# --- The commands, on the tiny generator ---


def test_generate(capsys, tmp_path, folder):
    code, out, _ = run(
        capsys,
        "generate",
        str(folder),
        "--prompt",
        RED,
        BLUE,
        "--blocks",
        "4",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    )
    assert code == 0 and (tmp_path / "000.mp4").stat().st_size > 500 and f"{RED} | {BLUE}" in out
    head = f"kvpo generate {folder} on cpu: 1 video, 4 blocks in all, into {tmp_path}"
    assert out.splitlines()[0][9:] == head


def test_generate_from_a_file(capsys, tmp_path, folder):
    (tmp_path / "p.txt").write_text(f"{RED}\n{BLUE}\n")
    code, *_ = run(
        capsys,
        "generate",
        str(folder),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--blocks",
        "2",
        "--out",
        str(tmp_path / "videos"),
        "--sampler",
        "ode",
    )
    assert code == 0 and sorted(p.name for p in (tmp_path / "videos").iterdir()) == [
        "000.json",
        "000.mp4",
        "001.json",
        "001.mp4",
    ]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A short run and its recipe."""
    home = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        home / "tiny.yaml", settings(folder, steps=1, policy={"train": "lora", "rank": 2})
    )
    assert align(recipe, home / "run") == 0
    return home / "run", recipe


def test_weights_of_a_run_by_name(trained, folder):
    run_folder, _ = trained
    start, online, ema = (
        load_generator(f"{run_folder}:{which}")[0].generator for which in ("start", "online", "ema")
    )
    base, label = load_generator(str(folder))
    x, text = torch.ones(1, 2, 4, 4, 4), base.encode_text([RED])
    v = [m.velocity(x, 0.5, text, [0, 1]).detach() for m in (base.generator, start, online, ema)]
    assert torch.equal(v[0], v[1]) and not torch.equal(v[1], v[2]) and not torch.equal(v[2], v[3])
    assert load_generator(str(run_folder))[1] == "run:ema step-000001" and label == str(folder)
    with pytest.raises(
        ValueError, match="names weights 'emma' of a run; choose one of ema, online, start"
    ):
        load_generator(f"{run_folder}:emma")


def test_a_run_without_a_checkpoint(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        load_generator(str(tmp_path / "run"))


def test_evaluate_against(capsys, tmp_path, trained, folder):
    run_folder, recipe = trained
    code, out, _ = run(
        capsys,
        "evaluate",
        str(run_folder),
        "--against",
        str(folder),
        "--recipe",
        recipe,
        "--scripts",
        "3",
        "--out",
        str(tmp_path / "e.json"),
    )
    record = json.loads((tmp_path / "e.json").read_text())
    assert code == 0 and "mean of trained" in out and "3 scripts, 1 video of each, seed 1000" in out
    assert [r["component"] for r in record["rows"]] == [
        "mean of trained",
        "Warmth",
        "Change",
    ] and record["rows"][1]["n"] == 3
    assert set(record["values"]) == set(record["values_against"]) == {"Warmth", "Change"}


def test_evaluate_alone(capsys, tmp_path, trained, folder):
    code, out, _ = run(
        capsys,
        "evaluate",
        str(folder),
        "--recipe",
        trained[1],
        "--scripts",
        "2",
        "--out",
        str(tmp_path / "e.json"),
    )
    assert f" kvpo evaluate {folder} on cpu: 2 scripts, 1 video of each" in out.splitlines()[0]
    record = json.loads((tmp_path / "e.json").read_text())
    assert (
        code == 0
        and set(record["means"]) == {"mean of trained", "Warmth", "Change"}
        and "95 % interval" in out
    )
    assert [len(values) for values in record["values"].values()] == [2, 2] and len(
        record["scripts"]
    ) == 2


def explored(out, name: str) -> dict:
    return json.loads((out / name / "groups" / "step-000000" / "group.json").read_text())


def test_explorers_that_are_compared_leave_the_story_at_one_block(capsys, tmp_path, trained):
    """`--by start_noise` once drew another fork than the routing it was to be compared with, and
    overwrote its files."""
    for by in ("recipe", "start_noise"):
        assert run(capsys, "explore", trained[1], "--by", by, "--out", str(tmp_path))[0] == 0
    routed, noisy = (explored(tmp_path, f"script-0-{by}") for by in ("kv_routing", "start_noise"))
    assert routed["fork"] == noisy["fork"] and routed["window_blocks"] == noisy["window_blocks"]
    assert any(routed["plans"]) and not any(noisy["plans"])


def test_an_explorer_of_switches_is_shown_at_one(capsys, tmp_path, folder):
    """`--by prompt` tried blocks of the recipe's explorer, rolled out a group at each, and refused
    the best of them because no prompt begins there."""
    data = {"prompts": str(tmp_path / "two.jsonl"), "blocks": 6, "segments": 2, "switches": [4]}
    (tmp_path / "two.jsonl").write_text(json.dumps({"prompts": [RED, BLUE]}) + "\n")
    recipe = write_recipe(tmp_path / "s.yaml", settings(folder, data=data))
    code, out, err = run(capsys, "explore", recipe, "--by", "prompt", "--out", str(tmp_path))
    assert code == 0, err
    assert explored(tmp_path, "script-0-prompt")["fork"] == 4 and "by block 4: " in out


def test_shared_forks_are_those_of_both():
    script, routing = story(9, 1, 6), KVRouting(window_blocks=2)
    at_switches = PromptExplorer(window_blocks=2)
    assert shared_forks(routing, at_switches, script, GEOMETRY) == [6]
    with pytest.raises(ValueError, match=r"shown at \[1\]: there is no block for both"):
        shared_forks(routing, at_switches, story(9, 1), GEOMETRY)


def test_the_fork_that_is_shown_is_the_most_telling_of_a_few():
    """The README's story showed nine equal pictures: its objects were behind the pillar
    throughout the window drawn."""
    quiet = Progress(quiet=True)
    seen = {4: 0.0, 5: 0.0, 6: 0.02, 7: 0.01, 8: 0.0, 9: 0.5}
    best, said = widest_fork(list(seen), 3, seen.__getitem__, quiet)
    assert best == 6 and "4: 0, 6: 0.02, 8: 0" in said
    assert widest_fork([4, 5], 9, seen.__getitem__, quiet)[0] == 4, (
        "no more tries than forks; of equals the first"
    )
    with pytest.raises(ValueError, match="--tries 0 must be 1 or more"):
        widest_fork([4], 0, seen.__getitem__, quiet)


@pytest.mark.parametrize("by", ["recipe", "start_noise"])
def test_explore(capsys, tmp_path, trained, by):
    code, out, _ = run(capsys, "explore", trained[1], "--by", by, "--out", str(tmp_path))
    group = explored(
        tmp_path, "script-0-start_noise" if by == "start_noise" else "script-0-kv_routing"
    )
    assert code == 0 and "branch 2" in out and "anchor" in out and len(group["plans"]) == 4
    assert f" kvpo explore {trained[1]} with " in out.splitlines()[0]
    if by == "start_noise":
        assert group["pi"] == pytest.approx([1 / 3] * 3) and "other noise" in out


def test_explore_judges_as_training_does(capsys, tmp_path, folder):
    """A recipe's rewards bring their own weights; `explore` once counted all of them 1."""
    recipe = write_recipe(
        tmp_path / "w.yaml",
        settings(
            folder,
            rewards=[
                {"name": "tiny:Warmth", "weight": 0.0},
                {"name": "tiny:Change", "weight": 0.0},
            ],
        ),
    )
    code, _, _ = run(capsys, "explore", recipe, "--out", str(tmp_path))
    group = explored(tmp_path, "script-0-kv_routing")
    assert (
        code == 0
        and group["advantages"] == [0.0] * 3
        and len(set(group["rewards"]["local"]["Warmth"])) > 1
    )


def test_explore_refuses_branches_that_would_all_be_the_anchor(capsys, tmp_path, folder):
    """`--by renoise` on a recipe with the ode sampler, which draws no noise behind a step, showed
    the anchor several times over and called it branches. `--tries 0` was found out after the
    generator had been loaded."""
    recipe = write_recipe(tmp_path / "o.yaml", settings(tmp_path / "no generator", sampler="ode"))
    code, _, err = run(capsys, "explore", recipe, "--by", "renoise", "--out", str(tmp_path / "e"))
    assert code == 1 and "every branch would be the anchor; use sampler renoise" in err
    code, _, err = run(capsys, "explore", recipe, "--tries", "0", "--out", str(tmp_path / "e"))
    assert code == 1 and "--tries 0 must be 1 or more" in err
    assert not (tmp_path / "e").exists()


def test_explore_names_what_exists(capsys, trained):
    code, _, err = run(capsys, "explore", trained[1], "--script", "9")
    assert (
        code == 1 and "--script 9 does not exist: the recipe has evaluation scripts 0 to 1" in err
    )
    code, _, err = run(capsys, "explore", trained[1], "--fork", "1")
    assert code == 1 and "block 1 can not be a fork of script" in err


def test_report(capsys, trained):
    run_folder, _ = trained
    (run_folder / "report.html").unlink()
    code, out, _ = run(capsys, "report", str(run_folder))
    assert (
        code == 0
        and out.strip() == f"report: {(run_folder / 'report.html').resolve()}"
        and (run_folder / "report.html").stat().st_size > 10_000
    )


@pytest.mark.parametrize("train", ["full", "lora"])
def test_doctor(capsys, tmp_path, folder, train):
    """All invariants hold on the tiny generator, each with its number; nothing is left in the
    working folder."""
    recipe = write_recipe(tmp_path / "d.yaml", settings(folder, policy={"train": train, "rank": 2}))
    before = set(Path.cwd().iterdir())
    code, out, err = run(capsys, "doctor", recipe)
    assert code == 0 and "all invariants hold" in out and "FAILED" not in out and not err.strip()
    assert out.count("\nok ") >= 9 and set(Path.cwd().iterdir()) == before


def test_doctor_of_branches_that_have_no_energy(capsys, tmp_path, folder):
    """The unrouted policy makes branches of other noise itself, so their energies are 0 and
    rounding. The doctor asked them to differ, and to agree to a part in ten thousand of nothing:
    every recipe of nft with start_noise was called broken."""
    noisy = settings(folder, objective={"kind": "nft"}, explorer="start_noise")
    recipe = write_recipe(tmp_path / "d.yaml", noisy | {"start_noise": {"window_blocks": 2}})
    code, out, err = run(capsys, "doctor", recipe)
    assert code == 0 and "all invariants hold" in out and not err.strip()
    assert "branches of other noise, replayed: largest energy" in out


def test_doctor_says_what_fails(capsys, tmp_path, folder, monkeypatch):
    """A policy whose later replays are off by a little: the doctor must see it, say where, and
    fail."""
    from kvpo.method.replay import Replay

    energies = Replay.energies
    monkeypatch.setattr(
        Replay,
        "energies",
        lambda self: energies(self) + 1e-3 * (self.members.rows_per_pass == 1) + 1e-6,
    )
    recipe = write_recipe(tmp_path / "d.yaml", settings(folder))
    code, out, err = run(capsys, "doctor", recipe)
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert code == 1 and "some invariants do not hold" in err
    assert len(failed) == 2 and "energy" in failed[0] and "one velocity at a time" in failed[1]


def diagnosed(capsys, recipe: str) -> dict[str, bool]:
    """Name of every line of the doctor -> whether it holds."""
    _, out, _ = run(capsys, "doctor", recipe)
    return {line[8:66].rstrip(): line.startswith("ok ") for line in out.splitlines()[:-1]}


def _break_page(monkeypatch):
    from kvpo.generators import attention

    store = attention.store
    monkeypatch.setattr(
        attention, "store", lambda pages, row, slots, x: store(pages, row, slots, 1.01 * x)
    )


def _break_eviction(monkeypatch):
    """Once pages run out, a new frame takes the sink's in place of the oldest frame's."""
    from kvpo.generators.cache import FrameCache

    free = FrameCache._free_slot
    monkeypatch.setattr(
        FrameCache, "_free_slot", lambda self, frames: free(self, frames) * (not self.evicted)
    )


def _break_rotary_offset(monkeypatch):
    """Positions that begin anew in every block: right for one block, wrong for its past."""
    from kvpo.generators import causal_wan

    angles = causal_wan.frame_angles
    monkeypatch.setattr(
        causal_wan, "frame_angles", lambda rope, frames, grid: angles(rope, frames % 2, grid)
    )


@pytest.mark.parametrize("damage", [_break_page, _break_eviction, _break_rotary_offset])
def test_doctor_sees_a_past_that_is_not_the_uncached_one(
    capsys, tmp_path, folder, monkeypatch, damage
):
    """Once the cache was never read for this line: one block without a past holds whatever is
    wrong with pages."""
    damage(monkeypatch)
    lines = diagnosed(capsys, write_recipe(tmp_path / "d.yaml", settings(folder)))
    assert lines["one block without a past == the stock model's forward"]
    assert not lines["a block read through the cache == one uncached forward"]


def test_doctor_knows_a_memory_bank(capsys, tmp_path):
    """Prototypes are read twice where the window holds their frame too, and by every head
    whatever `bank_keep` says."""
    folder = save_pipeline(tmp_path / "p", bank=3, bank_every=1, bank_keep=2)
    assert all(
        diagnosed(
            capsys,
            write_recipe(
                tmp_path / "d.yaml", settings(folder, rollout={"branches": 3, "cache_frames": 12})
            ),
        ).values()
    )


def _break_lookup(monkeypatch):
    """The first row of a group reads another page than it asked for."""
    from kvpo.generators.cache import FrameCache

    find = FrameCache.find

    def wrong(self, frames, batch, rows=None):
        found = find(self, frames, batch, rows)
        if self.parent is not None and batch == 4:
            found[0][2][0] += 1
        return found

    monkeypatch.setattr(FrameCache, "find", wrong)


def _break_prefix(monkeypatch):
    """A branch that commits changes one number of the prefix, by a little."""
    from kvpo.generators.causal_wan import CausalWan

    commit = CausalWan.commit

    def careless(self, clean, text, frames, cache, *args, **kwargs):
        if cache.parent is not None:
            cache.parent.v[-1][0, 0, 0, 0, 0] *= 1.0 + 1e-6
        return commit(self, clean, text, frames, cache, *args, **kwargs)

    monkeypatch.setattr(CausalWan, "commit", careless)


@pytest.mark.parametrize("damage", [_break_lookup, _break_prefix])
def test_doctor_sees_a_prefix_that_is_not_the_same_in_all_rows(
    capsys, tmp_path, folder, monkeypatch, damage
):
    damage(monkeypatch)
    lines = diagnosed(capsys, write_recipe(tmp_path / "d.yaml", settings(folder)))
    assert not lines["pages of the prefix that a row reads otherwise than left"]


@pytest.mark.parametrize("which", ["rows", "state"])
def test_doctor_sees_a_decoder_that_goes_on_from_another_prefix(
    capsys, tmp_path, folder, monkeypatch, which
):
    """In one row from an empty state; or in all rows, of the second set, from what the first has
    left."""
    from kvpo.generators.streaming import StreamingDecoder

    fork = StreamingDecoder.fork

    def wrong(self, rows):
        other = fork(self, rows)
        if which == "rows":
            other._cache = other._each(
                lambda x: x * torch.arange(len(x)).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
            )
        else:
            self._each(lambda x: x.mul_(0.5))
        return other

    monkeypatch.setattr(StreamingDecoder, "fork", wrong)
    lines = diagnosed(capsys, write_recipe(tmp_path / "d.yaml", settings(folder)))
    assert [name for name, holds in lines.items() if not holds] == [
        "rows decoded on from the prefix: equal latents differ by"
    ]


def test_doctor_sees_a_gradient_that_is_wrong_by_a_factor(capsys, tmp_path, folder, monkeypatch):
    """Once every group was clipped, gradients were compared after the clip, which makes any
    factor equal."""
    from kvpo.method.replay import Replay

    passes = Replay.passes

    def doubled(self):
        for branch, share in passes(self):
            yield branch, share if self.single_pass else 2 * share - share.detach()

    monkeypatch.setattr(Replay, "passes", doubled)
    code, out, _ = run(
        capsys,
        "doctor",
        write_recipe(tmp_path / "d.yaml", settings(folder, optimizer={"clip": 1e-6})),
    )
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert code == 1 and len(failed) == 1 and "a few velocities at a time" in failed[0]
