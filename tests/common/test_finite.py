"""Numbers that are not finite end a command with the tensor's or the frame's name.

They never become a video, a score or a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from released import new_wan, original_folder, released_lora, released_state
from safetensors.torch import load_file, save_file
from test_align import align, equal, final, records, settings, write_recipe
from tiny import RED, draw, new_pipeline

from kvpo.commands import main as cli
from kvpo.common.finite import check_finite, is_finite, not_finite
from kvpo.policy.checkpoint import checkpoints

BAD = [float("nan"), float("inf"), float("-inf")]


# --- The check itself ---


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
def test_every_precision(dtype):
    x = draw(40, 3).to(dtype)
    assert is_finite(x) and is_finite(torch.empty(0)) and is_finite(torch.arange(3))
    for bad in BAD[:1] if dtype == torch.float8_e4m3fn else BAD:
        y = x.clone()
        y[7, 1] = torch.tensor(bad).to(dtype)
        assert not is_finite(y)


def test_large_numbers_are_finite():
    """A sum of them is not: the check may not add."""
    assert is_finite(torch.full((10,), 3e38)) and not_finite([("x", torch.full((10,), 3e38))]) == []


def test_tensors_are_named_and_counted():
    named = [("a", torch.zeros(3)), ("b", torch.tensor([1.0, float("nan"), float("inf")]))]
    with pytest.raises(
        FloatingPointError,
        match=r"w.pt holds numbers .* in 1 tensor: b \(2 of 3 numbers\); train again",
    ):
        check_finite(named, "w.pt", "train again")


# --- Commands ---


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    code = cli.main(list(map(str, argv)))
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and err[-1].startswith(f"kvpo {argv[0]}: "), err
    return err[-1]


def spoil(folder: Path, part: str, name: str, bad: float) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    state = load_file(path)
    state[name].view(-1)[3] = bad
    save_file(state, path, metadata={"format": "pt"})


COMMANDS = {
    "generate": lambda p, out: ("generate", p, "--prompt", RED, "--blocks", "2", "--out", out),
    "evaluate": lambda p, out: (
        "evaluate",
        p,
        "--recipe",
        p.parent / "r.yaml",
        "--scripts",
        "2",
        "--out",
        out / "e.json",
    ),
    "ab": lambda p, out: (
        "ab",
        p,
        p,
        "--recipe",
        p.parent / "r.yaml",
        "--scripts",
        "2",
        "--out",
        out,
    ),
    "vbench": lambda p, out: (
        "vbench",
        p,
        "--recipe",
        p.parent / "r.yaml",
        "--prompts",
        p.parent / "p.txt",
        "--seeds",
        "0",
        "--out",
        out,
    ),
    "align": lambda p, out: ("align", p.parent / "r.yaml", "--out", out),
}


@pytest.fixture
def home(folder, tmp_path):
    """A pipeline of one's own, a recipe on it and a prompt file."""
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p.txt").write_text(f"{RED}\n")
    write_recipe(
        tmp_path / "r.yaml",
        settings(tmp_path / "p", steps=1, data={"blocks": 6, "prompts": str(tmp_path / "p.txt")}),
    )
    return tmp_path / "p"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD[:2])
def test_weights(capsys, home, tmp_path, command, bad):
    """One NaN in a weight was a black video and exit code 0."""
    spoil(home, "transformer", "blocks.1.ffn.net.2.weight", bad)
    err = refused(capsys, *COMMANDS[command](home, tmp_path / "out"))
    assert (
        f"{home / 'transformer'} holds numbers that are NaN or infinite, in 1 tensor: "
        "blocks.1.ffn.net.2.weight (1 of 768 numbers)" in err
    )
    assert (
        not list((tmp_path / "out").rglob("*.mp4")) and not (tmp_path / "out" / "e.json").exists()
    )


