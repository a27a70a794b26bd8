"""A prompt file is embedded once: what is on disk is what the encoder gives, and the encoder is
not read again."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from test_align import align, equal, final, settings, write_recipe
from tiny import BLUE, RED, SMALL

from kvpo.generators import embeddings
from kvpo.generators.embeddings import cache_folder, load_with_texts
from kvpo.generators.pipeline import Pipeline

TEXTS = [RED, BLUE, SMALL]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(folder, texts=TEXTS, dtype=torch.float32, **kwargs):
    return load_with_texts(folder, texts, "cpu", dtype, torch.float32, **kwargs)


def test_stored_is_encoded(folder, cache, monkeypatch):
    expected, done = Pipeline.load(folder).encode_text(TEXTS), []
    first = load(folder, progress=done.append)
    assert done == [1, 2, 3] and torch.equal(first.encode_text(TEXTS), expected)
    read = []
    monkeypatch.setattr(
        "kvpo.generators.pipeline.load_part",
        lambda kind, path, dtype, own=embeddings.Pipeline.load.__globals__["load_part"]: (
            read.append(path.name) or own(kind, path, dtype)
        ),
    )
    again = load(folder)
    assert torch.equal(again.encode_text(TEXTS), expected) and read == ["transformer", "vae"]
    assert (
        first.stock.text_encoder is again.stock.text_encoder is None
        and len(list(cache.rglob("*.safetensors"))) == 1
    )
    with pytest.raises(
        ValueError, match="the text encoder is not loaded, and 'another' has not been embedded"
    ):
        again.encode_text(["another"])


def test_anything_else_is_another_file(folder, cache, tmp_path):
    load(folder)
    load(folder, texts=TEXTS[:2])
    load(folder, dtype=torch.bfloat16)
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "text_encoder" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    load(other)
    streaming = json.loads((other / "streaming.json").read_text())
    (other / "streaming.json").write_text(json.dumps(streaming | {"text_length": 30}))
    assert load(other).encode_text([RED]).shape[1] == 30
    assert len(list(cache.rglob("*.safetensors"))) == 5


def test_a_broken_file_is_made_again(folder, cache):
    expected = load(folder).encode_text(TEXTS)
    (path,) = cache.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(load(folder).encode_text(TEXTS), expected)


def test_the_folder_is_the_users_own_without_the_variable(monkeypatch):
    monkeypatch.delenv("KVPO_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "kvpo")


# --- Where nothing can be kept ---


@pytest.mark.parametrize("reason", ["no home", "not writable", "full"])
def test_a_cache_is_optional(folder, cache, monkeypatch, reason):
    """In a container whose user has no home folder, or a read-only one, the run ended, and where
    only writing failed, after the text encoder had done its work."""
    expected, said, order = Pipeline.load(folder).encode_text(TEXTS), [], []
    if reason == "no home":
        monkeypatch.delenv("KVPO_CACHE")
        monkeypatch.setattr(
            Path,
            "home",
            classmethod(
                lambda cls: (_ for _ in ()).throw(
                    RuntimeError("Could not determine home directory.")
                )
            ),
        )
    elif reason == "not writable":
        cache.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(
            embeddings,
            "write_atomic",
            lambda path, content: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
    pipeline = load(
        folder,
        warn=lambda line: said.append(line) or order.append("warned"),
        progress=lambda done: order.append("encoded"),
    )
    assert (
        torch.equal(pipeline.encode_text(TEXTS), expected) and pipeline.stock.text_encoder is None
    )
    assert (
        len(said) == 1
        and said[0].startswith("embeddings are not kept on disk: ")
        and "\n" not in said[0]
    )
    assert order[0] == ("encoded" if reason == "full" else "warned")


def test_what_is_kept_is_read_where_nothing_can_be_written(folder, cache, monkeypatch):
    """A shared cache, mounted read-only."""
    load(folder)
    monkeypatch.setattr(
        embeddings, "try_folder", lambda *_: pytest.fail("nothing is to be written")
    )
    monkeypatch.setattr(Pipeline, "encode_text", lambda *_: pytest.fail("nothing is to be encoded"))
    assert set(load(folder).known) == set(TEXTS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_in_a_container_under_a_number_that_no_list_of_users_has(folder, tmp_path, monkeypatch):
    """`docker run --user 12345 --read-only`: no passwd entry, no HOME, nothing to write to. A
    child process becomes that user, since root is asked no permissions."""
    monkeypatch.delenv("KVPO_CACHE")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    expected, report = Pipeline.load(folder).encode_text(TEXTS), tmp_path / "report"
    report.touch(mode=0o666)
    opened = [
        path
        for path in (*folder.rglob("*"), folder, *folder.parents)
        if path != Path("/") and path.stat().st_mode & 0o5 != 0o5
    ]
    modes = {path: path.stat().st_mode for path in opened}
    with report.open("w") as said:
        for path in opened:  # pytest's folders are its user's alone
            path.chmod(0o755)
        if not (child := os.fork()):
            try:
                os.setgroups([])
                os.setgid(12345)
                os.setuid(12345)
                warned: list[str] = []
                found = load(folder, warn=warned.append).encode_text(TEXTS)
                said.write(f"{len(warned)} {torch.equal(found, expected)} {warned[0]}")
            except BaseException:
                said.write(traceback.format_exc())
            said.flush()
            os._exit(0)
        os.waitpid(child, 0)
    for path, mode in modes.items():
        path.chmod(mode)
    assert report.read_text().startswith("1 True embeddings are not kept on disk: "), (
        report.read_text()
    )


def test_a_run_from_a_prompt_file_has_no_encoder_and_is_reproducible(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"2,[{RED}],[{BLUE}]\n1,[{SMALL}]\n")
    recipe = write_recipe(
        tmp_path / "r.yaml", settings(folder, steps=2, data={"prompts": str(prompts), "blocks": 6})
    )
    assert align(recipe, tmp_path / "a") == align(recipe, tmp_path / "b") == 0
    assert equal(final(tmp_path / "a"), final(tmp_path / "b"))
