"""The end of a process of torchrun's: its exit code and all that is registered for the end, but
no tearing down, in which gloo's threads once aborted 4 of 120 of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import atexit
from kvpo.distributed.process_end import end_by

class Kept:
    def __del__(self):
        print("torn down")

def main():
    global kept
    kept = Kept()
    atexit.register(print, "registered")
    print("done")
    return {value}

end_by(main)
"""


def run(*args: str, torchrun: bool) -> subprocess.CompletedProcess:
    env = (
        {name: value for name, value in os.environ.items() if name != "RANK"}
        | {"PYTHONPATH": str(ROOT)}
        | ({"RANK": "0"} if torchrun else {})
    )
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("torchrun", "said"), [(True, "done\nregistered\n"), (False, "done\nregistered\ntorn down\n")]
)
def test_all_but_tearing_down(torchrun, said):
    done = run("-c", PROGRAM.format(value=3), torchrun=torchrun)
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


def test_an_exception_is_code_1_and_its_traceback():
    done = run("-c", PROGRAM.format(value="1 / 0"), torchrun=True)
    assert (
        done.returncode == 1
        and done.stdout == "done\nregistered\n"
        and done.stderr.startswith("Traceback")
        and "ZeroDivisionError" in done.stderr
    )


@pytest.mark.parametrize("torchrun", [True, False])
def test_the_command_line_ends_so(torchrun):
    done = run("-m", "kvpo", "algin", torchrun=torchrun)
    assert done.returncode == 2 and "did you mean align?" in done.stderr
