"""Rewards in a process of their own: what is said over the wire, and everything that can go
wrong on the other side."""

from __future__ import annotations

import ast
import hashlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kvpo.common.rng import stream
from kvpo.mini.rewards.heldout import AttributeAgreement
from kvpo.rewards.base import VideoBatch, check_output
from kvpo.rewards.isolated import environments as reward_env
from kvpo.rewards.isolated import wire
from kvpo.rewards.isolated.environments import ENVS, create, python_of, shipped, table
from kvpo.rewards.isolated.reward import WORKER, Isolated, scorer_file, spec_of

TOY = """
    import importlib.util, os, signal, subprocess, sys, time
    import numpy as np

    assert importlib.util.find_spec("opticalflow") is None  # kvpo's own files do not stand in for packages

    print("noise while the library is imported")
    os.write(1, b"and from below Python")
    SPEC = {"name": "toy", "family": "toy", "bounds": (0, None), "needs_prompt": False}

    class Toy:
        weights = __file__

        def __init__(self, device, gain):
            self.device, self.gain = device, gain

        def to(self, device):
            self.device = device

        def score(self, frames, fps, prompts, history):
            print("noise while scoring", flush=True)
            todo = prompts[0].split()[0]
            if todo == "crash":
                os._exit(3)
            if todo == "segfault":
                print("about to", "fall", sep="\\r", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGSEGV)
            if todo == "once":  # breaks at the first call ever: the file says so
                try:
                    open(prompts[0].split()[1], "x")
                    os._exit(4)
                except FileExistsError:
                    pass
            if todo in ("child", "hang"):
                open(prompts[0].split()[1], "w").write(str(os.getpid()) + " " + str(subprocess.Popen(["sleep", "60"]).pid))
                time.sleep(60 if todo == "hang" else 0)
            if todo == "raise":
                raise KeyError("no such token")
            if todo == "exit":
                sys.exit("a library ended the process")
            scores = self.gain * frames.astype(np.float32).mean(axis=(1, 2, 3, 4))
            scores = {"nan": [float("nan")] * len(scores), "none": [None, *scores[1:]], "few": scores[1:], "text": ["good"] * len(scores)}.get(todo, scores)
            return {"scores": scores, "parts": {"prompt": [float(len(p)) for p in prompts], "earlier": [len(h) for h in history], "fps": [fps] * len(prompts)}}

    def load(device, gain=1.0):
        return Toy(device, gain)
"""


def clips(*values: int, prompt: str = "a red circle", frames: int = 4) -> VideoBatch:
    pixels = torch.stack([torch.full((frames, 3, 8, 8), v, dtype=torch.uint8) for v in values])
    return VideoBatch(pixels, 16.0, (prompt,) * len(values), (("before", "earlier"),) * len(values))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(textwrap.dedent(TOY))
    return path


@pytest.fixture(scope="module")
def reward(toy):
    """One worker for all tests that leave it whole, or that it outlives."""
    reward = Isolated(str(toy), {"gain": 0.1})
    reward.load("cpu")
    yield reward
    reward.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids: int, seconds: float = 8.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


# --- On the wire ---


def test_a_message_by_hand():
    frames = np.arange(6, dtype=np.uint8).reshape(1, 1, 3, 1, 2)
    sent = b"".join(wire.pack({"a": "é\n"}, frames))
    assert sent == b"KVPO" + (17).to_bytes(4, "big") + (6).to_bytes(
        8, "big"
    ) + b'{"a": "\\u00e9\\n"}' + bytes(range(6))
    assert wire.read(io.BytesIO(sent)) == ({"a": "é\n"}, bytes(range(6)))


def test_every_float32_comes_back_as_it_was():
    bits = (
        torch.randint(0, 2**31 - 1, (2000,), generator=stream(1, "floats"), dtype=torch.int64)
        .numpy()
        .astype(np.uint32)
    )
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    header, _ = wire.read(io.BytesIO(b"".join(wire.pack({"scores": [float(v) for v in values]}))))
    assert (
        np.array(header["scores"], dtype=np.float32).view(np.uint32) == values.view(np.uint32)
    ).all()


