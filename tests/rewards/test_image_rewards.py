"""The image(-text) rewards on tiny random models of the released classes, against those classes'
own processing."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from kvpo.common.rng import normal, stream
from kvpo.rewards.base import VideoBatch, check_output
from kvpo.rewards.pretrained import hpsv2
from kvpo.rewards.pretrained.aesthetic import HEAD_FILE, Aesthetic, load_head
from kvpo.rewards.pretrained.dinov2 import DinoConsistency, similarities
from kvpo.rewards.pretrained.hpsv2 import HPSv2
from kvpo.rewards.pretrained.image_text import ClipAlignment, PickScore, SiglipAlignment, share_read
from kvpo.rewards.pretrained.pixels import CHUNK, CLIP_MEAN, CLIP_STD, Pixels
from kvpo.rewards.registry import make_reward

LENGTH = 16
"""Tokens that the tiny text towers read."""
PROMPTS = ("a Red circle", "blue", "a Red circle")
WORDS = ["a", "red", "blue", "circle"]
START, END = "<|startoftext|>", "<|endoftext|>"
OPENAI = {
    "crop_size": 32,
    "do_center_crop": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
    "size": 32,
}
SIGLIP = {
    "size": {"height": 24, "width": 24},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 2,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
DINO = IMAGENET | {
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "resample": 3,
}
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, and large: stock initial values leave most pictures alike."""
    for name, parameter in module.named_parameters():
        parameter.data = 0.3 * normal(parameter.shape, 0, name) + (
            "norm" in name and name.endswith("weight")
        )
    return module.eval().requires_grad_(False)


def save(folder, model, preprocessing: dict, tokenizer=None):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])},
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def as_siglip2(folder):
    """Its tokenizer is declared as Gemma's, which has no lower case, and pads on the left."""
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}
        )
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a class, as the hub has them."""
    root = tmp_path_factory.mktemp("released")
    tokenizer = clip_tokenizer()
    # 2: the old convention, end = highest id
    text = TOWER | dict(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, eos_token_id=2)
    clip = randomised(
        CLIPModel(
            CLIPConfig(
                text_config=text,
                vision_config=TOWER | dict(image_size=32, patch_size=8),
                projection_dim=768,
            )
        )
    )
    clip.logit_scale.data.fill_(math.log(100))
    siglip = randomised(
        SiglipModel(
            SiglipConfig(
                text_config=TOWER | dict(vocab_size=len(WORDS) + 3, max_position_embeddings=LENGTH),
                vision_config=TOWER | dict(image_size=24, patch_size=8),
            )
        )
    )
    dino = randomised(Dinov2Model(Dinov2Config(**TOWER, image_size=28, patch_size=14)))
    return {
        "clip": save(root / "clip", clip, OPENAI, tokenizer),
        "siglip": as_siglip2(save(root / "siglip", siglip, SIGLIP, siglip_tokenizer())),
        "dino": save(root / "dino", dino, DINO),
    }


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A file with the names and shapes of sac+logos+ava1-l14-linearMSE.pth."""
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    path = tmp_path_factory.mktemp("head") / "any.pth"
    state = {
        f"layers.{i}.weight": normal((b, a), 0, "head", i) / a**0.5 for i, (a, b) in widths.items()
    }
    torch.save(
        state | {f"layers.{i}.bias": normal((b,), 0, "bias", i) for i, (_, b) in widths.items()},
        path,
    )
    return path


@pytest.fixture(scope="module")
def batch():
    """Three clips of 9 different frames, some soft, some sharp, wider than high."""
    soft = torch.rand((27, 3, 5, 7), generator=stream(0, "frames"))
    x = torch.nn.functional.interpolate(soft, (40, 56), mode="bicubic") + 0.1 * normal(
        (27, 3, 40, 56), 0, "noise"
    )
    return VideoBatch(
        (x.clamp(0, 1) * 255).round().to(torch.uint8).view(3, 9, 3, 40, 56), 16.0, PROMPTS
    )


def loaded(kind, weights, **params):
    reward = kind(weights=str(weights), **params)
    reward.load("cpu")
    return reward


