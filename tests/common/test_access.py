"""Files that others may read, and files that one may not: permission denied is never "broken"."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from released import new_wan, original_folder, released_lora, released_state
from test_align import align, settings, write_recipe
from tiny import RED, new_pipeline

from kvpo.commands import main as cli
from kvpo.common.access import check_readable
from kvpo.common.files import open_to_readers
from kvpo.common.video import read_mp4
from kvpo.policy.checkpoint import checkpoints

NOBODY = 65534
ADVICE = (
    "copy it again",
    "delete",
    "--out",
    "start a new",
    "starting again",
    "broken",
    "does not exist",
    "not a whole",
    "is missing",
    "download",
)


def anyone_may_write(folder: Path) -> None:
    """An output folder that is tried before anything is read must not be what is refused."""
    folder.mkdir()
    folder.chmod(0o777)


@contextmanager
def another_user() -> Iterator[None]:
    """Inside, files that are closed can not be read; root could."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shelf() -> Iterator[Path]:
    """A folder that every user may look into, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="kvpo-access-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def refused(capsys, *argv) -> str:
    """The one line: of permission, and of nothing that would harm what can not be read."""
    capsys.readouterr()
    with another_user():
        code = cli.main(list(map(str, argv)))
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and "ermission denied" in err, err
    assert not [
        advice
        for advice in ADVICE
        if advice in err.replace("what is in it has not been looked at", "")
    ], err
    return err


# --- What is written ---


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_every_file_of_a_run_and_of_its_exports_has_the_umask_s_access(
    capsys, folder, tmp_path, umask
):
    """safetensors writes 0600: colleagues were told that a run's checkpoints are broken."""
    before = os.umask(umask)
    try:
        changes = {
            "policy": {"train": "lora", "rank": 2},
            "evaluate": {"scripts": 2, "batch": 2, "videos": 0},
        }
        assert (
            align(
                write_recipe(tmp_path / "r.yaml", settings(folder, steps=1, **changes)),
                tmp_path / "run",
            )
            == 0
        )
        for format in ("pipeline", "diffusers-lora", "peft", "comfyui-lora", "comfyui-merged"):
            assert cli.main(["export", str(tmp_path / "run"), "--format", format]) == 0
    finally:
        os.umask(before)
    modes = {
        p.relative_to(tmp_path): stat.S_IMODE(p.stat().st_mode)
        for p in (tmp_path / "run").rglob("*")
    }
    wrong = {
        str(p): oct(mode)
        for p, mode in modes.items()
        if mode != (0o777 if (tmp_path / p).is_dir() else 0o666) & ~umask
    }
    assert len(modes) > 30 and not wrong


def test_an_import_can_be_read(capsys, tmp_path):
    base, *_ = original_folder(tmp_path / "base")
    torch.save({"generator": released_state(new_wan(0))}, tmp_path / "g.pt")
    assert (
        cli.main(
            [
                "import",
                str(tmp_path / "g.pt"),
                str(tmp_path / "out"),
                "--format",
                "longlive",
                "--base",
                str(base),
            ]
        )
        == 0
    )
    assert {
        stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()
    } == {0o666 & ~_umask()}


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def test_a_file_with_a_second_name_keeps_its_access(tmp_path):
    (tmp_path / "cache").write_text("x")
    (tmp_path / "cache").chmod(0o600)
    (tmp_path / "out").mkdir()
    os.link(tmp_path / "cache", tmp_path / "out" / "linked")
    (tmp_path / "out" / "own").write_text("y")
    (tmp_path / "out" / "own").chmod(0o600)
    open_to_readers(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "out" / "own").stat().st_mode) == 0o666 & ~_umask()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["linked", "own"]


# --- What may not be read ---


def test_the_sentence(shelf):
    closed = shelf / "w.safetensors"
    closed.touch()
    closed.chmod(0o600)
    with (
        another_user(),
        pytest.raises(
            PermissionError,
            match=r"w.safetensors: permission denied; it belongs to .*chmod a\+r .*tensors`",
        ),
    ):
        closed.chmod(0) if os.geteuid() != NOBODY else None
        check_readable(closed)
    (shelf / "home").mkdir()
    (shelf / "home" / "x").touch()
    (shelf / "home").chmod(0)
    with (
        another_user(),
        pytest.raises(
            PermissionError,
            match=r"x: permission denied by the folder .*home; .*chmod a\+rx .*home`",
        ),
    ):
        check_readable(shelf / "home" / "x")
    check_readable(shelf / "nowhere")


@pytest.mark.parametrize(
    "closed",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "tokenizer/tokenizer.json",
        "streaming.json",
        "model_index.json",
        "text_encoder",
        "",
    ],
)
def test_a_pipeline(capsys, folder, shelf, closed):
    """It was "not a whole safetensors file; copy it again", or "is missing"."""
    shutil.copytree(folder, shelf / "p")
    (shelf / "p" / closed).chmod(0)
    anyone_may_write(shelf / "v")
    assert closed in refused(capsys, "generate", shelf / "p", "--prompt", RED, "--out", shelf / "v")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_lora_and_a_generator(capsys, folder, shelf, suffix):
    from safetensors.torch import save_file

    shutil.copytree(folder, shelf / "p")
    path, lora = shelf / f"lora{suffix}", released_lora(new_pipeline().generator.transformer)
    save_file(lora, path) if suffix == ".safetensors" else torch.save(lora, path)
    path.chmod(0)
    anyone_may_write(shelf / "v")
    refused(capsys, "generate", shelf / "p", "--prompt", RED, "--lora", path, "--out", shelf / "v")
    base, *_ = original_folder(shelf / "base")
    refused(capsys, "import", path, shelf / "out", "--format", "longlive", "--base", base)


@pytest.fixture
def run(folder, shelf):
    shutil.copytree(folder, shelf / "p")
    assert (
        align(
            write_recipe(
                shelf / "r.yaml",
                settings(shelf / "p", steps=2, evaluate={"scripts": 2, "batch": 2, "videos": 0}),
            ),
            shelf / "run",
        )
        == 0
    )
    for path in (shelf / "run", *(shelf / "run").rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return shelf / "run"


@pytest.mark.parametrize("closed", ["tensors.safetensors", "state.json", "", "/checkpoints"])
def test_a_checkpoint(capsys, shelf, run, closed):
    """Resuming named it broken and went on from an older one, or began anew; `export` advised to
    delete it.
    """
    newest = checkpoints(run / "checkpoints")[-1]
    (newest.parent if closed == "/checkpoints" else newest / closed).chmod(0)
    refused(capsys, "export", run, "--format", "pipeline", "--out", shelf / "exported")
    refused(capsys, "align", shelf / "r.yaml", "--out", run, "--resume", "--steps", "3")


def test_a_video(shelf):
    (shelf / "v.mp4").write_bytes(b"x")
    (shelf / "v.mp4").chmod(0)
    with another_user(), pytest.raises(PermissionError, match="permission denied"):
        read_mp4(shelf / "v.mp4")
