"""LoRAs in every form that people have, merged as diffusers merges them.

What comes out equals what `WanPipeline.load_lora_weights` and `fuse_lora` make of the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import RED, draw, new_pipeline, new_transformer, save_pipeline

from kvpo.commands import main as cli
from kvpo.common.video import read_mp4
from kvpo.convert.lora import add_lora, merge, read_lora
from kvpo.convert.wan_names import diffusers_to_original
from kvpo.policy.policy import Policy, PolicyConfig

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "lora"
"""Files of the kinds that users have brought, where the checkout has them."""
RANK, ALPHA = 4, 1.0
EVERY = [
    f"blocks.{i}.{m}"
    for i in range(2)
    for m in (
        *(f"attn{a}.to_{x}" for a in (1, 2) for x in ("q", "k", "v", "out.0")),
        "ffn.net.0.proj",
        "ffn.net.2",
    )
]
SOME = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_v", "blocks.0.ffn.net.0.proj")


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return new_transformer().state_dict()


def halves(
    modules=EVERY, rank: Callable[[str], int] = lambda module: RANK
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, A, B), deterministic."""
    weights = new_transformer().state_dict()
    for i, module in enumerate(modules):
        out, into = weights[f"{module}.weight"].shape
        yield (
            module,
            0.5 * draw(rank(module), into, seed=2 * i),
            0.5 * draw(out, rank(module), seed=2 * i + 1),
        )


def original(module: str) -> str:
    (name,) = diffusers_to_original({f"{module}.weight": torch.zeros(1)})
    return name.removesuffix(".weight")


def header(**settings) -> dict[str, str]:
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()}),
    }


def diffusers_form(path: Path, modules=EVERY, metadata=None, rank=lambda module: RANK) -> Path:
    state = {
        f"transformer.{m}.lora_{h}.weight": t
        for m, A, B in halves(modules, rank)
        for h, t in (("A", A), ("B", B))
    }
    save_file(state, path, metadata=metadata)
    return path


def comfy_form(
    path: Path, names=("lora_down", "lora_up"), alpha: float | None = ALPHA, modules=EVERY
) -> Path:
    state = {
        f"diffusion_model.{original(m)}.{n}.weight": t
        for m, A, B in halves(modules)
        for n, t in zip(names, (A, B))
    }
    state |= {
        f"diffusion_model.{original(m)}.alpha": torch.tensor(alpha)
        for m in modules
        if alpha is not None
    }
    save_file(state, path)
    return path


def kohya_form(path: Path) -> Path:
    def flat(module):
        return f"lora_unet_{original(module).replace('.', '_')}"

    state = {
        f"{flat(m)}.{n}.weight": t
        for m, A, B in halves()
        for n, t in (("lora_down", A), ("lora_up", B))
    }
    save_file(state | {f"{flat(m)}.alpha": torch.tensor(ALPHA) for m in EVERY}, path)
    return path


def peft_folder(
    folder: Path, modules=SOME, names: Callable[[str], str] = lambda module: module, **settings
) -> Path:
    folder.mkdir()
    state = {
        f"base_model.model.{names(m)}.lora_{h}.weight": t
        for m, A, B in halves(modules)
        for h, t in (("A", A), ("B", B))
    }
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [names(m) for m in modules],
        "bias": "none",
    } | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_diffusers(path: Path) -> dict[str, torch.Tensor]:
    """The transformer's weights after diffusers has loaded and fused the file."""
    stock = WanPipeline(None, None, None, None, new_transformer())
    stock.load_lora_weights(path)
    stock.fuse_lora(components=["transformer"])
    stock.unload_lora_weights()
    return stock.transformer.state_dict()


def by_peft(folder: Path) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(new_transformer(), folder).merge_and_unload().state_dict()


def by_us(path: Path, base, strength: float = 1.0) -> dict[str, torch.Tensor]:
    state = dict(base)
    merge(state, read_lora(path), strength, str(path))
    return state


def same(got, expected, base) -> None:
    """To 1e-6, and far from the base."""
    assert got.keys() == expected.keys() == base.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            got[name], weight, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert max(float((got[n] - t).abs().max()) for n, t in base.items()) > 0.1