def scores(reward, batch: VideoBatch) -> torch.Tensor:
    return check_output(reward.spec, batch, reward.score(batch)).scores


def pictures(batch: VideoBatch) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for frame in batch.frames.flatten(0, 1)]


def stock_clip_logits(folder, batch: VideoBatch) -> torch.Tensor:
    """[B, T] by CLIPModel's own forward on its own processors' output."""
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        images=pictures(batch), return_tensors="pt"
    )
    text = CLIPTokenizer.from_pretrained(folder)(
        list(batch.prompts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = CLIPModel.from_pretrained(folder)(**pixels, **text).logits_per_image
    return torch.stack(
        [logits.view(len(batch), -1, len(batch))[b, :, b] for b in range(len(batch))]
    )


# --- Scores ---


def test_pickscore_and_clip_are_the_stock_models(folders, batch):
    logits = stock_clip_logits(folders["clip"], batch)
    assert logits.std() > 1  # the tiny model tells these frames apart
    pick, clip = (
        scores(loaded(kind, folders["clip"], stride=1), batch)
        for kind in (PickScore, ClipAlignment)
    )
    assert torch.allclose(pick, logits.mean(1), atol=1e-2) and torch.allclose(
        clip, logits.mean(1) / 100, atol=1e-4
    )


def test_siglip_is_the_stock_model(folders, batch):
    pixels = SiglipImageProcessorPil.from_pretrained(folders["siglip"])(
        images=pictures(batch), return_tensors="pt"
    )
    red, blue = (
        [3, 4, 6, 1],
        [5, 1],
        # a red circle, in lower case, and the end mark; then padding to the full length, on the right
    )
    ids = torch.tensor([p + [0] * (LENGTH - len(p)) for p in (red, blue, red)])
    model = SiglipModel.from_pretrained(folders["siglip"])
    with torch.inference_mode():
        image = model.get_image_features(**pixels).pooler_output.view(3, 9, -1)
        text = model.get_text_features(input_ids=ids).pooler_output
        expected = torch.cosine_similarity(image, text[:, None], dim=-1)
    assert expected.std() > 0.01
    assert torch.allclose(
        scores(loaded(SiglipAlignment, folders["siglip"], stride=1), batch),
        expected.mean(1),
        atol=1e-4,
    )


def test_aesthetic_is_an_affine_function_of_the_unit_embedding(folders, head, batch):
    pixels = CLIPImageProcessorPil.from_pretrained(folders["clip"])(
        images=pictures(batch), return_tensors="pt"
    )
    with torch.inference_mode():
        e = CLIPModel.from_pretrained(folders["clip"]).get_image_features(**pixels).pooler_output
    e, state = e / e.norm(dim=-1, keepdim=True), torch.load(head, weights_only=True)
    for i in (0, 2, 4, 6, 7):
        e = e @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    reward = loaded(Aesthetic, folders["clip"], head=str(head), stride=1)
    assert e.std() > 0.01 and torch.allclose(scores(reward, batch), e.view(3, 9).mean(1), atol=1e-4)
    assert hashlib.sha256(head.read_bytes()).hexdigest() in reward.spec.weights


def test_hpsv2_is_open_clip_on_whole_frames_with_black_bars(tmp_path, batch, monkeypatch):
    open_clip = pytest.importorskip(
        "open_clip", reason="HPS v2.1 needs open_clip_torch: pip install 'kvpo[hpsv2]'"
    )
    vision = {"image_size": 28, "layers": 1, "width": 64, "patch_size": 14}
    text = {"context_length": LENGTH, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "tiny.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", "tiny")
    model = randomised(open_clip.create_model("tiny"))
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "HPS_v2.1_compressed.pt")
    # 40 x 56 fits at one half: 20 x 28, and 4 rows of black above and below
    canvas = np.zeros((27, 28, 28, 3), dtype=np.uint8)
    canvas[:, 4:24] = [
        np.asarray(Image.fromarray(p).resize((28, 20), Image.Resampling.BICUBIC))
        for p in pictures(batch)
    ]
    x = (
        torch.from_numpy(canvas).permute(0, 3, 1, 2) / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)
    ) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.inference_mode():
        image, text, *_ = model(x, open_clip.get_tokenizer("tiny")(list(PROMPTS)))
    expected = (image.view(3, 9, -1) * text[:, None]).sum(-1)
    reward = loaded(HPSv2, tmp_path, stride=1)
    output = reward.score(batch)
    assert expected.std() > 0.01 and torch.allclose(
        check_output(reward.spec, batch, output).scores, expected.mean(1), atol=1e-4
    )
    assert (output.parts["prompt_read"] == 1).all() and reward.prompt_read(
        ["circle " * 30]
    ).item() == LENGTH / 32
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"no weights")
    with pytest.raises(
        ValueError, match="HPS_v2.1_compressed.pt does not hold the weights of a tiny"
    ):
        loaded(HPSv2, tmp_path)