@pytest.mark.parametrize(
    ("part", "name"), [("vae", "decoder.conv_in.weight"), ("text_encoder", "shared.weight")]
)
def test_weights_of_the_other_parts(capsys, home, tmp_path, part, name):
    spoil(home, part, name, float("nan"))
    assert (
        f"{home / part} holds numbers that are NaN"
        in (err := refused(capsys, *COMMANDS["generate"](home, tmp_path / "out")))
        and name in err
    )


@pytest.mark.parametrize(
    ("file", "key", "said"),
    [
        ("vae/config.json", "latents_std", "latents_std[2] = nan is no finite number"),
        ("transformer/config.json", "eps", "eps = nan is no finite number"),
        ("streaming.json", "shift", "shift = nan must be a number above 0 and finite"),
    ],
)
def test_numbers_of_a_description(capsys, home, tmp_path, file, key, said):
    """NaN in a JSON file is read by Python without a word; the first block then was NaN, and the
    error sent people to look at the weights, which were good."""
    path = home / file
    content = json.loads(path.read_text())
    if isinstance(content[key], list):
        content[key][2] = float("nan")
    else:
        content[key] = float("nan")
    path.write_text(json.dumps(content))
    err = refused(capsys, *COMMANDS["generate"](home, tmp_path / "out"))
    assert f"{path}: {said}" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_latents(capsys, home, tmp_path, monkeypatch, command):
    """Finite weights whose velocities overflow: the frame is named, and no file is left."""
    from kvpo.generators.causal_wan import CausalWan

    velocity = CausalWan.velocity

    def overflowing(self, x, sigma, text, frames, *args, **options):
        v = velocity(self, x, sigma, text, frames, *args, **options)
        return v * float("inf") if 3 in frames else v

    monkeypatch.setattr(CausalWan, "velocity", overflowing)
    err = refused(capsys, *COMMANDS[command](home, tmp_path / "out"))
    assert "the latents of latent frame 2" in err or "the latents of latent frame 3" in err
    assert (
        "are NaN or infinite" in err
        and not list((tmp_path / "out").rglob("*.mp4"))
        and not checkpoints(tmp_path / "out" / "checkpoints")
    )


def test_pixels(own_pipeline):
    """A VAE that overflows on latents which are finite; the video of the batch is named."""
    decoder, latents = own_pipeline.decoder(), draw(2, 3, 4, 4, 4)
    decoder(latents[:, :2])
    latents[1, 2] = (latents[1, 2] * 3e38).clamp(-3e38, 3e38)
    with pytest.raises(
        FloatingPointError,
        match="the pixels of latent frame 2 of video 1 of 2 are NaN .* of finite latents",
    ):
        decoder(latents[:, 2:])


def test_a_fork_counts_on(own_pipeline):
    decoder = own_pipeline.decoder()
    decoder(draw(1, 3, 4, 4, 4))
    for other in (decoder.fork(2), decoder.part(0, 1)):
        with pytest.raises(FloatingPointError, match="the latents of latent frame 3"):
            other(torch.full((1, 1, 4, 4, 4), float("nan")))


@pytest.mark.parametrize("bad", BAD[:2])
def test_import(capsys, tmp_path, bad):
    """In the generator, in a LoRA, and in what both make together."""
    base, *_ = original_folder(tmp_path / "base")
    good, lora = released_state(new_wan(0)), released_lora(new_wan())
    torch.save({"generator": good}, tmp_path / "good.pt")
    broken = {n: t.clone() for n, t in good.items()}
    broken["model.blocks.0.self_attn.q.weight"][1, 2] = bad
    torch.save({"generator": broken}, tmp_path / "bad.pt")
    name = "base_model.model.blocks.1.ffn.2.lora_B.weight"
    torch.save(lora | {name: lora[name] * bad}, tmp_path / "bad-lora.pt")
    torch.save({n: t * 1e20 for n, t in lora.items()}, tmp_path / "large-lora.pt")
    common = (tmp_path / "out", "--format", "longlive", "--base", base)
    assert (
        "bad.pt holds numbers that are NaN or infinite, in 1 tensor: blocks.0.attn1.to_q.weight "
        "(1 of 576" in refused(capsys, "import", tmp_path / "bad.pt", *common)
    )
    assert (
        "bad-lora.pt holds numbers"
        in (
            err := refused(
                capsys, "import", tmp_path / "good.pt", tmp_path / "bad-lora.pt", *common
            )
        )
        and "blocks.1.ffn.net.2.B" in err
    )
    err = refused(capsys, "import", tmp_path / "good.pt", tmp_path / "large-lora.pt", *common)
    assert (
        "what the LoRAs and the generator make together holds numbers" in err
        and "give a smaller --lora-scale" in err
    )
    assert not (tmp_path / "out").exists()


