"""On a GPU: the CPU's numbers, the same run twice, every command.  `python -m pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_align import align, equal, final, records, settings, write_recipe

from kvpo.commands import main as cli
from kvpo.common.progress import Progress
from kvpo.common.timing import Phases
from kvpo.config import load_config, recipe_path
from kvpo.method.replay import CONTEXTS, Replay
from kvpo.runs.parts import Parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def float32():
    """Convolutions without TF32, so that only the order of sums differs from the CPU."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def group(device: str) -> dict[str, torch.Tensor]:
    """Latents, rewards, energies and gradient of one group of the miniature's recipe, on the
    CPU."""
    run = Parts(replace(load_config(recipe_path("mini")), groups=1, device=device), Progress())
    script = run.source.script(0, 0)
    embeddings = run.embed(script)
    rollout, rewards, pixels = run.explore(script, embeddings, ("gpu",))
    replay = Replay(
        run.pipeline, rollout, embeddings, CONTEXTS[run.config.context], run.config.energy
    )
    update = run.updater.accumulate(replay, run.advantages(rewards), Phases())
    gradient = torch.cat([p.grad.flatten() for p in run.policy.parameters])
    return {
        "latents": rollout.latents.cpu(),
        "pixels": pixels.float(),
        "rewards": (rewards.local + rewards.global_) / 2,
        "energy": update.energy,
        "gradient": gradient.cpu(),
    }


def test_a_group_has_the_cpus_numbers(float32):
    ours, theirs = group("cuda"), group("cpu")
    difference = {
        k: float((ours[k] - theirs[k]).abs().max()) for k in ("latents", "pixels", "rewards")
    }
    relative = {
        k: float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in ("energy", "gradient")
    }
    print(difference | relative)
    assert (
        difference["latents"] < 1e-3 and difference["pixels"] <= 2 and difference["rewards"] < 1e-2
    )
    assert relative["energy"] < 1e-3 and relative["gradient"] < 1e-2


def test_the_invariants_hold():
    assert cli.main(["doctor", "mini", "--device", "cuda"]) == 0


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_same_seed_is_the_same_run_also_when_resumed(folder, tmp_path, train):
    recipe = write_recipe(
        tmp_path / "tiny.yaml",
        settings(folder, device="cuda", policy={"train": train, "rank": 4, "sync_interval": 2}),
    )
    assert (
        align(recipe, tmp_path / "straight")
        == align(recipe, tmp_path / "again")
        == align(recipe, tmp_path / "resumed", "--steps", "2")
        == 0
    )
    assert align(recipe, tmp_path / "resumed", "--resume") == 0
    for other in ("again", "resumed"):
        assert equal(final(tmp_path / other), final(tmp_path / "straight"))
        assert records(tmp_path / other, evaluations=False) == records(
            tmp_path / "straight", evaluations=False
        )


def test_the_miniatures_run_is_the_same_twice(tmp_path):
    """Real attention sizes, the real decoder, the velocity penalty: kernels that the tiny
    generator's sizes do not reach."""
    small = [
        "--steps",
        "2",
        "--device",
        "cuda",
        "--show-every",
        "0",
        "--evaluate.scripts",
        "2",
        "--evaluate.videos",
        "0",
    ]
    assert align("mini", tmp_path / "a", *small) == align("mini", tmp_path / "b", *small) == 0
    assert equal(final(tmp_path / "a"), final(tmp_path / "b"))


@pytest.mark.parametrize(
    "command",
    [
        [
            "generate",
            "mini",
            "--prompt",
            "a red circle moves right",
            "--blocks",
            "3",
            "--device",
            "cuda",
        ],
        [
            "evaluate",
            "mini",
            "--against",
            "mini",
            "--scripts",
            "2",
            "--blocks",
            "8",
            "--device",
            "cuda",
        ],
        ["explore", "mini", "--device", "cuda"],
    ],
)
def test_commands(command, tmp_path):
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