FORMS = {
    "diffusers without alpha": diffusers_form,
    "diffusers with alpha": lambda p: diffusers_form(
        p, metadata=header(r=RANK, lora_alpha=ALPHA, target_modules=EVERY)
    ),
    "rslora": lambda p: diffusers_form(
        p, metadata=header(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=EVERY)
    ),
    "patterns": lambda p: diffusers_form(
        p,
        rank=lambda m: 2 if m.startswith("blocks.1") else RANK,
        metadata=header(
            r=RANK,
            lora_alpha=8,
            rank_pattern={r"blocks\.1\..*": 2},
            alpha_pattern={"to_q": 3, "blocks.0.ffn.net.2": 0.5},
            target_modules=EVERY,
        ),
    ),
    "several ranks, no alpha": lambda p: diffusers_form(
        p, rank=lambda m: 2 if "ffn" in m else RANK
    ),
    "comfy, lora_A": lambda p: comfy_form(p, ("lora_A", "lora_B"), None),
    "comfy, lora_down, alpha": comfy_form,
    "comfy, lora_down, no alpha": lambda p: comfy_form(p, alpha=None),
    "kohya": kohya_form,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_diffusers_makes_of_it(tmp_path, base, form):
    """Half of these were merged at 1 instead of alpha / rank, silently; the others were "no half of
    a LoRA".
    """
    path = FORMS[form](tmp_path / "lora.safetensors")
    same(by_us(path, base), by_diffusers(path), base)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 6}}, {"r": RANK, "lora_alpha": 8}],
    ids=str,
)
def test_a_peft_folder_is_a_lora(tmp_path, base, settings):
    """The folder "did not exist", and its file alone was merged at 1."""
    folder = peft_folder(tmp_path / "adapter", **settings)
    same(by_us(folder, base), by_peft(folder), base)
    same(by_us(folder / "adapter_model.safetensors", base), by_peft(folder), base)


def test_a_peft_folder_of_the_original_names(tmp_path, base):
    """Patterns of the config are matched against the names that its trainer knew."""
    ours = peft_folder(tmp_path / "diffusers", alpha_pattern={"attn1.to_q": 6})
    theirs = peft_folder(tmp_path / "original", names=original, alpha_pattern={"self_attn.q": 6})
    same(by_us(theirs, base), by_peft(ours), base)


def test_two_loras_under_two_prefixes(tmp_path):
    """The second one's halves took the place of the first one's, silently."""
    path = diffusers_form(tmp_path / "lora.safetensors")
    again = {
        n.replace("transformer.", "diffusion_model."): t + 1 for n, t in load_file(path).items()
    }
    save_file(load_file(path) | again, path)
    refused(path, "holds two LoRAs of .*, under different names")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_from_another_editor(tmp_path, encoding):
    """A byte order mark was "not JSON; copy it again"."""
    folder = peft_folder(tmp_path / "adapter", lora_alpha=6)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8"), encoding=encoding)
    assert {low.scale for low in read_lora(folder).values()} == {1.5}


def test_a_renamed_file_keeps_its_config(tmp_path, base):
    """Under another name the file was merged at 1, and its folder was none of a LoRA."""
    folder = peft_folder(tmp_path / "adapter", lora_alpha=6)
    (folder / "adapter_model.safetensors").rename(folder / "style.safetensors")
    for path in (folder, folder / "style.safetensors"):
        assert {low.scale for low in read_lora(path).values()} == {1.5}
    diffusers_form(folder / "other.safetensors", SOME)
    refused(folder, "holds 2 weight files, other.safetensors, style.safetensors; give the one")
    peft_folder(tmp_path / "second", lora_alpha=2)
    (tmp_path / "second" / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    assert {low.scale for low in read_lora(folder / "style.safetensors").values()} == {1.0}


def test_alpha_in_the_notes_of_kohya_s_trainer(tmp_path):
    """It was merged at 1 where the file has no alpha tensors; tensors come first where they are."""
    whole = load_file(kohya_form(tmp_path / "whole.safetensors"))
    notes = {"ss_network_dim": str(RANK), "ss_network_alpha": "2.0"}
    plain = {n: t for n, t in whole.items() if not n.endswith(".alpha")}
    for state, scale in ((plain, 2 / RANK), (whole, ALPHA / RANK)):
        save_file(state, tmp_path / "lora.safetensors", metadata=notes)
        assert {low.scale for low in read_lora(tmp_path / "lora.safetensors").values()} == {scale}
    save_file(plain, tmp_path / "lora.safetensors", metadata=notes | {"ss_network_alpha": "much"})
    refused(tmp_path / "lora.safetensors", "ss_network_alpha in its header is 'much'; it must be")


def renamed(path: Path, change: Callable[[str], str]) -> Path:
    plain = {f"{m}.lora_{h}.weight": t for m, A, B in halves() for h, t in (("A", A), ("B", B))}
    save_file({change(name): t for name, t in plain.items()}, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"module.{n}",
        lambda n: f"model.diffusion_model.{n}",
        lambda n: f"module.model.{n}",
        lambda n: f"pipe.dit.{n}",
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: f"base_model.model.{n}".replace(".weight", ".style.weight"),
        lambda n: n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    ],
    ids=[
        "DDP",
        "model.diffusion_model",
        "DDP and trainer",
        "a whole pipeline's",
        "named adapter",
        "named adapter of peft",
        "old diffusers",
    ],
)
def test_wrappers_and_adapter_names_are_taken_off(tmp_path, base, change):
    path = renamed(tmp_path / "lora.safetensors", change)
    plain = diffusers_form(tmp_path / "plain.safetensors")
    same(by_us(path, base), by_diffusers(plain), base)


