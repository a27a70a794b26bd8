"""Generators in every form that people have: read, or named for what they are with the way out.

And what a checkpoint leaves unsaid is said.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import tyro
from released import new_wan, original_folder, released_lora, released_state
from safetensors.torch import save_file
from test_align import align, settings, write_recipe
from tiny import draw, new_pipeline, new_stream, story, with_geometry

from kvpo.commands import main as cli
from kvpo.commands.import_ import Import
from kvpo.convert.import_released import FORMATS
from kvpo.convert.lora import read_lora
from kvpo.convert.wan_names import diffusers_to_original, original_to_diffusers
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline

GRID = ("--latent-height", "4", "--latent-width", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return original_folder(tmp_path_factory.mktemp("wan") / "Wan2.1-T2V-1.3B")[0]


def run(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["import", *map(str, argv), *GRID])
    said = capsys.readouterr()
    return code, said.out, said.err.strip()


def imported(
    capsys, base: Path, out: Path, *files, format: str = "causal-forcing"
) -> dict[str, torch.Tensor]:
    code, _, err = run(capsys, *files, out, "--format", format, "--base", base)
    assert (code, err) == (0, "")
    return Pipeline.load(out).generator.transformer.state_dict()


def equal(got, expected) -> bool:
    return got.keys() == expected.keys() and all(
        torch.equal(got[n], t) for n, t in expected.items()
    )


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Function that writes a state as a folder of torch.distributed.checkpoint."""

    def save(state, name: str = "dcp") -> Path:
        # that no process group is there is what a file written here is about
        monkeypatch.setattr("warnings.warn", lambda *args, **kwargs: None)
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
        return tmp_path / name

    return save


# --- Forms that are read ---


def comfy(state):
    return {f"model.diffusion_model.{n}": t for n, t in diffusers_to_original(state).items()}


NAMES = {
    "diffusers": lambda state: state,
    "original": diffusers_to_original,
    "comfy": comfy,
    "comfy's short prefix": lambda state: {
        f"diffusion_model.{n}": t for n, t in diffusers_to_original(state).items()
    },
    "DDP": lambda state: {f"module.model.{n}": t for n, t in diffusers_to_original(state).items()},
}


@pytest.mark.parametrize("names", NAMES)
def test_a_generator_in_every_kind_of_names(capsys, base, tmp_path, names):
    """diffusers' own names were renamed once more, which swapped their second and third norms:
    "missing" and "misshapen", or worse, neither.
    """
    state = new_wan(0).state_dict()
    save_file(
        {n: t.contiguous() for n, t in NAMES[names](state).items()}, tmp_path / "w.safetensors"
    )
    assert equal(imported(capsys, base, tmp_path / "out", tmp_path / "w.safetensors"), state)


def test_names_that_are_diffusers_own_stay():
    names = list(new_wan().state_dict())
    assert list(original_to_diffusers({f"transformer.{n}": torch.zeros(1) for n in names})) == names


@pytest.mark.parametrize("given", ["folder", "index", "one shard", "all shards", "pipeline folder"])
def test_shards(capsys, base, tmp_path, given):
    """Each shard alone was "a generator with half of its tensors missing", and together they were
    two generators.
    """
    folder = tmp_path / "p" / "transformer"
    new_wan(0).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    paths = {
        "folder": [folder],
        "index": [folder / "diffusion_pytorch_model.safetensors.index.json"],
        "one shard": shards[1:2],
        "all shards": shards,
        "pipeline folder": [folder.parent],
    }
    assert equal(imported(capsys, base, tmp_path / "out", *paths[given]), new_wan(0).state_dict())
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(shard.name in card for shard in shards)


@pytest.mark.parametrize("given", ["folder", "index", "piece"])
def test_a_distributed_checkpoint(capsys, base, tmp_path, saved, given):
    """It was refused, with a command as the way out that would have run code from the file."""
    folder = saved(
        {
            "generator": released_state(new_wan(8)),
            "generator_ema": released_state(new_wan(0), wrapper="_fsdp_wrapped_module."),
            "optimizer": {"state": {"moment": draw(3)}, "lr": 0.1},
            "step": 7,
        }
    )
    paths = {"folder": folder, "index": folder / ".metadata", "piece": folder / "__0_0.distcp"}
    got = imported(capsys, base, tmp_path / "out", paths[given], format="self-forcing")
    assert equal(got, new_wan(0).state_dict())
    assert "__0_0.distcp" in (tmp_path / "out" / "README.md").read_text()