@pytest.mark.parametrize(
    ("data", "error", "reason"),
    [
        (b"", EOFError, "has ended"),
        (b"KVPO\0\0", EOFError, "10 bytes before the end"),
        (b"Loading weights: 100%", ValueError, "not a message, it begins with b'Loading weights:'"),
        (wire.PREFIX.pack(b"KVPO", 90, 2**40), ValueError, "1048576 \\+ 1000 are taken"),
        (wire.PREFIX.pack(b"KVPO", 3, 0) + b"NaN", ValueError, "holds NaN"),
        (wire.PREFIX.pack(b"KVPO", 2, 0) + b"[]", ValueError, "must be a JSON object"),
        (wire.PREFIX.pack(b"KVPO", 2, 0) + b"{]", ValueError, "Expecting"),
    ],
)
def test_what_is_no_message(data, error, reason):
    with pytest.raises(error, match=reason):
        wire.read(io.BytesIO(data), 1000)


@pytest.mark.parametrize(
    ("shape", "count"),
    [([1, 1, 3, 2, 2], 11), ([3, 2, 2], 12), ([1, 3, 1, 2, 2], 12), ([-1, -1, 3, 2, 2], 12)],
)
def test_frames_that_are_none(shape, count):
    with pytest.raises(ValueError, match="are no frames"):
        wire.frames_of({"shape": shape}, bytes(count))