def test_a_lora_with_biases(tmp_path, base):
    """`diff_b` of ComfyUI's files is what peft calls the bias of a LoRA."""
    path = comfy_form(tmp_path / "lora.safetensors", alpha=None)
    state = load_file(path) | {
        f"diffusion_model.{original(m)}.diff_b": draw(len(base[f"{m}.bias"]), seed=7) for m in EVERY
    }
    save_file(state, path)
    same(by_us(path, base), by_diffusers(path), base)


def test_the_strength_multiplies_as_in_diffusers(tmp_path, base):
    """--lora-scale is the user's weight: it multiplies the stored alpha / rank and never replaces
    it.
    """
    path = FORMS["diffusers with alpha"](tmp_path / "lora.safetensors")
    stock = WanPipeline(None, None, None, None, new_transformer())
    stock.load_lora_weights(path)
    stock.fuse_lora(components=["transformer"], lora_scale=0.5)
    stock.unload_lora_weights()
    same(by_us(path, base, 0.5), stock.transformer.state_dict(), base)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("diffusers_alpha_in_header.safetensors", 0.25),
        ("peft_folder", 0.25),
        ("peft_folder/adapter_model.safetensors", 0.25),
        ("comfy_prefix.safetensors", 1.0),
        ("comfy_down_up_alpha.safetensors", None),
        ("kohya.safetensors", None),
        ("ddp_module.safetensors", 1.0),
    ],
)
def test_the_files_that_users_brought(base, name, scale):
    if not CASES.is_dir():
        pytest.skip("shared/cases is not beside this checkout")
    adapter = read_lora(CASES / name)
    assert len(adapter) == 3 and set(adapter) <= set(EVERY)
    if scale is None:  # the alpha tensors, read by hand
        state = load_file(CASES / name)
        (scale,) = {float(t) / RANK for n, t in state.items() if n.endswith(".alpha")}
    assert {low.scale for low in adapter.values()} == {scale}
    merge(dict(base), adapter, 1.0, name)


# --- The commands ---


def generate(folder: Path, lora: Path, out: Path, *options: str) -> int:
    """The exit code of one video with a LoRA on top."""
    argv = ["generate", str(folder), "--prompt", RED, "--lora", str(lora), "--out", str(out)]
    return cli.main([*argv, *options])


def test_generate_takes_every_form(capsys, tmp_path):
    """One LoRA in three forms makes one video; what is merged, and at which scale, is said."""
    folder, videos = save_pipeline(tmp_path / "p"), set()
    forms = {
        "header": diffusers_form(
            tmp_path / "a.safetensors", SOME, header(r=RANK, lora_alpha=ALPHA)
        ),
        "folder": peft_folder(tmp_path / "adapter"),
        "comfy": comfy_form(tmp_path / "c.safetensors", modules=SOME),
    }
    for name, path in forms.items():
        assert generate(folder, path, tmp_path / name, "--blocks", "2") == 0
        assert (
            "LoRA of rank 4 on 3 modules, its own alpha / rank 0.25, times --lora-scale 1"
            in capsys.readouterr().out
        )
        videos.add(read_mp4(tmp_path / name / "000.mp4")[0].numpy().tobytes())
    assert len(videos) == 1


