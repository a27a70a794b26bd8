"""Imports point one way: a file imports only from its own layer, without circles, or from layers above it in this list.

A newcomer can then read the package from the top of the list, and importing a leaf never drags in Wan or a reward model.
Every file of the package has its place here; a new one is put where its imports allow.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kvpo"

LAYERS = {
    "foundation": "types flow rng errors files timing environment progress stopping ending rendezvous mini.world mini.stories mini.source",
    "metrics": "metrics distributed video",
    "generators": "generators.rope generators.memory generators.cache generators.history generators.attention generators.causal_wan "
    "generators.streaming generators.pipeline generators.checkpoints generators.base_folder generators.embeddings",
    "exploration": "exploration.base exploration.draws exploration.kv_routing exploration.noise exploration.sde",
    "surrogates": "surrogates.base surrogates.velocity_energy surrogates.denoised_energy",
    "rewards": "rewards.base rewards.measured rewards.track rewards.motion rewards.judge rewards.world rewards.facts rewards.attributes rewards.attributes_training rewards.opticalflow rewards.heldout "
    "rewards.cheats rewards.calibration rewards.clips rewards.classic_measures rewards.classic rewards.niqe rewards.watched rewards.pixels rewards.released rewards.image_text rewards.hpsv2 rewards.aesthetic rewards.dinov2 rewards.qwen rewards.hpsv3 rewards.videoreward rewards.packaged rewards.efficientnet rewards.conse rewards.ocr rewards.wire rewards.worker rewards.envs.hpsv3.scorer rewards.envs.videoalign.scorer rewards.links reward_env rewards.isolated rewards.registry rewards.scorer",
    "the sampler": "denoise",
    "weights": "sharding policy",
    "stage 1": "prompts",
    "stage 2": "prefix rollout",
    "stage 3": "score branch_parallel",
    "stage 4": "advantages conflicts",
    "stage 5": "replay",
    "stage 6": "loss velocity_penalty",
    "the public code's arithmetic": "compat.policy compat.planning compat.inputs compat.memory",
    "stage 7": "update",
    "persistence": "checkpoint saving run_folder",
    "evaluation": "evaluate goodhart sentinels",
    "report": "routing_map showing report_page report_curves report_videos report_evaluation report_guards report",
    "the miniature's making": "mini.networks mini.linear_encoder mini.autoencoder mini.library mini.training mini.layouts mini.flat mini.openings mini.teacher_forcing mini.few_step mini.card mini.pretrain",
    "configuration": "config",
    "weights by name": "loading",
    "weights and videos in and out": "importing exporting generating",
    "planning": "peak plan_amounts plan_costs plan",
    "parts by name": "parts",
    "a run in its folder": "resuming",
    "evaluation at scale": "ab_page ab ab_answers prompt_sets vbench",
    "the main path": "trials align",
    "commands": "reward_commands commands doctor",
    "the command line": "cli __main__",
}
LAYER = {f"kvpo.{name}": number for number, names in enumerate(LAYERS.values()) for name in names.split()}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path = PACKAGE) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports from the package, wherever in the file; a name may be an attribute."""
    package = module_name(path, root).split(".")[: None if path.name == "__init__.py" else -1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = ".".join([*base, *filter(None, [node.module])])
            found += [(node.lineno, f"{whole}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == root.name]


def resolved(name: str, modules: set[str]) -> str:
    """The module that a dotted name means: ``kvpo.flow.warp`` is in ``kvpo.flow``, ``kvpo.loss`` is itself."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def edges(root: Path = PACKAGE) -> list[tuple[str, int, str]]:
    """(importer, line, imported) over all files of the package."""
    paths = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    return [(name, line, resolved(target, set(paths))) for name, path in paths.items() for line, target in imports(path, root)]


def faults(found: list[tuple[str, int, str]], layer: dict[str, int]) -> list[str]:
    names = list(LAYERS)
    return [
        f"{importer}, line {line}: imports {target}, but {names[layer[target]]!r} comes after {names[layer[importer]]!r}"
        for importer, line, target in found
        if importer in layer and target in layer and layer[target] > layer[importer]
    ]


def packages(root: Path = PACKAGE) -> set[str]:
    return {module_name(path, root) for path in root.rglob("__init__.py")}


def test_every_file_has_its_place():
    files = {module_name(path, PACKAGE) for path in PACKAGE.rglob("*.py")} - packages()
    lost = sorted(files - set(LAYER))
    assert not lost, f"no place for {lost}: put each into the layer of tests/test_layers.py that its imports allow"
    twice = sorted(name for names in LAYERS.values() for name in names.split() if " ".join(LAYERS.values()).split().count(name) > 1)
    assert not twice


def test_imports_point_one_way():
    assert not faults(edges(), LAYER)


def test_no_circles_within_a_layer():
    graph: dict[str, set[str]] = {}
    for importer, _, target in edges():
        graph.setdefault(importer, set()).add(target)
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_packages_import_nothing():
    """`import kvpo.flow` runs kvpo/__init__.py: what that imports, every leaf would drag in."""
    assert not [edge for edge in edges() if edge[0] in packages()]


# --- The reader itself ---


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("import kvpo.flow", "kvpo.flow"),
        ("import kvpo.flow as f, torch", "kvpo.flow"),
        ("from kvpo.flow import warp", "kvpo.flow"),
        ("from kvpo import flow", "kvpo.flow"),
        ("from ..flow import warp", "kvpo.flow"),
        ("from .. import flow", "kvpo.flow"),
        ("from .world import SIZE", "kvpo.mini.world"),
        ("from . import world", "kvpo.mini.world"),
        ("def late():\n    from kvpo.mini import world", "kvpo.mini.world"),
    ],
)
def test_every_kind_of_import_is_read(tmp_path, statement, target):
    root = tmp_path / "kvpo"
    (root / "mini").mkdir(parents=True)
    for name in ("__init__", "flow", "mini/__init__", "mini/world"):
        (root / f"{name}.py").touch()
    (root / "mini" / "new.py").write_text(statement)
    assert [(importer, imported) for importer, _, imported in edges(root)] == [("kvpo.mini.new", target)]


def test_a_fault_names_file_line_and_import():
    (message,) = faults([("kvpo.loss", 7, "kvpo.update"), ("kvpo.update", 3, "kvpo.loss")], LAYER)
    assert message == "kvpo.loss, line 7: imports kvpo.update, but 'stage 7' comes after 'stage 6'"