@pytest.mark.parametrize("path", [WORKER, WORKER.with_name("wire.py")], ids=lambda p: p.name)
def test_an_old_environment_can_run_it(path):
    """Python 3.8 reads it, and before a reward is loaded it imports nothing but the standard
    library and numpy."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {
        name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names
    } | {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported and {name.partition(".")[0] for name in imported} <= {
        *sys.stdlib_module_names,
        "numpy",
        "wire",
    }


# --- A worker ---


def test_scores_parts_and_what_is_told(reward, toy):
    """Mean brightness x 0.1 in float32, whatever the scorer prints; versions and weights of the
    other side."""
    batch = clips(10, 200, prompt='écran "à\n日本" \U0001f534')
    output = check_output(reward.spec, batch, reward.score(batch))
    assert (
        output.scores.tolist()
        == torch.tensor([np.float32(0.1 * 10), np.float32(0.1 * 200)]).tolist()
        and output.valid.all()
    )
    assert {name: values.tolist() for name, values in output.parts.items()} == {
        "prompt": [len(batch.prompts[0])] * 2,
        "earlier": [2, 2],
        "fps": [16, 16],
    }
    assert (
        reward.spec.weights == f"toy.py sha256:{hashlib.sha256(toy.read_bytes()).hexdigest()[:16]}"
        and reward.spec.bounds == (0, float("inf"))
    )
    assert reward.packages["numpy"] == np.__version__ and reward.packages["python"].startswith("3.")


def test_what_can_not_be_measured_is_invalid_and_nothing_else_is(reward):
    output = reward.score(clips(10, 200, prompt="none"))
    assert output.valid.tolist() == [False, True] and output.scores[0].isnan()


@pytest.mark.parametrize(
    ("todo", "reason"),
    [
        (
            "nan",
            "reward 'toy' failed on the other side: ValueError: score of clip 0 is nan; give None for a clip that can not be measured",
        ),
        (
            "few",
            r"reward 'toy' returned scores = \[20.0[0-9]*\] for 2 clips; it must be one number per clip",
        ),
        ("text", "could not convert string to float"),
        ("raise", r"failed on the other side: KeyError: 'no such token' \(.*toy.py:\d+\)"),
    ],
)
def test_a_wrong_answer_is_an_error_and_the_worker_lives_on(reward, todo, reason):
    process = reward._link.process
    with pytest.raises(ValueError, match=reason):
        reward.score(clips(10, 200, prompt=todo))
    assert reward.score(clips(10)).scores.item() == 1 and reward._link.process is process


@pytest.mark.parametrize(
    ("todo", "reason"),
    [
        ("crash", "reward 'toy' failed twice: its worker ended with exit code 3"),
        ("segfault", r"was ended by SIGSEGV; its last lines:\n(.*\n)+    about to\n    fall$"),
        (
            "exit",
            "ended with exit code 1; its last lines:\n(.*\n)+    a library ended the process$",
        ),
    ],
)
def test_a_crash_twice_is_an_error_that_says_how(reward, todo, reason):
    with (
        pytest.warns(RuntimeWarning, match="reward 'toy' is asked once more: its worker"),
        pytest.raises(OSError, match=reason),
    ):
        reward.score(clips(10, prompt=todo))
    assert reward.score(clips(10)).scores.item() == 1  # the next request has a worker again


def test_a_crash_once_costs_a_restart(reward, tmp_path):
    with pytest.warns(RuntimeWarning, match="exit code 4"):
        assert reward.score(clips(10, 20, prompt=f"once {tmp_path / 'broke'}")).scores.tolist() == [
            1,
            2,
        ]


def test_a_hanging_worker_is_ended_with_its_children(toy, tmp_path):
    reward = Isolated(str(toy), timeout=3.0)  # one was too few on crowded cores
    reward.load()
    with (
        pytest.warns(RuntimeWarning, match="did not answer within 3 s"),
        pytest.raises(OSError, match="failed twice: its worker did not answer within 3 s"),
    ):
        reward.score(clips(10, prompt=f"hang {tmp_path / 'pids'}"))
    assert gone(*map(int, (tmp_path / "pids").read_text().split()), seconds=2.0)


def test_no_orphan_of_a_killed_run(toy, tmp_path):
    """kill -9 of the parent: the worker that waits, the one in the middle of a call, and what
    they have started are gone."""
    files = {todo: tmp_path / todo for todo in ("child", "hang")}
    script = f"""
        import torch
        from kvpo.rewards.base import VideoBatch
        from kvpo.rewards.isolated.reward import Isolated
        for todo in ("child {files["child"]}", "hang {files["hang"]}"):
            reward = Isolated({str(toy)!r})
            reward.load()
            kept = reward, globals().get("kept")
            reward.score(VideoBatch(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), 16.0, (todo,)))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[3])},
    ) as parent:
        while parent.poll() is None and not (
            files["hang"].exists() and len(files["hang"].read_text().split()) == 2
        ):
            time.sleep(0.05)
        workers = [int(pid) for file in files.values() for pid in file.read_text().split()]
        assert len(workers) == 4 and all(map(alive, workers))
        parent.kill()
    assert gone(*workers)


def test_close_ends_it_and_offload_moves_it(toy):
    reward = Isolated(str(toy))
    reward.offload()  # not loaded: nothing to do
    reward.load()
    process = reward._link.process
    reward.offload()
    assert alive(process.pid)
    reward.close()
    assert process.returncode == 0 and not alive(process.pid)


def test_throughput(reward):
    """4 clips x 36 frames at 480 x 832 are 173 MB; a forward of a 7B model takes longer than
    they do."""
    batch = VideoBatch(torch.zeros(4, 36, 3, 480, 832, dtype=torch.uint8), 16.0, ("",) * 4)
    header = {"do": "offload", "protocol": 2}
    begin = time.perf_counter()
    # is not looked at: the time is the way's alone
    reward._link.ask(header, batch.frames.numpy(), 60.0)
    assert time.perf_counter() - begin < 10


def test_a_worker_is_told_its_card_and_no_rank(toy, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "PYTHONHOME"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    own, other = Isolated(str(toy), devices="3"), Isolated(str(toy), environment=sys.executable)
    environ = own._command()[1]
    assert (
        environ["CUDA_VISIBLE_DEVICES"] == "3"
        and environ["PYTHONPATH"].endswith(":/somewhere")
        and not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "PYTHONHOME"} & set(environ)
    )
    assert other._command()[1]["PYTHONPATH"] == "" and other._command()[0][0] == sys.executable


