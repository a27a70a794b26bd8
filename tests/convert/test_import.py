"""Released checkpoints of every format, tiny: imported, loaded, and equal to what their tensors
say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import golden
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from released import SIZES, new_wan, original_folder, released_lora, released_state
from safetensors.torch import load_file, save_file
from test_golden_generator import ATOL
from tiny import draw, embed, new_stream, save_pipeline, story
from transformers import AutoTokenizer

from kvpo.commands import main as cli
from kvpo.convert.import_released import FORMATS
from kvpo.convert.lora import adapter_of, merge
from kvpo.convert.wan_base import open_base
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.planning.costs import VAE_2_2

SMALL = ("--latent-height", "4", "--latent-width", "4")


def run(capsys, *argv) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["import", *map(str, argv)])
    return code, capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return original_folder(tmp_path_factory.mktemp("wan") / "Wan2.1-T2V-1.3B")


@pytest.fixture(scope="module")
def diffusers_base(tmp_path_factory, original):
    """The same parts in diffusers layout, with a transformer that nothing takes."""
    _folder, vae, text_encoder = original
    target = save_pipeline(tmp_path_factory.mktemp("wan-diffusers") / "Wan2.1-T2V-1.3B-Diffusers")
    (target / "streaming.json").unlink()
    vae.save_pretrained(target / "vae")
    text_encoder.to(torch.bfloat16).save_pretrained(target / "text_encoder")
    new_wan(7).save_pretrained(target / "transformer")
    return target


def velocity(transformer: WanTransformer3DModel) -> torch.Tensor:
    with torch.no_grad():
        return CausalWan(transformer).velocity(
            draw(1, 3, 16, 4, 4), 0.8, draw(1, 24, 16, seed=1).to(transformer.dtype), [0, 1, 2]
        )


FILES = {
    "self-forcing": {
        "self_forcing_dmd.pt": lambda: {
            "generator": released_state(new_wan(8)),
            "generator_ema": released_state(new_wan(0), wrapper="_fsdp_wrapped_module."),
        }
    },
    "causal-forcing": {"causal_forcing.pt": lambda: {"generator_ema": released_state(new_wan(0))}},
    "longlive": {
        "longlive_base.pt": lambda: {"generator": released_state(new_wan(0))},
        "lora.pt": lambda: {"generator_lora": released_lora(new_wan())},
    },
    "memflow": {
        "base.pt": lambda: {"generator": released_state(new_wan(0))},
        "lora.pt": lambda: released_lora(new_wan()),
    },
    "kvpo": {
        "longlive_base.pt": lambda: {"generator": released_state(new_wan(0)), "step": 2},
        "checkpoint_samples_000000002.pt": lambda: {
            "generator_lora": released_lora(new_wan()),
            "step": 2,
        },
    },
}


def write_files(folder: Path, name: str) -> list[Path]:
    for file, content in FILES[name].items():
        torch.save(content(), folder / file)
    return [folder / file for file in FILES[name]]


def expected(name: str) -> WanTransformer3DModel:
    transformer = new_wan(0)
    if len(FILES[name]) > 1:
        state = transformer.state_dict()
        merge(state, adapter_of(released_lora(new_wan()), Path("lora.pt")), 1.0, "lora.pt")
        transformer.load_state_dict(state)
    return transformer


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_format(capsys, tmp_path, original, diffusers_base, name, layout):
    base = original[0] if layout == "original" else diffusers_base
    files = write_files(tmp_path, name)
    assert run(
        capsys,
        "--format",
        name,
        *files,
        "--base",
        base,
        tmp_path / "out",
        "--dtype",
        "float32",
        *SMALL,
    ) == (0, "")
    pipeline = Pipeline.load(tmp_path / "out")
    torch.testing.assert_close(
        velocity(pipeline.generator.transformer), velocity(expected(name)), rtol=0, atol=0
    )
    for ours, theirs in ((pipeline.vae, original[1]), (pipeline.stock.text_encoder, original[2])):
        wanted = theirs.state_dict()
        assert all(
            torch.equal(t, wanted[n].bfloat16().float() if ours is not pipeline.vae else wanted[n])
            for n, t in ours.state_dict().items()
        )
    assert pipeline.geometry == Geometry(
        3,
        0 if "forcing" in name else 3,
        21 if "forcing" in name else 12,
        4,
        4,
        16,
        512,
        bank=3 if name == "memflow" else 0,
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        all(f.name in card and hashlib.sha256(f.read_bytes()).hexdigest() in card for f in files)
        and FORMATS[name].licence in card
        and FORMATS[name].source in card
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES[name], "out"])


def test_an_imported_pipeline_streams_and_is_stock(capsys, tmp_path, original):
    (file,) = write_files(tmp_path, "self-forcing")
    run(
        capsys,
        file,
        tmp_path / "out",
        "--format",
        "self-forcing",
        "--base",
        original[0],
        *SMALL,
        "--window=9",
    )
    pipeline = Pipeline.load(tmp_path / "out", dtype=torch.bfloat16)
    stream = new_stream(pipeline, story(4))
    assert all(stream.advance().isfinite().all() for _ in range(4))
    stock = WanPipeline.from_pretrained(tmp_path / "out")
    assert (
        isinstance(stock.transformer, WanTransformer3DModel) and stock.scheduler.config.shift == 5.0
    )
    assert len(embed(pipeline, story(4))) == 1


def test_krea_s_file_is_flat(capsys, tmp_path, original):
    """One safetensors file of original names under `model.`, and a window of 3 frames and a block;
    the sizes, 14B at full size, are the base's."""
    file = tmp_path / "krea-realtime-video-14b.safetensors"
    save_file({n: t.clone() for n, t in released_state(new_wan(0)).items()}, file)
    argv = (file, tmp_path / "out", "--format", "krea", "--base", original[0], *SMALL)
    assert run(capsys, *argv, "--dtype", "float32") == (0, "")
    pipeline = Pipeline.load(tmp_path / "out")
    assert pipeline.geometry == Geometry(3, 0, 6, 4, 4, 16, 512)
    torch.testing.assert_close(
        velocity(pipeline.generator.transformer), velocity(new_wan(0)), rtol=0, atol=0
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its own inference differs: before every block it encodes" in card and "Wan2.1" in card


@pytest.fixture(scope="module")
def base_2_2(tmp_path_factory, diffusers_base):
    """Wan2.2-TI2V-5B's kind: 48 latent channels, and a VAE that makes 16 x 16 pixels of one."""
    target = tmp_path_factory.mktemp("wan2.2") / "Wan2.2-TI2V-5B-Diffusers"
    shutil.copytree(diffusers_base, target)
    small = VAE_2_2 | {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
    for part in ("vae", "transformer"):
        shutil.rmtree(target / part)
    AutoencoderKLWan(**small).save_pretrained(target / "vae")
    new_wan(7, channels=48).save_pretrained(target / "transformer")
    return target


def test_longlive_2_streams_on_wan_2_2(capsys, tmp_path, base_2_2, original):
    """Blocks of 8 latent frames; 16 pixels a latent. On another base the file is refused."""
    file = tmp_path / "model_bf16.pt"
    torch.save({"generator": released_state(new_wan(0, channels=48), torch.bfloat16)}, file)
    argv = (file, tmp_path / "out", "--format", "longlive-2", *SMALL)
    code, err = run(capsys, *argv, "--base", original[0])
    assert code == 1 and "does not fit the transformer of the base" in err
    assert run(capsys, *argv, "--base", base_2_2) == (0, "")
    pipeline = Pipeline.load(tmp_path / "out")
    assert pipeline.geometry == Geometry(8, 8, 32, 4, 4, 24, 512)
    stream = new_stream(pipeline, story(2))
    pixels = pipeline.decoder()(torch.cat([stream.advance(), stream.advance()], dim=1))
    assert pixels.shape == (1, 61, 3, 64, 64)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "VAE from Wan2.2" in card and "Its own inference differs: it solves with UniPC" in card


def test_half_precision_keeps_what_diffusers_keeps(capsys, tmp_path, original):
    files = write_files(tmp_path, "longlive")
    run(capsys, *files, tmp_path / "out", "--format", "longlive", "--base", original[0])
    state = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    full = expected("longlive").state_dict()
    assert {t.dtype for t in state.values()} == {torch.bfloat16, torch.float32}
    assert torch.equal(state["scale_shift_table"], full["scale_shift_table"])
    assert torch.equal(
        state["blocks.0.ffn.net.2.weight"], full["blocks.0.ffn.net.2.weight"].bfloat16()
    ), "merged in float32, rounded once"


def test_the_other_weights_of_a_file_and_a_scale(capsys, tmp_path, original):
    (file,) = write_files(tmp_path, "self-forcing")
    lora = tmp_path / "lora.pt"
    torch.save(released_lora(new_wan()), lora)
    code, _ = run(
        capsys,
        file,
        lora,
        tmp_path / "out",
        "--format",
        "self-forcing",
        "--base",
        original[0],
        "--which",
        "generator",
        "--lora-scale",
        "0.5",
        "--dtype",
        "float32",
    )
    state = new_wan(8).state_dict()
    merge(state, adapter_of(released_lora(new_wan()), lora), 0.5, "lora")
    got = Pipeline.load(tmp_path / "out").generator.transformer.state_dict()
    assert code == 0 and all(torch.equal(got[n], t) for n, t in state.items())


def test_the_vae_is_found_by_its_names(original):
    """Every name of the released VAE file, so that a renamed block would show."""
    names = set(torch.load(original[0] / "Wan2.1_VAE.pth", weights_only=True))
    assert {
        "conv1.weight",
        "encoder.downsamples.2.resample.1.weight",
        "encoder.downsamples.5.time_conv.weight",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.middle.1.to_qkv.weight",
        "decoder.head.2.bias",
    } <= names
    assert len(names) == len(AutoencoderKLWan(base_dim=4).state_dict())


def test_a_linked_part_is_no_copy(capsys, tmp_path, diffusers_base, monkeypatch):
    """Of large weights; the config beside them is a file of its own."""
    monkeypatch.setattr("kvpo.convert.wan_base.LARGE", 1)
    (file,) = write_files(tmp_path, "causal-forcing")
    run(capsys, file, tmp_path / "out", "--format", "causal-forcing", "--base", diffusers_base)
    weights = Path("text_encoder/model.safetensors")
    assert (tmp_path / "out" / weights).samefile(diffusers_base / weights)
    assert not (tmp_path / "out" / "text_encoder" / "config.json").samefile(
        diffusers_base / "text_encoder" / "config.json"
    )


# --- Golden ---


@golden.skip_without(
    "longlive_lora.safetensors", "longlive_lora.json", "lora.safetensors", "weights.safetensors"
)
@pytest.mark.parametrize("adapted", [True, False])
def test_golden_lora(capsys, tmp_path, adapted):
    """The released files' own layout, imported, gives what the reference module wrapped by peft
    gave."""
    config, tensors = golden.case("longlive_lora")
    m, g = config["model"], config["geometry"]
    base, *_ = original_folder(tmp_path / "base")
    names = {
        "dim": "dim",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "text_dim": "text_dim",
    }
    (base / "config.json").write_text(
        json.dumps(SIZES | {ours: m[theirs] for ours, theirs in names.items()})
    )
    torch.save(
        {"generator": golden.read_tensors(config["weights"].removesuffix(".safetensors"))},
        tmp_path / "longlive_base.pt",
    )
    torch.save({"generator_lora": golden.read_tensors("lora")}, tmp_path / "lora.pt")
    files = [tmp_path / "longlive_base.pt", *([tmp_path / "lora.pt"] if adapted else [])]
    grid = (
        "--latent-height",
        g["height"],
        "--latent-width",
        g["width"],
        "--sink",
        g["sink"],
        "--window",
        g["window"],
    )
    assert run(
        capsys,
        "--format",
        "longlive",
        *files,
        "--base",
        base,
        tmp_path / "out",
        "--dtype",
        "float32",
        *grid,
    ) == (0, "")
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    model, geometry = CausalWan(transformer), Geometry.read(tmp_path / "out" / "streaming.json")
    F, text = geometry.block, tensors["text"]
    cache = model.new_cache(
        g["capacity"],
        geometry.latent_height,
        geometry.latent_width,
        rows=len(text),
        sink=geometry.sink,
    )
    wanted = tensors["velocity" if adapted else "velocity_without_lora"]
    for b, (inputs, outputs) in enumerate(zip(tensors["inputs"], wanted)):
        frames = list(range(b * F, (b + 1) * F))
        past = geometry.history.past(frames[0], F)
        for z, v, t in zip(inputs, outputs, config["timesteps_per_pass"], strict=True):
            with torch.no_grad():
                got = (
                    model.commit(z, text, frames, cache, past)
                    if t == 0
                    else model.velocity(z, t / 1000.0, text, frames, cache, past)
                )
            torch.testing.assert_close(got, v, atol=ATOL, rtol=0)


# --- What is refused ---


def refused(capsys, tmp_path, *argv) -> str:
    """The one line; and nothing is left behind."""
    before = sorted(tmp_path.rglob("*"))
    code, err = run(capsys, *argv)
    assert code == 1 and err.startswith("kvpo import: ") and "\n" not in err, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_bad_files(capsys, tmp_path, original):
    base, out = original[0], tmp_path / "out"
    (good,) = write_files(tmp_path, "causal-forcing")
    torch.save(released_lora(new_wan()), tmp_path / "lora.pt")
    torch.save(released_lora(new_wan(dim=32)), tmp_path / "other-lora.pt")
    torch.save({"generator": released_state(new_wan(dim=32))}, tmp_path / "other.pt")
    short = released_state(new_wan())
    short.pop("model.head.head.bias"), short.update({"model.img_emb.proj.0.weight": torch.zeros(1)})
    torch.save({"generator": short}, tmp_path / "short.pt")
    torch.save({"critic": {"x": torch.zeros(1)}}, tmp_path / "critic.pt")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-500])
    common = ("--format", "causal-forcing", "--base", base)
    for files, message in (
        ([good], "give the checkpoint's files and then the folder to write"),
        ([tmp_path / "nothing.pt", out], "nothing.pt does not exist"),
        ([tmp_path / "cut.pt", out], "cut.pt is not a whole checkpoint"),
        ([tmp_path / "lora.pt", out], "0 of the 1 files hold a generator (none); give exactly one"),
        ([good, good, out], "2 of the 2 files hold a generator"),
        ([good, tmp_path / "other-lora.pt", out], "is the LoRA of another base"),
        ([tmp_path / "other.pt", out], "misshapen: blocks.0.attn1.norm_k.weight [32] for [24]"),
        (
            [tmp_path / "short.pt", out],
            "1 missing: proj_out.bias; 1 surplus: condition_embedder.image_embedder.norm1.weight",
        ),
        ([tmp_path / "critic.pt", out], "critic.pt holds no generator"),
        ([good, base], "is there already"),
    ):
        assert message in refused(capsys, tmp_path, *files, *common)
    assert (
        "holds no generator: none of generator is in it, and its top holds ['generator_ema']"
        in refused(capsys, tmp_path, good, out, *common, "--which", "generator")
    )
    assert "latent_width = 7 is not a multiple of the transformer's patch, 2" in refused(
        capsys, tmp_path, good, out, *common, "--latent-width", "7"
    )
    assert "window = 2 has no room" in refused(
        capsys, tmp_path, good, out, *common, "--window", "2"
    )


