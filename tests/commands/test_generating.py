"""`kvpo generate`: written while it is made, in the same memory whatever the length, or not at
all."""

from __future__ import annotations

import json

import pytest
import torch
from released import released_lora
from tiny import (
    BLUE,
    GEOMETRY,
    RED,
    embed,
    new_pipeline,
    new_stream,
    save_pipeline,
    story,
    with_geometry,
)

from kvpo.commands import main as cli
from kvpo.commands.generate import Generate
from kvpo.common.video import Mp4Writer, encode_mp4, read_about, read_mp4
from kvpo.generators.generate import generate, streamed
from kvpo.generators.geometry import block_at
from kvpo.generators.sampler import SAMPLERS
from kvpo.planning.peak import Ledger
from kvpo.runs.loading import load_pipeline


def run(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["generate", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err.strip().splitlines()[-1] if said.err.strip() else ""


# --- Times ---


def test_times_by_hand():
    """Blocks of 2 latent frames at 16 frames a second: block b > 0 begins at pixel frame 8 b -
    3."""
    assert [block_at(s, GEOMETRY) for s in (0.01, 5 / 16, 13 / 16, 17.1 / 16, 45 / 16)] == [
        1,
        1,
        2,
        3,
        6,
    ]
    assert [
        block_at(s, GEOMETRY, up=True) for s in (1 / 16, 5 / 16, 5.1 / 16, 13 / 16, 14 / 16)
    ] == [1, 1, 2, 2, 3]


def test_scripts_of_options(tmp_path):
    (tmp_path / "s.txt").write_text(f"2,[{RED}],[{BLUE}]\n1,[{RED}]\n")
    (one,) = Generate(prompt=(RED, BLUE), seconds=3.0, at=(1.0,)).scripts(GEOMETRY)
    assert (one.blocks, one.starts, one.texts) == (7, (0, 2), (RED, BLUE))
    two, three = Generate(prompts=tmp_path / "s.txt", blocks=6, at=(1.0,)).scripts(GEOMETRY)
    assert two.starts == (0, 2) and three.starts == (0,)
    assert Generate(prompt=(RED, BLUE), blocks=6).scripts(GEOMETRY)[0].starts == (0, 3)


# --- Streaming ---


@pytest.mark.parametrize("changes", [{}, {"bank": 2, "bank_every": 2}], ids=["window", "bank"])
def test_memory_does_not_grow(changes):
    """Live bytes after 12 blocks and after 60, prompt switches in between."""
    pipeline = with_geometry(new_pipeline(), **changes)
    script, alive = story(60, 20, 40), []
    with Ledger() as ledger:
        for pixels in streamed(pipeline, SAMPLERS["renoise"], [script], 0, [("a",)]):
            alive.append(ledger.now - pixels.nbytes)
    assert len(set(alive[12:])) == 1


@pytest.mark.slow
def test_memory_does_not_grow_over_a_thousand_latent_frames():
    pipeline, alive = load_pipeline("mini"), []
    with Ledger() as ledger:
        for pixels in streamed(pipeline, SAMPLERS["renoise"], [story(333, 100, 200)], 0, [("a",)]):
            alive.append(ledger.now - pixels.nbytes)
    assert len(alive) == 333 and max(alive[20:]) == min(alive[20:])


def test_what_is_forgotten_is_not_needed(pipeline):
    """A switch after every block re-encodes the window each time."""
    script = story(12, 4, 9)
    kept, forgetful = new_stream(pipeline, script), new_stream(pipeline, script)
    for _ in range(12):
        assert torch.equal(kept.advance(), forgetful.advance())
        forgetful.forget()
    assert sum(b is not None for b in forgetful.blocks) == 4


def test_a_file_in_pieces_is_the_file(pipeline, tmp_path):
    video = generate(pipeline, SAMPLERS["renoise"], [story(4)], 0, [("a",)])[0]
    with Mp4Writer(tmp_path / "a" / "v.mp4", 16) as writer:
        for part in video.split(3):
            writer.write(part)
            assert not (tmp_path / "a" / "v.mp4").exists(), "not there before it is whole"
    assert (tmp_path / "a" / "v.mp4").read_bytes() == encode_mp4(video, 16) and len(
        list((tmp_path / "a").iterdir())
    ) == 1


def test_an_interrupted_file_is_not_there(pipeline, tmp_path):
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "v.mp4", 16) as writer:
        writer.write(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# --- The command ---


def test_seeds_and_seconds(capsys, folder, tmp_path):
    code, out, _ = run(
        capsys,
        folder,
        "--prompt",
        RED,
        BLUE,
        "--seconds",
        "1.5",
        "--at",
        "0.5",
        "--seeds",
        "0",
        "7",
        "--out",
        tmp_path,
    )
    assert (
        code == 0
        and sorted(p.name for p in tmp_path.glob("*.mp4")) == ["000-seed0.mp4", "000-seed7.mp4"]
        and "frames/s" in out
    )
    videos = [read_mp4(p)[0] for p in sorted(tmp_path.glob("*.mp4"))]
    assert len(videos[0]) == 29 >= 1.5 * 16 and not torch.equal(*videos)


def test_a_lora_on_top(capsys, tmp_path):
    """A released LoRA; and what it makes is what the merged weights make."""
    pipeline = new_pipeline()
    folder, lora = save_pipeline(tmp_path / "p"), tmp_path / "lora.pt"
    torch.save({"generator_lora": released_lora(pipeline.generator.transformer)}, lora)
    for name, extra in (
        ("plain", ()),
        ("lora", ("--lora", lora)),
        ("none", ("--lora", lora, "--lora-scale", "0")),
    ):
        assert (
            run(capsys, folder, "--prompt", RED, "--blocks", "3", "--out", tmp_path / name, *extra)[
                0
            ]
            == 0
        )
    plain, adapted, none = (
        read_mp4(tmp_path / name / "000.mp4")[0] for name in ("plain", "lora", "none")
    )
    assert torch.equal(plain, none) and not torch.equal(plain, adapted)


def test_half_precision(capsys, folder, tmp_path):
    assert (
        run(
            capsys,
            folder,
            "--prompt",
            RED,
            "--blocks",
            "2",
            "--dtype",
            "bfloat16",
            "--out",
            tmp_path,
        )[0]
        == 0
    )


def test_bad_input(capsys, folder, tmp_path):
    torch.save(
        released_lora(new_pipeline().generator.transformer, rank=2)
        | {
            "base_model.model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(2, 24),
            "base_model.model.blocks.9.self_attn.q.lora_B.weight": torch.zeros(24, 2),
        },
        tmp_path / "other.pt",
    )
    for argv, message in (
        (("--prompt", RED, BLUE, "--blocks", "8", "--at", "99"), "start"),
        (("--prompt", RED, BLUE, "--at", "-1"), "-1.0 s is no time of a video"),
        (("--prompt", RED, BLUE, BLUE, "--at", "1"), "3 segments need 2 switch blocks"),
        # said in seconds, as it was asked for: the error spoke of start blocks (0, 4, 2)
        (
            ("--prompt", RED, BLUE, BLUE, "--at", "2", "1"),
            "prompts can not change at 2 s and then at 1 s: a prompt is shown for a block of 0.5 s",
        ),
        (("--prompt", RED, BLUE, BLUE, "--at", "1", "1.01"), "change at 1 s and then at 1.01 s"),
        (
            ("--prompt", RED, "--blocks", "600"),
            "a video of 600 blocks, but this generator's positions end after 512",
        ),
        (
            ("--prompt", RED, "--lora", tmp_path / "other.pt"),
            "is the LoRA of another base: 1 of its 21 modules do not fit, first blocks.9.attn1.to_q",
        ),
        (("--prompt", RED, "--lora", tmp_path / "nowhere.pt"), "nowhere.pt does not exist"),
        ((), "give either --prompt"),
    ):
        code, _, err = run(capsys, folder, *argv, "--out", tmp_path / "v")
        assert code == 1 and message in err and not (tmp_path / "v").exists(), err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line(capsys, folder, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("kvpo.generators.generate.streamed", full)
    code, _, err = run(capsys, folder, "--prompt", RED, "--out", tmp_path / "v")
    assert (
        code == 1
        and err.startswith("kvpo generate: out of memory (")
        and "--dtype bfloat16" in err
        and not list(tmp_path.glob("v/*"))
    )
    monkeypatch.setattr("kvpo.doctor.doctor.examine", full)
    capsys.readouterr()
    assert cli.main(["doctor", "mini"]) == 1
    assert "`kvpo plan` with the same recipe" in capsys.readouterr().err


def test_another_runtime_error_is_not_hidden(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("kvpo.generators.generate.streamed", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["generate", str(folder), "--prompt", RED, "--out", str(tmp_path)])


def test_the_window_s_own_prompts(pipeline):
    """Embeddings are asked of the pipeline once per text."""
    asked, encode = [], pipeline.encode_text
    pipeline.encode_text = lambda texts: asked.append(list(texts)) or encode(texts)
    try:
        list(streamed(pipeline, SAMPLERS["renoise"], [story(3, 1)], 0, [("a",)]))
    finally:
        del pipeline.encode_text
    assert asked == [sorted([RED, BLUE])] and embed(pipeline, story(3, 1)).keys() == {RED, BLUE}


# --- Nothing is overwritten silently ---


def test_a_video_carries_what_made_it(capsys, folder, tmp_path):
    """Of a folder of videos nobody could tell which prompts, seed and weights had made them."""
    assert (
        run(
            capsys,
            folder,
            "--prompt",
            RED,
            BLUE,
            "--blocks",
            "2",
            "--seed",
            "7",
            "--out",
            tmp_path / "v",
        )[0]
        == 0
    )
    about = read_about(tmp_path / "v" / "000.mp4")
    beside = json.loads((tmp_path / "v" / "000.json").read_text())
    assert about == {"enlarged": about["enlarged"]} | beside
    assert (
        beside["prompts"],
        beside["starts"],
        beside["seed"],
        beside["generator"],
        beside["sampler"],
    ) == ([RED, BLUE], [0, 1], 7, str(folder), "renoise")
    assert {"commit", "command", "lora", "dtype", "kvpo"} <= set(beside)


def test_what_is_replaced_is_said(capsys, folder, tmp_path):
    argv = (folder, "--prompt", RED, "--blocks", "1", "--out", tmp_path / "v")
    assert "replaces" not in run(capsys, *argv)[1]
    said = " ".join(run(capsys, *argv)[1].split())
    assert (
        f"replaces {tmp_path / 'v' / '000.mp4'}, which was there already; give another --out to keep it"
        in said
    )


def test_without_a_folder_every_call_has_a_new_one(capsys, folder, tmp_path, monkeypatch):
    """A second `kvpo generate` wrote over the videos of the first."""
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert run(capsys, folder, "--prompt", RED, "--blocks", "1")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "generate",
        "generate-2",
        "generate-3",
    ]