def test_dinov2_is_vbench_formula_on_the_stock_model(folders, batch):
    pixels = BitImageProcessorPil.from_pretrained(folders["dino"])(
        images=pictures(batch), return_tensors="pt"
    )
    with torch.inference_mode():
        f = Dinov2Model.from_pretrained(folders["dino"])(**pixels).pooler_output.view(3, 9, -1)[
            :, ::4
        ]
    cosine = torch.nn.functional.cosine_similarity
    expected = (
        cosine(f[:, 1:], f[:, :-1], dim=-1).clamp(min=0)
        + cosine(f[:, 1:], f[:, :1], dim=-1).clamp(min=0)
    ) / 2
    reward = loaded(DinoConsistency, folders["dino"])
    assert expected.std() > 0.01 and torch.allclose(
        scores(reward, batch), expected.mean(1), atol=1e-4
    )


def test_consistency_by_hand():
    """Embeddings at 0, 60 and 120 degrees: neighbours 1/2 and 1/2, to the first 1/2 and -1/2,
    which counts as 0."""
    angle = torch.tensor([0.0, 60.0, 120.0]).deg2rad()
    adjacent, first = similarities(7 * torch.stack((angle.cos(), angle.sin()), -1)[None])
    assert torch.allclose(adjacent, torch.tensor([[0.5, 0.5]])) and torch.allclose(
        first, torch.tensor([[0.5, 0.0]]), atol=1e-6
    )


def test_a_frozen_clip_is_perfectly_consistent_and_a_short_one_invalid(folders, batch):
    reward = loaded(DinoConsistency, folders["dino"])
    frozen = batch.take([0] * 9)
    assert (
        torch.allclose(scores(reward, frozen), torch.ones(3))
        and (scores(reward, batch) < 0.999).all()
    )
    short = reward.score(batch.cut(0, 4))  # at stride 4 one frame is looked at
    assert (
        not short.valid.any() and short.scores.isnan().all() and "5 frames" in short.info["invalid"]
    )


# --- Frames and prompts ---


def test_stride_and_reduction_by_hand(folders, batch):
    s = stock_clip_logits(folders["clip"], batch)[:, [0, 4, 8]] / 100
    for reduce, expected in {
        "mean": s.mean(1),
        "top": s.max(1).values,
        "worst": s.min(1).values,
    }.items():
        output = loaded(ClipAlignment, folders["clip"], stride=4, reduce=reduce).score(batch)
        assert torch.allclose(output.scores, expected, atol=1e-4), reduce
    assert torch.allclose(output.parts["first"], s[:, 0], atol=1e-4) and torch.allclose(
        output.parts["last"], s[:, 2], atol=1e-4
    )


def test_a_batch_is_its_clips_one_by_one(folders, head, batch):
    rewards = [
        loaded(PickScore, folders["clip"]),
        loaded(SiglipAlignment, folders["siglip"]),
        loaded(Aesthetic, folders["clip"], head=str(head)),
        loaded(DinoConsistency, folders["dino"]),
    ]
    assert len(batch) * batch.length < CHUNK < 3 * len(batch) * batch.length
    tripled = batch.rows([*range(3)] * 3)
    for reward in rewards:
        together = scores(reward, batch)
        alone = torch.cat([scores(reward, batch.rows([b])) for b in range(3)])
        assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5), reward.spec.name
        assert torch.allclose(scores(reward, tripled), together.repeat(3), rtol=1e-5, atol=1e-5), (
            reward.spec.name
        )