def test_a_lora_in_a_distributed_checkpoint(tmp_path, saved):
    """Half precision stays, and alpha / rank comes from the config beside it."""
    lora = {n: t.to(torch.bfloat16) for n, t in released_lora(new_wan()).items()}
    folder = saved({"generator_lora": lora})
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 1}))
    adapter = read_lora(folder)
    save_file(lora, tmp_path / "plain.safetensors")
    plain = read_lora(tmp_path / "plain.safetensors")
    assert adapter.keys() == plain.keys() and {low.scale for low in adapter.values()} == {0.25}
    assert all(torch.equal(low.A, plain[m].A) for m, low in adapter.items())
    assert all(low.B.dtype is torch.bfloat16 for low in adapter.values())


@pytest.mark.parametrize("which", ["generator", "generator_ema"])
def test_a_safetensors_file_of_two_generators(capsys, base, tmp_path, which):
    """A format without levels joins the names: generator_ema.model.X.  The two were one model with
    twice its tensors, all of them surplus.
    """
    both = {"generator": new_wan(8), "generator_ema": new_wan(0)}
    state = {
        f"{k}.{n}": t.contiguous() for k, m in both.items() for n, t in released_state(m).items()
    }
    save_file(state, tmp_path / "w.safetensors")
    format = {"generator": "longlive", "generator_ema": "self-forcing"}[which]
    got = imported(capsys, base, tmp_path / "out", tmp_path / "w.safetensors", format=format)
    assert equal(got, both[which].state_dict())


@pytest.mark.parametrize("key", ["state_dict", "module", "model_state_dict"])
def test_a_trainer_s_own_key(capsys, base, tmp_path, key):
    torch.save({key: released_state(new_wan(0)), "epoch": 3}, tmp_path / "last.ckpt")
    got = imported(capsys, base, tmp_path / "out", tmp_path / "last.ckpt")
    assert equal(got, new_wan(0).state_dict())


def test_two_models_in_one_file_are_not_joined(capsys, base, tmp_path):
    """Names that are equal without their prefixes left the last one's tensors, silently."""
    both = {
        f"{prefix}{n}": t.contiguous()
        for prefix, seed in (("module.", 0), ("model.", 8))
        for n, t in diffusers_to_original(new_wan(seed).state_dict()).items()
    }
    save_file(both, tmp_path / "w.safetensors")
    err = refused(capsys, base, tmp_path, tmp_path / "w.safetensors")
    assert "are two tensors of one name" in err


def test_weights_that_can_not_be_chosen(capsys, base, tmp_path):
    """--weights was passed over where a file has one generator and no keys."""
    save_file(released_state(new_wan(0)), tmp_path / "w.safetensors")
    err = refused(capsys, base, tmp_path, tmp_path / "w.safetensors", "--weights", "generator_ema")
    assert "holds one generator and no keys to choose from; leave it out" in err


def test_a_lora_s_folder_beside_a_generator(capsys, base, tmp_path):
    """alpha / rank of the folder's config is applied, and stands in the card."""
    torch.save({"generator": released_state(new_wan(0))}, tmp_path / "base.pt")
    (tmp_path / "adapter").mkdir()
    save_file(released_lora(new_wan()), tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2})
    )
    got = imported(
        capsys,
        base,
        tmp_path / "out",
        tmp_path / "base.pt",
        tmp_path / "adapter",
        format="longlive",
    )
    before = new_wan(0).state_dict()
    lora = released_lora(new_wan())
    name = "base_model.model.blocks.1.self_attn.o"
    expected = (
        before["blocks.1.attn1.to_out.0.weight"]
        + 0.5 * lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    )
    torch.testing.assert_close(got["blocks.1.attn1.to_out.0.weight"], expected, rtol=0, atol=1e-6)
    assert "its own alpha / rank 0.5" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory, base):
    """A pipeline folder to align, which has the base's sizes."""
    home = tmp_path_factory.mktemp("start")
    torch.save({"generator": released_state(new_wan(0))}, home / "base.pt")
    assert (
        cli.main(
            [
                "import",
                str(home / "base.pt"),
                str(home / "start"),
                "--format",
                "longlive",
                "--base",
                str(base),
                *GRID,
            ]
        )
        == 0
    )
    return home / "start"