def test_kvpos_own_reward_says_the_same_in_a_process():
    inline, isolated = AttributeAgreement(), Isolated("attributes")
    batch = VideoBatch(
        torch.randint(0, 256, (2, 12, 3, 64, 64), generator=stream(0, "noise"), dtype=torch.uint8),
        16.0,
        ("a small red circle moves quickly to the left over white paper",) * 2,
    )
    inline.load("cpu")
    isolated.load("cpu")
    here, there = inline.score(batch), isolated.score(batch)
    isolated.close()
    assert (
        isolated.spec == inline.spec
        and torch.equal(here.scores, there.scores)
        and here.parts.keys() == there.parts.keys()
    )
    assert all(
        torch.equal(here.parts[name].nan_to_num(-1), there.parts[name].nan_to_num(-1))
        for name in here.parts
    )


def test_what_is_too_short_is_not_sent(tmp_path):
    """Nor is anything started for it."""
    (tmp_path / "a.py").write_text("SPEC = {'name': 'a', 'family': 'b', 'min_frames': 5}")
    output = Isolated(str(tmp_path / "a.py")).score(clips(1, 2, frames=4))
    assert not output.valid.any() and output.info["invalid"] == "a needs 5 frames, the clips have 4"


def test_the_documents_scorer(tmp_path):
    text = (WORKER.parents[3] / "docs" / "isolated_rewards.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "scorer.py").write_text(example, encoding="utf-8")
    reward = Isolated(str(tmp_path / "scorer.py"))
    reward.load()
    reward.offload()
    output = check_output(reward.spec, clips(7), reward.score(clips(7)))
    reward.close()
    assert output.scores.tolist() == [7] and output.parts["first"].tolist() == [7]


def test_the_original_videoreward_is_given_frames_as_it_would_read_them(tmp_path):
    """Its class takes files. A checkout with the same names: it asks for 2 frames a second and
    says which it got."""
    (tmp_path / "vision_process.py").write_text(
        "VIDEO_READER_BACKENDS = {}\ndef smart_nframes(ele, total_frames, video_fps):\n    return round(total_frames / video_fps * ele['fps'])"
    )
    (tmp_path / "inference.py").write_text(
        textwrap.dedent("""
        import os
        from vision_process import VIDEO_READER_BACKENDS
        TrainingConfig = dict
        class VideoVLMRewardInference:
            def __init__(self, folder, device):
                self.config = TrainingConfig(disable_flash_attn2=False)
            def reward(self, paths, prompts):
                clips = [VIDEO_READER_BACKENDS[os.environ["FORCE_QWENVL_VIDEO_READER"]]({"video": os.path.abspath(p), "fps": 2.0}) for p in paths]
                return [{"VQ": len(c), "MQ": c[0, 0, 0, 0].item(), "TA": c[-1, 0, 0, 0].item(), "Overall": 100 * self.config["disable_flash_attn2"]} for c in clips]
    """)
    )
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.pth").write_bytes(b"weights")
    reward = Isolated("envs/videoalign", {"code": str(tmp_path), "checkpoint": str(tmp_path)})
    reward.load()
    frames = torch.arange(32, dtype=torch.uint8).view(1, 32, 1, 1, 1).expand(1, 32, 3, 8, 8)
    output = reward.score(VideoBatch(torch.cat([frames, frames + 100]), 16.0, ("a", "b")))
    reward.close()
    assert output.scores.tolist() == [100, 100] and {
        name: values.tolist() for name, values in output.parts.items()
    } == {"VQ": [4, 4], "MQ": [0, 100], "TA": [31, 131]}
    assert reward.spec.weights == f"model.pth sha256:{hashlib.sha256(b'weights').hexdigest()[:16]}"


# --- A server ---


@pytest.fixture(scope="module")
def address(toy):
    command = [
        sys.executable,
        str(WORKER),
        "--reward",
        str(toy),
        "--params",
        '{"gain": 0.1}',
        "--http",
        "0",
        "--most-mb",
        "1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        yield next(line for line in server.stdout if " at http" in line).split()[-1]
        server.kill()


def test_the_same_over_http(reward, toy, address):
    remote = Isolated(str(toy), {"gain": 0.1}, url=address)
    remote.load("cuda:5")
    batch = clips(3, 77, prompt="ü\n")
    assert (
        torch.equal(remote.score(batch).scores, reward.score(batch).scores)
        and remote.spec == reward.spec
    )
    remote.offload()
    with pytest.raises(ValueError, match="score of clip 0 is nan"):
        remote.score(clips(1, prompt="nan"))
    with pytest.raises(
        ValueError,
        match=f"1 clips are {3 * 2**20} bytes and its server takes {2**20}; start it with a larger --most-mb",
    ):
        remote.score(VideoBatch(torch.zeros(1, 1, 3, 2**10, 2**10, dtype=torch.uint8), 16.0, ("",)))


def test_a_server_that_is_not_the_one_asked_for(toy, address, tmp_path):
    with pytest.raises(ValueError, match=r"runs it with params {\"gain\": 0.1}, asked for is {}"):
        Isolated(str(toy), url=address).load()
    other = tmp_path / "other.py"
    other.write_text('SPEC = {"name": "other", "family": "toy", "bounds": (0, None)}')
    with pytest.raises(ValueError, match="runs 'toy', which differs in name, needs_prompt"):
        Isolated(str(other), {"gain": 0.1}, url=address).load()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/", None, {}, 404),
        ("POST", "/spec", b"", {}, 404),
        ("POST", "/score", b"{}", {"Content-Type": "application/json"}, 415),
        (
            "POST",
            "/score",
            None,
            {"Content-Type": wire.CONTENT_TYPE, "Content-Length": str(2**30)},
            413,
        ),
        ("POST", "/score", b"x" * 40, {"Content-Type": wire.CONTENT_TYPE}, 400),
        (
            "POST",
            "/score",
            b"".join(wire.pack({"do": "offload", "protocol": 2})),
            {"Content-Type": wire.CONTENT_TYPE},
            400,
        ),
        ("DELETE", "/score", None, {}, 501),
    ],
)
def test_a_server_refuses_other_content(address, method, path, body, headers, status):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    assert connection.getresponse().status == status
    connection.close()


