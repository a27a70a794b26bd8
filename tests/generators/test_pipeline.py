"""Pipeline folders: what is written is read back; what is missing, broken, foreign or pickled is
refused in one line that names it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GEOMETRY, RED, draw

from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(folder, tmp_path / "broken")


def refused(folder, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        Pipeline.load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def weights(folder, part: str):
    (path,) = (folder / part).glob("*.safetensors")
    return path


def rewrite(path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def test_round_trip(folder, pipeline):
    """Through the disk: the same geometry, text, velocity and pixels, bit for bit."""
    loaded = Pipeline.load(folder)
    assert loaded.geometry == GEOMETRY
    assert torch.equal(loaded.encode_text([RED]), pipeline.encode_text([RED]))
    x = draw(1, 2, 4, 4, 4)
    a, b = (p.generator.velocity(x, 0.5, p.encode_text([RED]), [0, 1]) for p in (loaded, pipeline))
    assert torch.equal(a, b) and torch.equal(loaded.decoder()(x), pipeline.decoder()(x))
    modules = (loaded.generator.transformer, loaded.vae, loaded.stock.text_encoder)
    assert not any(p.requires_grad for m in modules for p in m.parameters()) and not any(
        m.training for m in modules
    )


def test_a_prompt_that_would_be_cut_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, this generator reads \d+"):
        pipeline.encode_text([RED, " ".join([RED] * 40)])


def test_missing_folder(tmp_path):
    assert "model_index.json is missing" in refused(tmp_path / "nowhere", FileNotFoundError)


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json",
        "streaming.json",
        "transformer",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
    ],
)
def test_missing_part(broken, lost):
    path = broken / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert lost in refused(broken, FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"block": 2', "not JSON"),
        ("[1, 2]", "must hold the keys"),
        ({"blok": 2}, r"unknown keys ['blok']"),
        ({"sink": None}, "sink = None"),
        ({"block": 0}, "block = 0"),
        ({"window": "7"}, "window = '7'"),
        ({"window": 2}, "window = 2"),
        ({"latent_width": 5}, "latent_width = 5"),
    ],
)
def test_malformed_streaming(broken, content, reason):
    path = broken / "streaming.json"
    path.write_text(
        content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content)
    )
    assert reason in refused(broken)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_streaming_file_of_another_editor(tmp_path, encoding):
    """It is edited by hand, and a byte order mark was "not JSON; copy it again"."""
    path = tmp_path / "streaming.json"
    path.write_text(json.dumps(asdict(GEOMETRY)), encoding=encoding)
    assert Geometry.read(path) == GEOMETRY


def test_missing_streaming_key(broken):
    path = broken / "streaming.json"
    path.write_text(
        json.dumps(
            {
                k: v
                for k, v in json.loads(path.read_text()).items()
                if k not in ("fps", "sink", "steps")
            }
        )
    )
    assert "missing keys ['fps', 'sink']" in refused(broken)


def test_steps_and_shift_have_defaults():
    geometry = Geometry(
        block=3, sink=3, window=12, latent_height=8, latent_width=8, fps=16, text_length=24
    )
    assert geometry.sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))


@pytest.mark.parametrize(
    ("blocks", "window", "frames"), [(4, 7, 8), (9, 7, 8), (3, 7, 6), (9, -1, 18)]
)
def test_resident_frames(blocks, window, frames):
    """Sink 1, blocks of 2: the window beside the sink, and never more than the video."""
    assert Geometry(2, 1, window, 4, 4, 16, 24).resident(blocks) == frames


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_truncated_weights(broken, part):
    path = weights(broken, part)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is not a whole safetensors file" in refused(broken)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_missing_tensor(broken, part):
    path = weights(broken, part)
    lost = next(
        n
        for n in sorted(load_file(path))
        if n not in ("shared.weight", "encoder.embed_tokens.weight")
    )
    rewrite(path, lambda state: state.pop(lost))
    message = refused(broken)
    assert "missing keys" in message and lost in message


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_unexpected_tensor(broken, part):
    rewrite(weights(broken, part), lambda state: state.update(stranger=torch.zeros(2)))
    message = refused(broken)
    assert "unexpected keys" in message and "stranger" in message


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_misshapen_tensor(broken, part):
    path = weights(broken, part)
    name = next(n for n, t in sorted(load_file(path).items()) if t.dim() >= 2)
    rewrite(path, lambda state: state.update({name: torch.zeros(3, 5)}))
    assert part in refused(broken)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_not_opened(broken, name):
    path = weights(broken, "transformer")
    path.unlink()
    torch.save({}, path.with_name(name))
    message = refused(broken, FileNotFoundError)
    assert name in message and "convert" in message and "safetensors" in message


def test_malformed_config(broken):
    (broken / "transformer" / "config.json").write_text("{")
    assert "transformer" in refused(broken)


def test_another_class_in_a_folder(broken):
    shutil.rmtree(broken / "vae")
    shutil.copytree(broken / "transformer", broken / "vae")
    assert "vae" in refused(broken)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_truncated_description(broken, name):
    """`Expecting value: line 82 column 13` was once all that was said."""
    path = broken / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused(broken)
    assert message.startswith(f"{path} is not JSON (") and message.endswith("; copy it again")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer/tokenizer.json", "{}"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "many"}'),
        ("tokenizer/tokenizer.json", None),
    ],
)
def test_a_description_of_nothing(broken, name, content):
    path = broken / name
    path.unlink() if content is None else path.write_text(content)
    message = refused(broken)
    assert message.startswith(
        f"{path.parent} does not hold a {path.parent.name} ("
    ) and message.endswith("; copy it again")