@pytest.mark.parametrize("train", ["lora", "full"])
def test_our_own_files_come_back(capsys, base, start, tmp_path, train):
    """`checkpoints/ema.safetensors` of a run, and its exported pipeline, give the run's weights
    when they are imported.
    """
    changes = {
        "policy": {"train": train, "rank": 2},
        "optimizer": {"lr": 0.03, "warmup": 1},
        "evaluate": {"scripts": 2, "batch": 2, "videos": 0},
    }
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(start, steps=1, rollout={"branches": 3, "cache_frames": 21}, **changes),
    )
    assert align(recipe, tmp_path / "run") == 0
    assert (
        cli.main(
            [
                "export",
                str(tmp_path / "run"),
                "--format",
                "pipeline",
                "--out",
                str(tmp_path / "exported"),
            ]
        )
        == 0
    )
    wanted = Pipeline.load(tmp_path / "exported").generator.transformer.state_dict()
    elsewhere = tmp_path / "run" / "checkpoints" / "ema.safetensors"
    files = [elsewhere] if train == "full" else [start / "transformer", elsewhere]
    for name, given in (
        ("a", files),
        ("b", [tmp_path / "exported"]),
        ("c", [tmp_path / "exported" / "transformer" / "diffusion_pytorch_model.safetensors"]),
    ):
        got = imported(capsys, base, tmp_path / name, *given)
        assert all(torch.allclose(got[n], t, rtol=0, atol=1e-6) for n, t in wanted.items()), name
    assert not equal(wanted, new_wan(0).state_dict())
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    for given in (tmp_path / "run", checkpoint, checkpoint / "tensors.safetensors"):
        code, _, err = run(capsys, given, tmp_path / "out", "--format", "longlive", "--base", base)
        assert (
            code == 1 and "kvpo export RUN:ema --format original-merged" in err and "\n" not in err
        )


# --- Forms that are named ---


def refused(capsys, base, tmp_path, *files) -> str:
    code, _, err = run(
        capsys, *files, tmp_path / "out", "--format", "causal-forcing", "--base", base
    )
    assert (
        code == 1
        and err.startswith("kvpo import: ")
        and "\n" not in err
        and not (tmp_path / "out").exists()
    )
    return err


