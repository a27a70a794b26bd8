"""`kvpo studio`: its address, its warnings, and its end by ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from kvpo.commands.studio import Studio
from kvpo.common.progress import Progress


def test_it_is_open_to_this_machine_alone(capsys):
    assert Studio().host == "127.0.0.1"
    Studio().say_address(8765, "token", "mini", Progress())
    said = capsys.readouterr()
    assert "http://127.0.0.1:8765/token/" in said.out and "warning" not in said.out + said.err


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.5", "10.0.0.5")]
)
def test_another_host_is_warned_of(host, shown, capsys):
    Studio(host=host).say_address(8765, "token", "mini", Progress())
    said = capsys.readouterr()
    assert (
        f"http://{shown}:8765/token/" in said.out and "nothing is encrypted" in said.out + said.err
    )


def test_what_can_not_be_is_refused_before_anything_is_loaded():
    for command, said in (
        (Studio(branches=1), "--branches 1"),
        (Studio(memory=-1), "--memory -1"),
        (Studio(cache_frames=0), "--cache-frames 0"),
    ):
        with pytest.raises(ValueError, match=said):
            command.check_options()
    with pytest.raises(FileNotFoundError, match="no recipe 'minni'"):
        Studio(recipe="minni").check_options()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} .*--port"):
            Studio(port=port).listener()
    with pytest.raises(ValueError, match="--port"):
        Studio(port=99999).listener()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(
        ValueError, match=r"uvicorn, which is not installed; pip install .*\[studio\]"
    ):
        Studio().check_options()


def status(url: str) -> int:
    try:
        return urllib.request.urlopen(url, timeout=60).status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_studio_from_its_start_to_ctrl_c(folder, tmp_path):
    argv = [sys.executable, "-m", "kvpo", "studio", str(folder), "--port", "0", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*argv, str(tmp_path / "studio")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        line = ""
        while "http://" not in line:
            line = process.stdout.readline()
            assert line, process.wait()
        url = re.search(r"http://\S+/", line)[0]
        assert status(url) == 200
        assert status(url + "main.js") == 200
        assert status(url.replace(url.split("/")[3], "wrong")) == 403
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "the studio has ended" in said and "Traceback" not in said