def test_generate_with_a_broken_lora(capsys, home, tmp_path):
    lora = {
        n: t * float("nan") for n, t in released_lora(new_pipeline().generator.transformer).items()
    }
    torch.save(lora, tmp_path / "lora.pt")
    err = refused(
        capsys, *COMMANDS["generate"](home, tmp_path / "out"), "--lora", tmp_path / "lora.pt"
    )
    assert "lora.pt holds numbers that are NaN" in err and not (tmp_path / "out").exists()


# --- Training ---


def test_an_update_that_overflows_is_never_a_checkpoint(capsys, home, tmp_path):
    err = refused(
        capsys,
        "align",
        tmp_path / "r.yaml",
        "--out",
        tmp_path / "run",
        "--optimizer.lr",
        "3e37",
        "--optimizer.weight-decay",
        "10",
        "--optimizer.warmup",
        "1",
    )
    assert (
        "update 0 left numbers that are NaN or infinite in the weights or moments of" in err
        and "it is not saved" in err
    )
    assert checkpoints(tmp_path / "run" / "checkpoints") == [] and not list(
        (tmp_path / "run").rglob("ema.safetensors")
    )


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_good_checkpoints_stay_and_resume_goes_on_from_them(
    capsys, folder, tmp_path, monkeypatch, where
):
    """A fault of the hardware in the third update: what the run has saved is whole, and the resumed
    run is the uninterrupted one, bit for bit.
    """
    recipe = write_recipe(
        tmp_path / "r.yaml", settings(folder, steps=3, checkpoint={"every": 1, "keep": 5})
    )
    assert align(recipe, tmp_path / "whole") == 0
    step, calls = torch.optim.AdamW.step, []

    def faulty(self, *args, **options):
        step(self, *args, **options)
        calls.append(1)
        if len(calls) == 3:
            p = self.param_groups[0]["params"][5]
            (p.data if where == "weight" else self.state[p]["exp_avg_sq"]).view(-1)[0] = float(
                "nan"
            )

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", faulty)
        err = refused(capsys, "align", recipe, "--out", tmp_path / "run")
    assert (
        "update 2 left numbers" in err
        and "1 tensors" in err
        and "go on from the newest by --resume" in err
    )
    assert [c.name for c in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000001",
        "step-000002",
    ]
    assert all(is_finite(t) for t in final(tmp_path / "run").values())
    assert align(recipe, tmp_path / "run", "--resume") == 0
    assert equal(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert records(tmp_path / "run", evaluations=False) == records(
        tmp_path / "whole", evaluations=False
    )


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN or infinite"), (0.0, "all zero")])
def test_embeddings(own_pipeline, monkeypatch, value, what):
    """A text encoder of finite weights that overflows ended in `max(): Expected reduction dim`,
    or its embeddings of NaN were kept, and read again by every later run."""
    text, length = "a red circle rises slowly", own_pipeline.geometry.text_length
    x_PLD = torch.full((1, length, 16), value)
    monkeypatch.setattr(own_pipeline.stock, "encode_prompt", lambda *_, **__: (x_PLD, None))
    with pytest.raises(FloatingPointError, match=f"'{text}' is {what}; the text encoder in"):
        own_pipeline.encode_text([text])
    assert not own_pipeline.known
