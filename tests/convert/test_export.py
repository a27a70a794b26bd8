"""A run's weights in every format: what the format's own loader makes of them computes what the
run's model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import PeftModel
from released import new_wan, original_folder, released_state
from safetensors.torch import load_file
from test_align import align, settings, write_recipe
from tiny import CHANNELS, TEXT_DIM, draw, new_transformer

from kvpo.commands import main as cli
from kvpo.common.weights import account, read_checkpoint
from kvpo.convert.export_formats import WRITERS
from kvpo.convert.lora import adapter_of, add_lora, merge
from kvpo.convert.wan_base import copy_tree
from kvpo.convert.wan_names import diffusers_to_original, generator_state, original_to_diffusers
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.pipeline import Pipeline
from kvpo.runs.loading import load_generator


def run(capsys, *argv) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["export", *map(str, argv)])
    return code, capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """One run of an adapter and one of all weights, far enough for the three sets of weights to
    differ."""
    home = tmp_path_factory.mktemp("export")
    made = {}
    for kind in ("lora", "full"):
        policy = {"train": kind, "rank": 3, "ema": 0.5}
        recipe = write_recipe(
            home / f"{kind}.yaml",
            settings(
                folder,
                steps=3,
                policy=policy,
                optimizer={"lr": 0.03, "warmup": 1},
                evaluate={"scripts": 2, "batch": 2, "videos": 0},
            ),
        )
        assert align(recipe, home / kind) == 0
        made[kind] = home / kind
    return made


def velocity(transformer) -> torch.Tensor:
    with torch.no_grad():
        return CausalWan(transformer).velocity(
            draw(1, 2, CHANNELS, 4, 4), 0.8, draw(1, 24, TEXT_DIM, seed=1), [0, 1]
        )


def load_pipeline(folder: Path, base: Path):
    return Pipeline.load(folder).generator.transformer


def load_diffusers_lora(folder: Path, base: Path):
    stock = WanPipeline.from_pretrained(base)
    stock.load_lora_weights(folder)
    return stock.transformer


def load_peft(folder: Path, base: Path):
    return PeftModel.from_pretrained(
        WanTransformer3DModel.from_pretrained(base / "transformer"), folder
    ).get_base_model()


def load_original_lora(folder: Path, base: Path):
    transformer = WanTransformer3DModel.from_pretrained(base / "transformer")
    state = transformer.state_dict()
    merge(state, adapter_of(read_checkpoint(folder / "lora.pt"), folder), 1.0, "lora.pt")
    transformer.load_state_dict(state)
    return transformer


def load_original_merged(folder: Path, base: Path):
    transformer = WanTransformer3DModel.from_pretrained(base / "transformer")
    state, key = generator_state(read_checkpoint(folder / "generator.pt"), folder)
    assert key == "generator"
    account(
        state, {n: t.shape for n, t in transformer.state_dict().items()}, "generator.pt", "the base"
    )
    transformer.load_state_dict(state)
    return transformer


def load_comfyui_lora(folder: Path, base: Path):
    """As ComfyUI patches a model: every weight of `diffusion_model` by alpha / rank times up
    times down, each key used up."""
    transformer = WanTransformer3DModel.from_pretrained(base / "transformer")
    patches = load_file(folder / "lora.safetensors")
    weights = {
        f"diffusion_model.{n}": t
        for n, t in diffusers_to_original(transformer.state_dict()).items()
    }
    for name in list(weights):
        module = name.removesuffix(".weight")
        if (down := patches.pop(f"{module}.lora_down.weight", None)) is not None:
            up, alpha = patches.pop(f"{module}.lora_up.weight"), patches.pop(f"{module}.alpha")
            assert alpha.shape == () and alpha.dtype == torch.float32
            weights[name] = weights[name] + alpha.item() / down.shape[0] * (
                up.float() @ down.float()
            )
    assert not patches, f"lora keys not loaded: {sorted(patches)[:3]}"
    transformer.load_state_dict(
        original_to_diffusers({n.removeprefix("diffusion_model."): t for n, t in weights.items()})
    )
    return transformer


def load_comfyui_merged(folder: Path, base: Path):
    transformer = WanTransformer3DModel.from_pretrained(base / "transformer")
    state = load_file(folder / "model.safetensors")
    assert (
        all(name.startswith("model.diffusion_model.") for name in state)
        and "model.diffusion_model.blocks.0.self_attn.q.weight" in state
    )
    transformer.load_state_dict(
        original_to_diffusers(
            {n.removeprefix("model.diffusion_model."): t for n, t in state.items()}
        )
    )
    return transformer


LOADERS = {
    "pipeline": load_pipeline,
    "diffusers-lora": load_diffusers_lora,
    "peft": load_peft,
    "original-lora": load_original_lora,
    "original-merged": load_original_merged,
    "comfyui-lora": load_comfyui_lora,
    "comfyui-merged": load_comfyui_merged,
}


def test_every_format_has_its_loader():
    assert LOADERS.keys() == WRITERS.keys()


@pytest.mark.parametrize("format", sorted(LOADERS))
@pytest.mark.parametrize("which", ["ema", "online"])
def test_the_stock_loader_finds_the_run_s_model(capsys, runs, folder, tmp_path, format, which):
    assert run(
        capsys, f"{runs['lora']}:{which}", "--format", format, "--out", tmp_path / "out"
    ) == (0, "")
    expected = velocity(load_generator(f"{runs['lora']}:{which}")[0].generator.transformer)
    torch.testing.assert_close(
        velocity(LOADERS[format](tmp_path / "out", folder)), expected, rtol=0, atol=2e-5
    )
    assert (
        expected - velocity(WanTransformer3DModel.from_pretrained(folder / "transformer"))
    ).abs().max() > 1e-2, "the run has moved its weights far above the tolerance"
    assert f"`{folder.name}`" in (tmp_path / "out" / "README.md").read_text()
    texts = [p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".md", ".json")]
    assert not any(str(tmp_path.parent) in text or str(folder.parent) in text for text in texts), (
        "no path of this machine"
    )


@pytest.mark.parametrize("format", ["pipeline", "original-merged", "comfyui-merged"])
def test_all_weights(capsys, runs, folder, tmp_path, format):
    assert run(capsys, runs["full"], "--format", format, "--out", tmp_path / "out") == (0, "")
    expected = load_generator(f"{runs['full']}:ema")[0].generator.transformer.state_dict()
    got = LOADERS[format](tmp_path / "out", folder).state_dict()
    assert got.keys() == expected.keys() and all(
        torch.equal(got[n], t) for n, t in expected.items()
    )


def test_half_precision_and_the_default_folder(capsys, runs):
    assert run(
        capsys, f"{runs['lora']}:start", "--format", "original-lora", "--dtype", "bfloat16"
    ) == (0, "")
    lora = read_checkpoint(runs["lora"] / "export" / "start-original-lora" / "lora.pt")[
        "generator_lora"
    ]
    assert {t.dtype for t in lora.values()} == {torch.bfloat16} and len(lora) == 40
    assert not any(t.any() for n, t in lora.items() if "lora_B" in n), (
        "an adapter starts without effect"
    )


def test_the_exported_folder_is_a_generator(capsys, runs, tmp_path):
    run(capsys, runs["lora"], "--format", "pipeline", "--out", tmp_path / "out")
    assert (
        cli.main(
            [
                "generate",
                str(tmp_path / "out"),
                "--prompt",
                "a red circle rises slowly",
                "--blocks",
                "2",
                "--out",
                str(tmp_path / "video"),
            ]
        )
        == 0
    )
    assert (tmp_path / "video" / "000.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    "name", ["lora.safetensors", "pytorch_lora_weights.safetensors", "adapter"]
)
def test_an_exported_adapter_is_read_here(capsys, runs, folder, tmp_path, name):
    """By the reader of LoRAs that `generate` and `import` have, at the scale that it was trained
    at."""
    format = {
        "lora.safetensors": "comfyui-lora",
        "pytorch_lora_weights.safetensors": "diffusers-lora",
        "adapter": "peft",
    }[name]
    run(capsys, runs["lora"], "--format", format, "--out", tmp_path / "adapter")
    pipeline = Pipeline.load(folder)
    add_lora(pipeline, tmp_path / "adapter" / ("" if name == "adapter" else name), 1.0)
    expected = velocity(load_generator(str(runs["lora"]))[0].generator.transformer)
    torch.testing.assert_close(
        velocity(pipeline.generator.transformer), expected, rtol=0, atol=2e-5
    )


def test_an_export_is_no_link_into_what_is_installed(capsys, runs, folder, tmp_path):
    """Every file was a second name of the source's: an edit of an export's config.json changed
    the installed weights' own."""
    run(capsys, runs["lora"], "--format", "pipeline", "--out", tmp_path / "out")
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert path.stat().st_nlink == 1, path
            with path.open("ab") as file:
                file.write(b" ")
    assert before == {p: p.read_bytes() for p in before}