def test_a_prompt_is_embedded_once_a_call(folders, batch, monkeypatch):
    reward, asked = loaded(ClipAlignment, folders["clip"]), []
    embed = reward.embed_texts
    monkeypatch.setattr(
        reward, "embed_texts", lambda prompts: asked.append(prompts) or embed(prompts)
    )
    reward.score(batch)
    assert asked == [["a Red circle", "blue"]]


def test_a_long_prompt_is_cut_and_says_so(folders, batch):
    # 40 letters and commas, the start and the end mark: 42 tokens, of which 16 are read
    long = "red, " * 10
    cut = VideoBatch(batch.frames[:1], 16.0, (long,))
    output = loaded(ClipAlignment, folders["clip"], stride=1).score(cut)
    assert torch.allclose(
        output.scores, stock_clip_logits(folders["clip"], cut).mean(1) / 100, atol=1e-4
    )
    assert output.parts["prompt_read"].item() == pytest.approx(16 / 42)
    assert share_read([16, 32, 5], 16).tolist() == [1, 0.5, 1]


@pytest.mark.parametrize(
    "processor, config",
    [
        (CLIPImageProcessorPil, OPENAI),
        (SiglipImageProcessorPil, SIGLIP),
        (BitImageProcessorPil, DINO),
    ],
)
@pytest.mark.parametrize("size", [(40, 56), (61, 30), (20, 90)])
def test_preprocessing_is_the_stock_one(tmp_path, processor, config, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    frames = torch.randint(0, 256, (2, 3, *size), generator=stream(0, *size), dtype=torch.uint8)
    expected = processor.from_pretrained(tmp_path)(
        images=[f.permute(1, 2, 0).numpy() for f in frames], return_tensors="pt"
    ).pixel_values
    off = (
        (Pixels.released("x", tmp_path)(frames) - expected).abs()
        * 255
        * torch.tensor(config["image_std"]).view(3, 1, 1)
    )
    # noise, the hardest case: now and then one level of 255, where a rounding is a tie
    assert off.max() < 1.01


def test_padding_by_hand():
    """2 x 4 pixels of 255 into 4 x 4: whole, with one row of black above and below."""
    x = Pixels((4, 4), "pad", mean=(0.0,) * 3, std=(1.0,) * 3)(
        torch.full((1, 3, 2, 4), 255, dtype=torch.uint8)
    )
    assert x[0, 0, :, 0].tolist() == [0, 1, 1, 0] and torch.equal(
        x, x[:, :, :, :1].expand(1, 3, 4, 4)
    )


# --- Loading ---


def test_loading_says_what_was_loaded_and_offloading_keeps_it(folders, batch):
    reward = make_reward("pickscore", {"weights": str(folders["clip"])})
    assert reward.spec.weights == ""
    with pytest.raises(RuntimeError, match="pickscore is not loaded; call load"):
        reward.score(batch)
    reward.load("cpu")
    model, before = reward.model, scores(reward, batch)
    digest = hashlib.sha256((folders["clip"] / "model.safetensors").read_bytes()).hexdigest()
    assert reward.spec.weights == f"{folders['clip']} model.safetensors sha256:{digest}"
    reward.offload()
    reward.load("cpu")
    assert reward.model is model and torch.equal(scores(reward, batch), before)
    assert not any(p.requires_grad for p in model.parameters()) and {
        p.dtype for p in model.parameters()
    } == {torch.float32}


def test_none_is_held_out_from_another_of_its_family():
    families = {
        name: make_reward(name).spec.family
        for name in ("pickscore", "clip", "siglip", "aesthetic", "hpsv2", "dinov2")
    }
    assert set(families.values()) == {"clip", "dino"} and families["dinov2"] == "dino"


@pytest.mark.parametrize("name", ["pickscore", "siglip", "aesthetic", "hpsv2", "dinov2"])
def test_bad_parameters_are_refused(name):
    for params, words in (
        ({"stride": 0}, "stride = 0"),
        ({"reduce": "max"}, "'max' is unknown"),
        ({"strides": 2}, "did you mean stride"),
    ):
        with pytest.raises(ValueError, match=words):
            make_reward(name, params)


def test_absent_weights_name_the_way_out(tmp_path):
    with pytest.raises(
        ValueError, match=f"'clip': weights {tmp_path}/none are not there; give a folder"
    ):
        loaded(ClipAlignment, tmp_path / "none")
    with pytest.raises(
        ValueError,
        match="yuvalkirstain/PickScore_v1 are no local folder, and could not be downloaded .*: hf download yuvalkirstain/PickScore_v1",
    ):
        PickScore().load("cpu")


def test_hpsv2_without_open_clip(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'hpsv2' needs open_clip: pip install 'kvpo\[hpsv2\]'"):
        HPSv2().load("cpu")


def without(name):
    return lambda folder: (folder / name).unlink()


def tensors(change):
    """The weights with one tensor more, less, or of another shape."""

    def harm(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def preprocessing(**changes):
    return lambda folder: (folder / "preprocessor_config.json").write_text(
        json.dumps(OPENAI | changes)
    )


@pytest.mark.parametrize(
    "harm, words",
    [
        (without("config.json"), "config.json can not be read"),
        (without("preprocessor_config.json"), "preprocessor_config.json can not be read"),
        (without("tokenizer.json"), "holds no tokenizer.json or vocab.json"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "the tokenizer in .* can not be read",
        ),
        (without("model.safetensors"), r"holds no model\*.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"),
            "can not be loaded",
        ),
        (
            tensors(lambda state: state.update(extra=torch.zeros(2))),
            "holds other tensors than its config.json describes: extra",
        ),
        (
            tensors(lambda state: state.pop("visual_projection.weight")),
            "holds other tensors than its config.json describes: visual_projection.weight",
        ),
        (
            tensors(lambda state: state.update({"visual_projection.weight": torch.zeros(8, 32)})),
            "holds other tensors than its config.json describes: .*visual_projection.weight",
        ),
        (preprocessing(resample=0), "no preprocessing that is known here"),
        (preprocessing(crop_size=40), "no fixed size without padding"),
        (
            preprocessing(do_center_crop=False, size={"longest_edge": 32}),
            "no preprocessing that is known here",
        ),
    ],
)
def test_broken_folders_are_refused(folders, tmp_path, harm, words):
    folder = shutil.copytree(folders["clip"], tmp_path / "broken")
    harm(folder)
    with pytest.raises(ValueError, match=f"^reward 'clip': .*({words})"):
        loaded(ClipAlignment, folder)


def test_the_counters_of_older_files_are_no_foreign_tensors(folders, tmp_path, batch):
    """Released CLIP files hold position_ids, which the classes no longer have."""
    folder = shutil.copytree(folders["clip"], tmp_path / "older")
    tensors(
        lambda state: state.update(
            {
                f"{tower}_model.embeddings.position_ids": torch.arange(LENGTH)[None]
                for tower in ("text", "vision")
            }
        )
    )(folder)
    assert torch.equal(
        *(scores(loaded(ClipAlignment, f), batch) for f in (folder, folders["clip"]))
    )


def test_weights_of_another_model_are_refused(folders):
    for kind, folder, found, asked in (
        (PickScore, "dino", "dinov2", "clip"),
        (DinoConsistency, "clip", "clip", "dinov2"),
        (SiglipAlignment, "clip", "clip", "siglip"),
    ):
        with pytest.raises(
            ValueError, match=f"holds a model of type '{found}'; it must be '{asked}', a "
        ):
            loaded(kind, folders[folder])


def test_another_head_is_refused(folders, head, tmp_path):
    state = torch.load(head, weights_only=True)
    del state["layers.7.bias"]
    torch.save(state, tmp_path / "short.pth")
    torch.save({"layers": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for name in ("short", "pickled", "broken"):
        with pytest.raises(ValueError, match=f"{name}.pth is not the head"):
            load_head("aesthetic", tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is not there"):
        loaded(Aesthetic, folders["clip"], head=str(tmp_path))