def test_no_server_there(toy):
    with pytest.raises(
        OSError,
        match="reward 'toy' can not be loaded: its server at http://127.0.0.1:9 can not be reached",
    ):
        Isolated(str(toy), url="http://127.0.0.1:9").load()


# --- Bad input ---


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("toy", {}, "reward 'toy' is unknown"),
        (
            "nowhere.py",
            {},
            "there is no scorer file nowhere.py; shipped are envs/hpsv3, envs/videoalign",
        ),
        ("identity", {"url": "https://a:1"}, "must be http://host:port"),
        ("identity", {"url": "http://a"}, "must be http://host:port"),
        ("identity", {"timeout": 0.0}, "timeout = 0.0 must be above 0"),
        ("identity", {"params": {"path": Path("x")}}, "can not be sent to another process"),
    ],
)
def test_bad_options(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        Isolated(name, **options)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "has no SPEC"),
        ("SPEC = dict(name='a')", "SPEC must be a dictionary of plain values"),
        ("SPEC = {'name': 'a'}", "unknown or missing entries: family"),
        ("SPEC = {'name': 'a', 'family': 'b', 'bonds': 1}", "unknown or missing entries: bonds"),
    ],
)
def test_a_file_that_is_no_scorer(tmp_path, text, reason):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(ValueError, match=reason):
        spec_of(str(tmp_path / "a.py"), {})


