"""`docker run --user 12345 --read-only -v volume:/mnt`: no passwd entry, no HOME, and nothing but
one volume that can be written to.

A mount namespace whose root is read-only, and in it a process of that user.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_align import settings, write_recipe
from tiny import RED, save_pipeline

ROOT = Path(__file__).resolve().parents[2]
USER = "12345"
INSIDE = f"""
mount --bind "$1" /mnt && mount -o remount,ro,bind / && cd /mnt || exit 99
exec setpriv --reuid {USER} --regid {USER} --clear-groups "$2" -c "$3"
"""
COMMANDS = """
import sys
from kvpo.commands.main import main

def told(*argv):
    code = main([str(a) for a in argv])
    print(f"CODE {argv[0]} {code}", flush=True)

told("env")
told("plan", "r.yaml")
told("generate", "p", "--prompt", %r, "--blocks", 4, "--out", "videos")
told("align", "r.yaml", "--out", "run")
told("evaluate", "run:ema", "--recipe", "r.yaml", "--scripts", 2, "--out", "e.json")
told("doctor", "r.yaml")
"""


def contained(volume: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program there; its environment has nothing but where Python's modules are."""
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", INSIDE, "sh", volume, sys.executable, program],
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def volume(tmp_path) -> Path:
    """The volume, with a pipeline and a recipe that anybody may read."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("only root can make a namespace of mounts, with unshare and setpriv")
    folder = tmp_path / "volume"
    save_pipeline(folder / "p")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{RED}\n{RED} now\n")
    recipe = settings(Path("p"), steps=1, data={"prompts": "prompts.txt", "blocks": 6})
    write_recipe(folder / "r.yaml", recipe)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    if contained(folder, "import kvpo").returncode:
        pytest.skip(
            "no namespace of mounts can be made, or another user can not read this checkout"
        )
    return folder


def test_commands_in_a_container(volume):
    """`kvpo env` ended for want of a home folder, of which it was to say where it is."""
    done = contained(volume, COMMANDS % RED)
    codes = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    names = ("env", "plan", "generate", "align", "evaluate", "doctor")
    assert codes == [f"CODE {name} 0" for name in names], done.stdout + done.stderr
    assert "none: there is no home folder" in done.stdout
    said = [line for line in done.stderr.splitlines() if "not kept on disk" in line]
    assert len(said) == 2, "a line of each command that would have kept them: align and doctor"
    assert (volume / "run" / "report.html").stat().st_uid == int(USER)
    assert (volume / "videos" / "000.mp4").is_file()
