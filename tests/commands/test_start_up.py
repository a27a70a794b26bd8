"""What needs no network does not wait for the network's libraries; errors of the system are said
in words."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from kvpo.commands import main as cli
from kvpo.common.files import in_words
from kvpo.common.wording import count_of, in_time


@pytest.mark.parametrize(
    "argv",
    [
        ("--help",),
        ("report", "--help"),
        ("unblind", "--help"),
        ("prompts", "--help"),
        ("reward-env", "list"),
        ("prompts",),
        ("report", "nowhere"),
    ],
)
def test_what_needs_no_network_does_not_import_torch(argv, tmp_path):
    """Every command imported everything: 5.5 seconds of a processor, also for `kvpo report
    --help`."""
    script = f"import sys; from kvpo.commands.main import main; main({list(argv)!r}); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr


def test_no_command_imports_torch_to_explain_itself():
    """Four of the commands did not; `align`, `plan`, `generate` and the others took 5 to 7 seconds
    of a processor to print their options. Nor does a recipe need it, or its refusal."""
    script = """
import sys
from kvpo.commands.main import COMMANDS, main
asked = [(name, "--help") for name in COMMANDS]
asked += [("align", "mini", "--help-all"), ("config", "show", "mini"), ("plan", "nowhere")]
codes = {}
for argv in asked:
    codes[argv] = main(list(argv))
    if heavy := {"torch", "diffusers", "transformers", "av"} & {*sys.modules}:
        sys.exit(f"kvpo {' '.join(argv)} imports {', '.join(sorted(heavy))}")
wrong = [argv for argv, code in codes.items() if code != (argv[1] == "nowhere")]
sys.exit(f"exit codes: {wrong}" if wrong else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_report_on_an_environment_loads_torch_alone():
    """`kvpo env` took 6.5 seconds of a processor: it asked a module for a folder's name that
    imports diffusers and transformers."""
    script = """
import sys
from kvpo.commands.main import main
code = main(["env"])
sys.exit(code or ", ".join({"diffusers", "transformers", "av", "scipy"} & {*sys.modules}) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prompt cache" in done.stdout


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOENT, "no such file or folder"),
        (errno.EACCES, "this user may not"),
        (errno.EISDIR, "it is a folder"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_an_error_of_the_system_is_said_in_words(number, said):
    """`[Errno 2] No such file or directory: 'p.txt'` was the whole message."""
    message = in_words(OSError(number, os.strerror(number), "p.txt"))
    assert message.startswith("p.txt: ") and said in message and "Errno" not in message
    assert (
        in_words(ValueError("a rule")) == in_words(OSError("a rule")) == "a rule"
        and in_words(ValueError()) == "ValueError"
    )


def test_a_missing_prompt_file_is_said_in_words(capsys):
    assert cli.main(["generate", "mini", "--prompts", "nowhere.txt"]) == 1
    assert (
        capsys.readouterr().err
        == "kvpo generate: nowhere.txt: there is no such file or folder; correct the path\n"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0019, "1.9 ms"),
        (0.5, "500 ms"),
        (3.2, "3.2 s"),
        (90, "90 s"),
        (150, "2.5 min"),
        (2580, "43 min"),
        (9000, "2.5 h"),
        (7.7e6, "89 days"),
    ],
)
def test_spans_of_time(seconds, said):
    """`kvpo plan` said `about 3.27e-05 min`."""
    assert in_time(seconds) == said


def test_counts_have_their_noun():
    """`1 nodes of 8 cards`."""
    assert (
        count_of(1, "node") == "1 node"
        and count_of(0, "node") == "0 nodes"
        and count_of(2, "node") == "2 nodes"
    )