def test_only_large_weights_are_linked(tmp_path, monkeypatch):
    """Eleven gigabytes of a text encoder have a second name; what is small, or is no weights, is
    copied, out of a hub's cache of links too."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    for name, size in (
        ("model.safetensors", 200),
        ("small.safetensors", 50),
        ("tokenizer.json", 500),
    ):
        (blobs / name).write_bytes(b"x" * size)
        (blobs / name).chmod(0o400)
        (snapshot / name).symlink_to(blobs / name)
    monkeypatch.setattr("kvpo.convert.wan_base.LARGE", 100)
    copy_tree(snapshot, tmp_path / "out")
    same = {p.name: p.samefile(blobs / p.name) for p in (tmp_path / "out").iterdir()}
    assert same == {"model.safetensors": True, "small.safetensors": False, "tokenizer.json": False}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").stat().st_mode & 0o200, (
        "and can be edited, although the cache's is read-only"
    )


def test_the_card_s_code_runs(capsys, runs, tmp_path, monkeypatch):
    """What an exported pipeline's README says: stock diffusers runs it bidirectionally, and this
    code runs it as a stream."""
    run(capsys, runs["lora"], "--format", "pipeline", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "Stock diffusers (`WanPipeline`) runs\nthem bidirectionally" in text
        and "kvpo generate out --prompt" in text
    )
    monkeypatch.chdir(tmp_path)
    exec(text.split("```python\n")[1].split("```")[0].replace("seconds=9", "seconds=1"), {})
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_import_run_export_import(capsys, tmp_path):
    """Round trip: a released checkpoint, aligned, merged into the released layout, imported
    again."""
    base, *_ = original_folder(tmp_path / "base")
    torch.save({"generator_ema": released_state(new_wan(0))}, tmp_path / "self_forcing_dmd.pt")
    grid = (
        "--format",
        "self-forcing",
        "--base",
        str(base),
        "--dtype",
        "float32",
        "--latent-height",
        "4",
        "--latent-width",
        "4",
        "--window",
        "9",
    )
    assert (
        cli.main(["import", str(tmp_path / "self_forcing_dmd.pt"), str(tmp_path / "start"), *grid])
        == 0
    )
    recipe = write_recipe(
        tmp_path / "r.yaml",
        settings(
            tmp_path / "start",
            steps=1,
            policy={"train": "lora", "rank": 2},
            optimizer={"lr": 0.03, "warmup": 1},
            evaluate={"scripts": 2, "batch": 2, "videos": 0},
            rollout={"branches": 3, "cache_frames": 18},
        ),
    )
    assert align(recipe, tmp_path / "run") == 0
    assert run(
        capsys,
        f"{tmp_path / 'run'}:online",
        "--format",
        "original-merged",
        "--out",
        tmp_path / "merged",
    ) == (0, "")
    assert (
        cli.main(
            ["import", str(tmp_path / "merged" / "generator.pt"), str(tmp_path / "again"), *grid]
        )
        == 0
    )

    def answer(transformer):
        with torch.no_grad():
            return CausalWan(transformer).velocity(
                draw(1, 3, 16, 4, 4), 0.8, draw(1, 24, 16, seed=1), [0, 1, 2]
            )

    ours, again = load_generator(f"{tmp_path / 'run'}:online")[0], Pipeline.load(tmp_path / "again")
    torch.testing.assert_close(
        answer(again.generator.transformer), answer(ours.generator.transformer), rtol=0, atol=2e-5
    )
    assert again.geometry == ours.geometry
    assert (answer(again.generator.transformer) - answer(new_wan(0))).abs().max() > 1e-3


# --- What is refused ---


@pytest.mark.parametrize("format", ["diffusers-lora", "peft", "original-lora", "comfyui-lora"])
def test_no_adapter_in_a_run_of_all_weights(capsys, runs, tmp_path, format):
    code, err = run(capsys, runs["full"], "--format", format, "--out", tmp_path / "out")
    assert (
        code == 1
        and "trained all weights; export it as pipeline or original-merged" in err
        and not (tmp_path / "out").exists()
    )


def test_what_is_no_run(capsys, runs, folder, tmp_path):
    for spec, message in (
        (folder, "is no run folder"),
        (f"{runs['lora']}:worst", "choose one of ema, online, start, best"),
    ):
        code, err = run(capsys, spec, "--format", "pipeline", "--out", tmp_path / "out")
        assert code == 1 and message in err and not (tmp_path / "out").exists()
    code, err = run(capsys, runs["lora"], "--format", "pipeline", "--out", tmp_path)
    assert code == 1 and "is there already" in err


def test_a_full_disk_leaves_nothing(capsys, runs, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvpo.convert.export_formats.write_atomic", full)
    code, err = run(capsys, runs["lora"], "--format", "peft", "--out", tmp_path / "out")
    assert code == 1 and "could not be written" in err and not list(tmp_path.iterdir())


def test_the_tiny_transformer_has_as_many_linear_maps_as_the_adapter(runs):
    assert sum(
        ".lora_A." in n
        for n in load_generator(str(runs["lora"]))[0].generator.transformer.state_dict()
    ) == 10 * len(new_transformer().blocks)