def test_bad_bases(capsys, tmp_path, original, diffusers_base, monkeypatch):
    (good,) = write_files(tmp_path, "causal-forcing")
    out, kind = tmp_path / "out", ("--format", "causal-forcing")
    assert "is no folder; give Wan2.1's own folder" in refused(
        capsys, tmp_path, good, out, *kind, "--base", "./nowhere"
    )
    (tmp_path / "half").mkdir()
    assert "missing" in refused(capsys, tmp_path, good, out, *kind, "--base", tmp_path / "half")
    folder, *_ = original_folder(tmp_path / "i2v")
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "i2v"}))
    assert "a model of type 'i2v'; the base must be a text-to-video model" in refused(
        capsys, tmp_path, good, out, *kind, "--base", folder
    )
    (folder / "config.json").write_text(json.dumps(SIZES))
    torch.save({"x": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")
    assert "holds no Wan2.1 VAE" in refused(capsys, tmp_path, good, out, *kind, "--base", folder)

    def offline(*args, **kwargs):
        raise OSError("no route to the hub\nand more")

    monkeypatch.setattr("kvpo.convert.wan_base.snapshot_download", offline)
    assert "could not be downloaded (no route to the hub)" in refused(
        capsys, tmp_path, good, out, *kind, "--base", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def test_a_hub_id_is_downloaded(tmp_path, original, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kvpo.convert.wan_base.snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(original[0]),
    )
    assert open_base("Wan-AI/Wan2.1-T2V-1.3B").folder == original[0]
    assert asked[0][0] == "Wan-AI/Wan2.1-T2V-1.3B" and not any(
        "diffusion_pytorch_model" in p for p in asked[0][1]
    )


def test_a_full_disk_leaves_nothing(capsys, tmp_path, original, monkeypatch):
    (good,) = write_files(tmp_path, "causal-forcing")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvpo.convert.import_released.write_atomic", full)
    assert "could not be written" in refused(
        capsys,
        tmp_path,
        good,
        tmp_path / "out",
        "--format",
        "causal-forcing",
        "--base",
        original[0],
    )


def test_the_tokenizer_is_the_base_s(capsys, tmp_path, original):
    (good,) = write_files(tmp_path, "causal-forcing")
    run(capsys, good, tmp_path / "out", "--format", "causal-forcing", "--base", original[0])
    text = "a red circle rises slowly"
    ours, theirs = (
        AutoTokenizer.from_pretrained(f)(text).input_ids
        for f in (tmp_path / "out" / "tokenizer", original[0] / "google" / "umt5-xxl")
    )
    assert ours == theirs
