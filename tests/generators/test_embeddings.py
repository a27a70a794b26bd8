"""A prompt file is embedded once: what is on disk is what the encoder gives, and the encoder is not read again."""

from __future__ import annotations

import json
import shutil

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
    monkeypatch.setattr("kvpo.generators.pipeline._load", lambda kind, path, dtype, own=embeddings.Pipeline.load.__globals__["_load"]: read.append(path.name) or own(kind, path, dtype))
    again = load(folder)
    assert torch.equal(again.encode_text(TEXTS), expected) and read == ["transformer", "vae"]
    assert first.stock.text_encoder is again.stock.text_encoder is None and len(list(cache.rglob("*.safetensors"))) == 1
    with pytest.raises(ValueError, match="the text encoder is not loaded, and 'another' has not been embedded"):
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


def test_a_run_from_a_prompt_file_has_no_encoder_and_is_reproducible(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"2,[{RED}],[{BLUE}]\n1,[{SMALL}]\n")
    recipe = write_recipe(tmp_path / "r.yaml", settings(folder, steps=2, data={"prompts": str(prompts), "blocks": 6}))
    assert align(recipe, tmp_path / "a") == align(recipe, tmp_path / "b") == 0
    assert equal(final(tmp_path / "a"), final(tmp_path / "b"))