def test_what_fails_while_loading_is_said_at_once(tmp_path):
    """A missing package, and a file that ends the process: no second try, and what the worker
    wrote is shown."""
    path = tmp_path / "a.py"
    path.write_text("import nowhere_to_be_found\nSPEC = {'name': 'a', 'family': 'b'}")
    reward = Isolated(str(path))
    with pytest.raises(RuntimeError, match="reward 'a' is not loaded"):
        reward.score(clips(1))
    with pytest.raises(
        ValueError,
        match="reward 'a' failed on the other side: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ):
        reward.load()
    reward.close()
    path.write_text(
        "import os\nSPEC = {'name': 'a', 'family': 'b'}\nos.write(2, b'no card')\nos._exit(9)"
    )
    with pytest.raises(
        OSError,
        match="reward 'a' can not be loaded: its worker ended with exit code 9; its last lines:\n    no card",
    ):
        reward.load()
    with pytest.raises(OSError, match="could not be started"):
        Isolated(str(path), environment=str(_no_python(tmp_path))).load()


def _no_python(folder: Path) -> Path:
    path = folder / "python"
    path.write_bytes(b"\x7fELF nothing")
    path.chmod(0o755)
    return path


# --- Environments ---


def test_an_environment_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    """A real one, but without pip, which takes long to put in and would need the network."""
    envs, requirements = tmp_path / "envs", tmp_path / "tiny.txt"
    requirements.write_text("# nothing\n")
    monkeypatch.setenv("KVPO_ENVS", str(envs))
    make = [sys.executable, "-m", "venv", "--without-pip", str(envs / "tiny")]
    with pytest.raises(
        ValueError,
        match="there is no environment 'tiny' in .*; make it: kvpo reward-env create tiny",
    ):
        python_of("tiny")
    monkeypatch.setattr(
        reward_env, "commands", lambda *_: [make, [sys.executable, "-c", "exit(3)"]]
    )
    with pytest.raises(
        OSError, match="failed with exit code 3, and nothing of the environment is left; see above"
    ):
        create(str(requirements), envs)
    assert not (envs / "tiny").exists()
    (envs / "tiny" / "left by a killed one").mkdir(parents=True)
    monkeypatch.setattr(reward_env, "commands", lambda *_: [make])
    made = create(str(requirements), envs)
    assert (
        python_of("tiny") == str(made / "bin" / "python")
        and not (made / "left by a killed one").exists()
    )
    assert json.loads((made / "complete.json").read_text()) == {
        "requirements": "# nothing\n",
        "packages": {},
    }
    assert f"tiny         0 packages in {made}" in table(
        envs
    ) and "vbench       not made; kvpo reward-env create vbench" in table(envs)
    with pytest.raises(ValueError, match="is there already; remove the folder"):
        create(str(requirements), envs)


@pytest.mark.parametrize(
    ("uv", "expected"),
    [
        (
            "/bin/uv",
            [
                "/bin/uv venv --python 3.10 /e",
                "/bin/uv pip install --python /e/bin/python -r r.txt",
            ],
        ),
        (None, ["3.10 -m venv /e", "/e/bin/python -m pip install -r r.txt"]),
    ],
)
def test_uv_is_taken_where_there_is_one(monkeypatch, uv, expected):
    monkeypatch.setattr(reward_env.shutil, "which", lambda name: uv)
    assert [
        " ".join(command) for command in reward_env.commands(Path("/e"), Path("r.txt"), "3.10")
    ] == expected


@pytest.mark.parametrize("name", shipped())
def test_shipped_environments_are_locked_and_their_scorers_known(name):
    lines = [
        line.split("#")[0].strip()
        for line in (ENVS / name / "requirements.txt").read_text().splitlines()
    ]
    assert all("==" in line or line.startswith("--") for line in lines if line)
    if (ENVS / name / "scorer.py").exists():
        assert (
            spec_of(f"envs/{name}", {}).family
            and scorer_file(f"envs/{name}") == (ENVS / name / "scorer.py").resolve()
        )


def test_unknown_environments():
    with pytest.raises(ValueError, match="shipped environments are hpsv3, vbench, videoalign"):
        create("hpsv4", Path("/nowhere"))
    with pytest.raises(ValueError, match="is no Python that can be run"):
        python_of("/tmp")
    assert python_of("") == sys.executable