class Runs:
    """A pickle of it runs a command of its writer's choice."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_an_index_with_code_is_refused_and_nothing_of_it_runs(capsys, base, tmp_path, saved):
    """torch's own reader unpickles the index of such a checkpoint, which runs a stranger's code."""
    folder, proof = saved({"generator": {"x": draw(3)}}), tmp_path / "proof"
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(proof)))
    err = refused(capsys, base, tmp_path, folder)
    assert "holds more than names and places (pathlib.Path.touch)" in err or "getattr" in err
    assert "Save the weights alone, as safetensors" in err and not proof.exists()
    (folder / ".metadata").write_bytes(b"nothing")
    assert "is not a whole index" in refused(capsys, base, tmp_path, folder)


def test_a_distributed_checkpoint_that_is_not_whole(capsys, base, tmp_path, saved):
    folder = saved({"generator": {"x": draw(3)}})
    piece = next(folder.glob("*.distcp"))
    piece.rename(tmp_path / "elsewhere")
    assert piece.name in (err := refused(capsys, base, tmp_path, folder))
    assert "copy them too" in err
    (tmp_path / "elsewhere").rename(piece)
    piece.write_bytes(piece.read_bytes()[:-600])
    assert "is not a whole checkpoint" in refused(capsys, base, tmp_path, folder)
    (folder / ".metadata").unlink()
    assert "but not its index .metadata; copy that too" in refused(capsys, base, tmp_path, piece)


def test_folders_that_are_not_weights(capsys, base, tmp_path):
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    assert (
        "empty holds no weights" in (err := refused(capsys, base, tmp_path, tmp_path / "empty"))
        and "give one of its folders, inside" in err
    )
    for name in ("a.pt", "b.pt"):
        torch.save({"generator": released_state(new_wan(0))}, tmp_path / "empty" / name)
    assert "empty holds 2 weight files, a.pt, b.pt; give the one that is meant" in refused(
        capsys, base, tmp_path, tmp_path / "empty"
    )
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(
        capsys, base, tmp_path, tmp_path / "adapter"
    )


def test_shards_that_are_missing(capsys, base, tmp_path):
    new_wan(0).save_pretrained(tmp_path / "t", max_shard_size="20KB")
    (gone, *_, last) = sorted((tmp_path / "t").glob("*.safetensors"))
    gone.unlink()
    for given in (tmp_path / "t", last):
        assert gone.name in refused(capsys, base, tmp_path, given)


# --- What a checkpoint leaves unsaid ---


def options(*argv, files=("x.pt",)) -> Import:
    return tyro.cli(Import, args=["--base", "wan", *argv, *files, "out"])


@pytest.mark.parametrize(
    ("format", "block", "steps", "first", "prefer"),
    [
        ("self-forcing", 3, 4, 0, "generator_ema"),
        ("causal-forcing", 3, 4, 0, "generator"),
        ("causal-forcing-framewise", 1, 4, 0, "generator_ema"),
        ("causal-forcing-2step", 1, 2, 4, "generator_ema"),
        ("causal-forcing-1step", 1, 1, 4, "generator_ema"),
        ("longlive", 3, 4, 0, "generator"),
        ("memflow", 3, 4, 0, "generator"),
    ],
)
def test_families_by_name(format, block, steps, first, prefer):
    """Every released checkpoint was imported as blocks of 3 frames in 4 steps, and Causal-Forcing's
    chunk-wise one with weights that its own inference does not take.
    """
    kind = FORMATS[format]
    assert (
        kind.geometry.block,
        kind.geometry.steps,
        kind.geometry.first_steps,
        kind.prefer[0],
    ) == (block, steps, first, prefer)
    assert options("--format", format).geometry == kind.geometry


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-2step"),
        ("causal-forcing++/framewise-1step.pt", "causal-forcing-1step"),
    ],
)
def test_a_file_s_name_says_which_of_a_family(file, format):
    assert options("--format", "causal-forcing", files=(file,)).kind.name == format
    assert options("--format", "self-forcing", files=(file,)).kind.name == "self-forcing", (
        "another family's names are no hint"
    )


def test_options_over_the_format():
    given = options(
        "--format",
        "causal-forcing-2step",
        "--block",
        "2",
        "--steps",
        "3",
        "--sink",
        "1",
        "--window",
        "9",
    ).geometry
    assert (given.block, given.steps, given.first_steps, given.sink, given.window) == (
        2,
        3,
        0,
        1,
        9,
    )
    assert options("--format", "self-forcing", "--first-steps", "6").geometry.first_steps == 6


def test_what_is_assumed_is_said_and_written(capsys, base, tmp_path):
    path = tmp_path / "framewise-2step.pt"
    torch.save(
        {
            "generator": released_state(new_wan(8)),
            "generator_ema": released_state(new_wan(0), wrapper="_fsdp_wrapped_module."),
        },
        path,
    )
    code, out, _ = run(capsys, path, tmp_path / "out", "--format", "causal-forcing", "--base", base)
    assert code == 0
    assert (
        "taken for causal-forcing-2step: block 1, steps 2 (the first block 4), sink 0, window 21"
        in out
        and "--block, --steps" in out
    )
    assert (
        "under 'generator_ema', what causal-forcing-2step's own inference takes (the file also has "
        "'generator', which --weights generator takes)" in out
    )
    geometry = Geometry.read(tmp_path / "out" / "streaming.json")
    assert (geometry.block, geometry.steps, geometry.first_steps) == (1, 2, 4)
    assert equal(
        Pipeline.load(tmp_path / "out").generator.transformer.state_dict(), new_wan(0).state_dict()
    )


def test_the_other_weights_can_be_chosen(capsys, base, tmp_path):
    path = tmp_path / "causal_forcing.pt"
    torch.save(
        {"generator": released_state(new_wan(8)), "generator_ema": released_state(new_wan(0))}, path
    )
    for chosen, seed in ((("--weights", "generator_ema"), 0), ((), 8)):
        code, _, _ = run(
            capsys,
            path,
            tmp_path / f"out{seed}",
            "--format",
            "causal-forcing",
            "--base",
            base,
            *chosen,
        )
        assert code == 0 and equal(
            Pipeline.load(tmp_path / f"out{seed}").generator.transformer.state_dict(),
            new_wan(seed).state_dict(),
        )


def test_the_first_block_has_steps_of_its_own(tmp_path):
    """Causal Forcing++ denoises a video's first block in four steps, the others in one or two."""
    geometry = Geometry(
        block=1,
        sink=0,
        window=9,
        latent_height=4,
        latent_width=4,
        fps=16,
        text_length=24,
        steps=2,
        first_steps=4,
    )
    assert geometry.sigmas == geometry.sigmas_of(1) == (1.0, 5 / 6) and geometry.sigmas_of(
        0
    ) == pytest.approx((1.0, 0.9375, 0.833333, 0.625), abs=1e-6)
    stream = new_stream(with_geometry(new_pipeline(), block=1, steps=2, first_steps=4), story(3))
    seen = []
    for block in range(3):
        stream.advance(observe=lambda i, x, v: seen.append((block, i)))  # noqa: B023, called at once
    assert [sum(b == block for b, _ in seen) for block in range(3)] == [4, 2, 2]
    with pytest.raises(ValueError, match="first_steps = -1 must be a whole number, 0 or more"):
        replace(geometry, first_steps=-1)


def test_a_frame_wise_pipeline_streams(capsys, base, tmp_path):
    torch.save({"generator_ema": released_state(new_wan(0))}, tmp_path / "framewise.pt")
    imported(
        capsys, base, tmp_path / "out", tmp_path / "framewise.pt", format="causal-forcing-1step"
    )
    assert (
        cli.main(
            [
                "generate",
                str(tmp_path / "out"),
                "--prompt",
                "a red circle",
                "--blocks",
                "3",
                "--out",
                str(tmp_path / "v"),
            ]
        )
        == 0
    )
    transformer = Pipeline.load(tmp_path / "out").generator.transformer
    with torch.no_grad():
        assert (
            CausalWan(transformer)
            .velocity(draw(1, 1, 16, 4, 4), 0.8, draw(1, 24, 16, seed=1), [0])
            .isfinite()
            .all()
        )