def test_a_lora_on_top_of_a_run_s_own_adapter(tmp_path, base):
    """A run's weights lie under `base_layer`, and every LoRA was then "of another base"."""
    pipeline, path = new_pipeline(), comfy_form(tmp_path / "lora.safetensors")
    Policy(pipeline.generator, PolicyConfig(rank=2), 0)
    add_lora(pipeline, path, 1.0)
    got = {
        n.replace(".base_layer.", "."): t
        for n, t in pipeline.generator.transformer.state_dict().items()
        if ".lora_" not in n
    }
    same(got, by_us(path, base), base)


# --- What is refused ---


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lora(path)


def test_scales_that_contradict_each_other(tmp_path):
    """Alpha tensors against the header, the header against adapter_config.json, the rank against
    the tensors.
    """
    path = comfy_form(tmp_path / "both.safetensors")
    save_file(load_file(path), path, metadata=header(r=RANK, lora_alpha=4))
    refused(
        path,
        r"the scale alpha / rank of blocks\.0\.\S+ is 1 by lora_adapter_metadata in the header of "
        r"both.safetensors and 0.25 by .*\.alpha; they contradict each other",
    )
    save_file(load_file(path), path, metadata=header(r=RANK, lora_alpha=ALPHA))
    assert {low.scale for low in read_lora(path).values()} == {0.25}

    folder = peft_folder(tmp_path / "adapter", lora_alpha=2)
    diffusers_form(folder / "adapter_model.safetensors", SOME, header(r=RANK, lora_alpha=ALPHA))
    refused(
        folder, "0.25 by lora_adapter_metadata .* and 0.5 by adapter_config.json; they contradict"
    )
    refused(
        diffusers_form(tmp_path / "rank.safetensors", metadata=header(r=8, lora_alpha=8)),
        "states rank 8 for blocks.* tensors have rank 4",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "sets use_dora, so its halves alone are not its change"),
        ({"init_lora_weights": "pissa_niter_16"}, "sets init_lora_weights pissa_niter_16"),
        ({"peft_type": "LOHA"}, "describes a LOHA; only plain LoRAs can be read"),
        ({"lora_alpha": "much"}, "states r = 4 and lora_alpha = 'much'; both must be numbers"),
        ({"lora_alpha": float("nan")}, "must be a finite number"),
    ],
)
def test_configs_of_other_kinds(tmp_path, settings, message):
    refused(peft_folder(tmp_path / "adapter", **settings), message)


def test_a_config_without_alpha_and_a_header_that_is_no_json(tmp_path):
    folder = peft_folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"r": 4}')
    refused(folder, "states no lora_alpha")
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "adapter_config.json is not JSON")
    refused(
        diffusers_form(tmp_path / "h.safetensors", metadata={"lora_adapter_metadata": "r=4"}),
        "in the header of h.safetensors is not JSON",
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "a DoRA"),
        ("transformer.blocks.0.attn1.to_q.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "a LoKr"),
        ("lora_unet_blocks_0_ffn_0.hada_w1_a", "a LoHa"),
        (
            "diffusion_model.blocks.0.self_attn.norm_q.diff",
            "holds diffusion_model.blocks.0.self_attn.norm_q.diff, which is no half of a LoRA",
        ),
        (
            "lora_unet_input_blocks_1_1_proj_in.lora_down.weight",
            "a name of kohya's trainers that is no module of Wan's transformer",
        ),
        ("transformer.blocks.0.attn1.to_q.lora_A.other.weight", None),
    ],
)
def test_kin_of_loras_are_named(tmp_path, name, kind):
    path = diffusers_form(tmp_path / "x.safetensors")
    if kind is None:
        renamed(path, lambda n: n.replace(".weight", ".default.weight"))
    save_file(load_file(path) | {name: torch.ones(4, 24)}, path)
    refused(path, kind or "holds 2 adapters, default, other; save the one that is meant alone")


def test_differences_that_are_zero_are_nothing(tmp_path, base):
    path = comfy_form(tmp_path / "x.safetensors")
    save_file(
        load_file(path) | {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(24)}, path
    )
    same(by_us(path, base), by_diffusers(path), base)


def test_a_generator_is_no_lora(tmp_path, base):
    save_file({n: t.contiguous() for n, t in base.items()}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "is no half of a LoRA")


@pytest.mark.parametrize("strength", ["nan", "inf"])
def test_a_strength_that_is_no_number(capsys, tmp_path, strength):
    folder, lora = save_pipeline(tmp_path / "p"), diffusers_form(tmp_path / "a.safetensors")
    assert generate(folder, lora, tmp_path / "v", "--lora-scale", strength) == 1
    assert "is no strength of a LoRA; give a finite number" in capsys.readouterr().err
