"""HPSv3 and VideoReward: the numbers of the original under transformers 4.45.2, on tiny random
networks, and all that surrounds them.

``benchmarks/reward_parity.py`` made the golden numbers. The tiny tokenizer has a token for every
byte.
"""

import hashlib
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvpo.common.rng import stream
from kvpo.rewards.base import VideoBatch, check_output
from kvpo.rewards.pretrained import qwen
from kvpo.rewards.pretrained.hpsv3 import HPSv3
from kvpo.rewards.pretrained.videoreward import VideoReward, grey

GOLDEN = Path(__file__).parent / "golden_rewards"
ABOUT = json.loads((GOLDEN / "qwen.json").read_text())
NUMBERS = load_file(GOLDEN / "qwen.safetensors")
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SETTINGS = {
    "data_config": {"prompt_template_type": "detailed_special", "max_frame_pixels": 448 * 448},
    "peft_lora_config": {**ABOUT["lora"], "use_rslora": False},
    "inference_config": {
        "VQ_mean": 0.5,
        "VQ_std": 2.0,
        "MQ_mean": -1.0,
        "MQ_std": 0.5,
        "TA_mean": 0.25,
        "TA_std": 4.0,
    },
}
STEP = 1 / 255 / min(qwen.STD)
"""One step of 255 in a patch, at most."""


def weights(name: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{name}.weights."): value
        for key, value in NUMBERS.items()
        if key.startswith(f"{name}.weights.")
    }


def tokenizer(special: list[str] = SPECIAL) -> Tokenizer:
    made = Tokenizer(
        models.BPE(
            vocab={
                letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
            },
            merges=[],
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoint and base of both models, in one folder each.  Copy before breaking."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("hpsv3", "videoreward")}
    for name, folder in made.items():
        (folder / "config.json").write_text(json.dumps(ABOUT[name]))
        tokenizer().save(str(folder / "tokenizer.json"))
    save_file(weights("hpsv3"), made["hpsv3"] / "HPSv3.safetensors")
    for step in (9, 11):  # the latest counts, by number
        (made["videoreward"] / f"checkpoint-{step}").mkdir()
    (made["videoreward"] / "checkpoint-9" / "model.pth").write_bytes(b"an earlier one")
    torch.save(weights("videoreward"), made["videoreward"] / "checkpoint-11" / "model.pth")
    (made["videoreward"] / "model_config.json").write_text(json.dumps(SETTINGS))
    return made


def hpsv3(folder: Path, **params) -> HPSv3:
    reward = HPSv3(weights=str(folder), base=str(folder), **params)
    reward.load()
    return reward


def videoreward(folder: Path, judge: str = "overall", **params) -> VideoReward:
    reward = VideoReward(judge, weights=str(folder), base=str(folder), **params)
    reward.load()
    return reward


@pytest.fixture(scope="module")
def loaded(folders):
    """One of each, kept so that all tests share their networks."""
    return {"hpsv3": hpsv3(folders["hpsv3"]), "videoreward": videoreward(folders["videoreward"])}


def film(frames: int, seed: int = 0, size: tuple[int, int] = (48, 80)) -> torch.Tensor:
    """A smooth, colourful film of a shape, uint8 [T, 3, H, W]."""
    coarse = torch.rand(1, 3, 4, 4, 5, generator=stream(seed, "film"))
    return (
        (
            torch.nn.functional.interpolate(coarse, (frames, *size), mode="trilinear")[0].transpose(
                0, 1
            )
            * 255
        )
        .round()
        .to(torch.uint8)
    )


def batch_of(*clips: torch.Tensor, prompt: str = "a red ball") -> VideoBatch:
    return VideoBatch(torch.stack(clips), 16.0, (prompt,) * len(clips))


def score(reward, batch: VideoBatch):
    return check_output(reward.spec, batch, reward.score(batch))


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    """Ids, mask, patches and grid of the golden batch."""
    patches, grids = zip(
        *(qwen.patchify(NUMBERS[f"{name}.frames.{i}"][None].float()) for i in (0, 1))
    )
    return (
        NUMBERS[f"{name}.ids"],
        NUMBERS[f"{name}.mask"],
        torch.cat([p[0] for p in patches]),
        torch.tensor(grids),
    )


@pytest.mark.parametrize("name", ["hpsv3", "videoreward"])
def test_the_original_says_the_same(loaded, name):
    """Different grids, padding on the right; HPSv3 with its head of three layers, VideoReward
    with its LoRA."""
    assert ABOUT["transformers"] == "4.45.2" and not NUMBERS[f"{name}.mask"].all()
    got = loaded[name].model(*inputs(name))
    assert got.dtype == torch.float32 and (got - NUMBERS[f"{name}.outputs"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["hpsv3", "videoreward"])
def test_the_library_s_own_positions_would_be_wrong(loaded, name, monkeypatch):
    """Every port that left positions out was wrong since transformers 5, without any error."""
    network, (ids, mask, patches, grid) = loaded[name].model, inputs(name)
    kind, number = {"hpsv3": ("image", 1), "videoreward": ("video", 2)}[name]
    own, _ = network.model.get_rope_index(
        ids,
        (ids == network.pad_id).int() * number,
        attention_mask=mask,
        **{f"{kind}_grid_thw": grid},
    )
    monkeypatch.setattr(network, "positions", lambda ids_BL: own)
    assert (network(ids, mask, patches, grid) - NUMBERS[f"{name}.outputs"]).abs().max() > 1e-3


def names_in_4_45(
    hidden: int, inner: int, heads: int, groups: int, tokens: int, head: torch.nn.Module, kind: str
) -> dict[str, torch.Size]:
    """Names and shapes of a full-size model's weights, as its own file has them: Qwen2-VL of 28
    layers, word head included."""
    from transformers import Qwen2VLConfig

    text = dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=151657 + tokens,
    )
    config = Qwen2VLConfig(
        **text,
        vision_config={"hidden_size": hidden, "model_type": "qwen2_vl"},
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )
    with torch.device("meta"):
        state = qwen.RewardNetwork(config, tokenizer(), kind, ("a",), head).state_dict()
    old = {
        name.removeprefix("model.").replace("language_model.", "model."): value
        for name, value in state.items()
    }
    assert qwen.renamed(old).keys() == state.keys()
    return {name: value.shape for name, value in old.items()} | {
        "lm_head.weight": state["model.language_model.embed_tokens.weight"].shape
    }


def test_hpsv3_of_full_size_is_its_file():
    """The public HPSv3.safetensors has 16 584 387 300 bytes: exactly these names and shapes in
    bfloat16."""
    from kvpo.rewards.pretrained.hpsv3 import head

    header, end = {}, 0
    for name, shape in sorted(names_in_4_45(3584, 18944, 28, 4, 1, head(3584), "image").items()):
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [end, end := end + 2 * shape.numel()],
        }
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + -(-length // 8) * 8 + end == 16_584_387_300


def test_videoreward_of_full_size_is_its_file():
    """The public model.pth has 1123 tensors in 5 031 072 529 bytes: these, LoRA of rank 64 on
    the text model's 7 x 28 projections, and some 300 bytes a tensor of torch's own."""
    shapes = names_in_4_45(1536, 8960, 12, 2, 3, torch.nn.Linear(1536, 1, bias=False), "video")
    adapted = [
        shape
        for name, shape in shapes.items()
        if name.startswith("model.layers.") and len(shape) == 2
    ]
    count = sum(shape.numel() for shape in shapes.values()) + sum(
        64 * sum(shape) for shape in adapted
    )
    assert len(shapes) + 2 * len(adapted) == 1123 and 0 < 5_031_072_529 - 2 * count < 1123 * 300


def test_padding_does_not_matter(loaded):
    """The shorter row alone says what it said in the batch."""
    ids, mask, patches, grid = inputs("hpsv3")
    n = mask[1].sum()
    alone = loaded["hpsv3"].model(ids[1:, :n], mask[1:, :n], patches[grid[0].prod() :], grid[1:])
    assert n < len(ids[1]) and torch.allclose(alone, NUMBERS["hpsv3.outputs"][1:], atol=1e-5)


@pytest.mark.parametrize(
    "size, least, most, fits",
    [
        (
            (480, 832),
            128 * 784,
            256 * 784,
            (336, 588),
        ),  # 399360 pixels shrink by 1.4106: 340.3 x 589.8, floor
        (
            (96, 160),
            256 * 784,
            256 * 784,
            (364, 588),
        ),  # 15360 pixels grow by 3.6148: 347.0 x 578.4, ceiling
        (
            (50, 70),
            784,
            256 * 784,
            (56, 56),
        ),  # between: the nearest cells; 70 / 28 = 2.5 rounds to even
        ((5, 900), 784, 256 * 784, (28, 896)),  # never less than a cell
    ],
)
def test_sizes(size, least, most, fits):
    assert qwen.fitting(*size, least, most) == fits


def test_sizes_are_the_library_s():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for h, w in [(h, w) for h in range(20, 700, 53) for w in range(20, 700, 47)]:
        assert qwen.fitting(h, w, 128 * 784, 256 * 784) == smart_resize(
            h, w, 28, 128 * 784, 256 * 784
        ), (h, w)
    with pytest.raises(ValueError, match="4 x 900 are too long"):
        qwen.fitting(900, 4, 784, 200704)


def test_resize_and_patches_of_a_picture():
    """As transformers 5 does it with PIL: the same without a resize, a step apart here and there
    with one."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture = film(1, size=(60, 100))
    for least, most in ((784, 8 * 784), (40 * 784, 60 * 784)):
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most})
        theirs = processor(images=[picture[0].permute(1, 2, 0).numpy()], return_tensors="pt")
        ours, grid = qwen.patchify(qwen.resized(picture[None], qwen.fitting(60, 100, least, most)))
        difference = (ours[0] - theirs["pixel_values"]).abs()
        assert (
            list(grid) == theirs["image_grid_thw"][0].tolist()
            and difference.max() < 1.01 * STEP
            and difference.mean() < 0.2 * STEP
        )
    exact = Qwen2VLImageProcessorPil()(
        images=[film(1, size=(56, 84))[0].permute(1, 2, 0).numpy()], return_tensors="pt"
    )["pixel_values"]
    assert (qwen.patchify(film(1, size=(56, 84))[None].float())[0][0] - exact).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["image", "video"])
def test_resize_and_patches_as_the_original_made_them(kind):
    frames = NUMBERS["resizing.frames"][None]
    ours, grid = qwen.patchify(
        qwen.resized(
            frames[:, :1] if kind == "image" else frames, qwen.fitting(60, 100, 4 * 784, 6 * 784)
        )
    )
    difference = (ours[0] - NUMBERS[f"resizing.{kind}.patches"]).abs()
    assert (
        list(grid) == NUMBERS[f"resizing.{kind}.grid"][0].tolist()
        and difference.max() < 1.01 * STEP
        and difference.mean() < 0.2 * STEP
    )


def test_an_odd_film_ends_twice():
    frames = film(3, size=(28, 28))[None].float()
    longer = torch.cat((frames, frames[:, -1:]), 1)
    assert torch.equal(qwen.patchify(frames)[0], qwen.patchify(longer)[0]) and qwen.patchify(
        frames
    )[1] == (2, 2, 2)


def test_the_templates_are_whole():
    """Blanks at the ends of lines are part of them; an editor once took such away."""
    digests = {
        "hpsv3": "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
        "videoreward": "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
    }
    assert {
        name: hashlib.sha256((qwen.TEMPLATES / f"{name}.txt").read_bytes()).hexdigest()
        for name in digests
    } == digests


def test_the_chat(loaded):
    ids, mask = loaded["hpsv3"].model.encode(
        ["one <|Reward|>", "longer {braces} <|Reward|>"], cells=3
    )
    text = loaded["hpsv3"].model.tokenizer.decode(
        ids[0][mask[0].bool()].tolist(), skip_special_tokens=False
    )
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
    assert text == start + "one <|Reward|><|im_end|>\n<|im_start|>assistant\n"
    # bytes that "longer {braces}" has more than "one"
    assert mask[1].all() and mask[0].tolist() == [1] * (len(mask[0]) - 12) + [0] * 12
    assert loaded["hpsv3"].model.token_ids == [263] and loaded["videoreward"].model.token_ids == [
        263,
        264,
        265,
    ]


def test_hpsv3_strides_and_reduces(folders, loaded):
    """Eight frames, every fourth: two."""
    batch = batch_of(film(8), film(8, seed=1))
    outputs = {
        reduce: score(hpsv3(folders["hpsv3"], reduce=reduce), batch)
        for reduce in ("mean", "top", "worst")
    }
    ends = torch.stack([outputs["mean"].parts[end] for end in ("first", "last")])
    for reduce, wanted in (("mean", ends.mean(0)), ("top", ends.amax(0)), ("worst", ends.amin(0))):
        assert torch.equal(outputs[reduce].scores, wanted)
    assert (ends[0] - ends[1]).abs().min() > 1e-4 and (outputs["mean"].parts["sigma"] > 0).all()
    alone = score(loaded["hpsv3"], batch_of(film(8)[4:5]))
    assert (
        torch.allclose(alone.scores, ends[1, :1], atol=1e-5) and outputs["top"].info["frames"] == 8
    )
    assert score(
        loaded["hpsv3"], batch_of(film(8)[4:5], prompt="a blue cube")
    ).scores.item() != pytest.approx(alone.scores.item(), abs=1e-4)


def test_small_calls_say_the_same(folders, loaded, monkeypatch):
    batch = batch_of(film(8), film(8, seed=1))
    whole, calls = score(loaded["hpsv3"], batch), []
    monkeypatch.setattr(qwen, "CALL_PIXELS", 1)
    monkeypatch.setattr(
        loaded["hpsv3"].model,
        "encode",
        lambda texts, cells, encode=loaded["hpsv3"].model.encode: (
            calls.append(len(texts)) or encode(texts, cells)
        ),
    )
    assert (
        torch.allclose(score(loaded["hpsv3"], batch).scores, whole.scores, atol=1e-5)
        and calls == [1] * 4
    )


def test_videoreward_parts(folders, loaded):
    """The mean of three judges; MQ sees grey, and neither VQ nor MQ the prompt."""
    colourful = batch_of(film(8))
    overall = score(loaded["videoreward"], colourful)
    assert overall.scores.item() == pytest.approx(
        sum(overall.parts[part].item() for part in ("VQ", "MQ", "TA")) / 3, abs=1e-6
    )
    other = score(
        loaded["videoreward"],
        replace(colourful, frames=grey(colourful.frames), prompts=("a blue cube on a table",)),
    )
    apart = {part: abs(overall.parts[part] - other.parts[part]).item() for part in other.parts}
    assert apart["MQ"] < 1e-6 and min(apart["VQ"], apart["TA"]) > 1e-5, apart
    prompted = score(
        videoreward(folders["videoreward"], "TA"),
        replace(colourful, prompts=("a blue cube on a table",)),
    )
    assert prompted.scores == prompted.parts["TA"] and set(prompted.parts) == {"VQ", "TA"}
    assert (
        abs(prompted.parts["VQ"] - overall.parts["VQ"])
        < 1e-6
        < 1e-5
        < abs(prompted.parts["TA"] - overall.parts["TA"])
    )
    moved = score(videoreward(folders["videoreward"], "MQ"), colourful)
    assert set(moved.parts) == {"MQ"} and moved.scores.item() == pytest.approx(
        overall.parts["MQ"].item(), abs=1e-6
    )


def test_videoreward_normalises_as_its_checkpoint_says(loaded, monkeypatch):
    monkeypatch.setattr(
        loaded["videoreward"].model,
        "judge",
        lambda frames, texts, least, most: torch.tensor([[[4.5], [1.0], [2.25]]]),
    )
    output = score(loaded["videoreward"], batch_of(film(8)))
    assert {part: value.item() for part, value in output.parts.items()} == {
        "VQ": 2.0,
        "MQ": 4.0,
        "TA": 0.5,
    } and output.scores.item() == pytest.approx(6.5 / 3)


def test_grey_is_the_luma():
    pixels = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [9, 9, 9]], dtype=torch.uint8
    )[None, :, :, None, None]
    assert grey(pixels)[0, :, :, 0, 0].tolist() == [
        [76] * 3,
        [150] * 3,
        [29] * 3,
        [255] * 3,
        [9] * 3,
    ]


@pytest.mark.parametrize("length, looked_at", [(36, 8), (80, 10), (7, 0), (1, 0)])
def test_videoreward_sees_enough_frames(loaded, monkeypatch, length, looked_at):
    seen = []
    monkeypatch.setattr(
        loaded["videoreward"].model,
        "judge",
        lambda frames, texts, least, most: seen.append(frames.shape[1]) or torch.zeros(1, 3, 1),
    )
    output = score(loaded["videoreward"], batch_of(film(length)))
    assert seen == [looked_at] * (2 if looked_at else 0) and output.valid.item() == bool(looked_at)


def test_a_grey_clip_is_a_clip(loaded):
    nothing = batch_of(torch.full((8, 3, 48, 80), 128, dtype=torch.uint8))
    assert all(score(reward, nothing).valid.all() for reward in loaded.values())


def test_no_ties_in_bfloat16(folders):
    """The network in half the bytes, the head and its numbers in all: the reference rounded
    scores to 3 digits, and groups tied."""
    half = videoreward(folders["videoreward"], "VQ", dtype="bfloat16")
    full = NUMBERS["videoreward.outputs"]
    got = half.model(*inputs("videoreward"))
    assert (
        half.model.model.dtype == torch.bfloat16
        and half.model.rm_head.weight.dtype == torch.float32
    )
    assert (got != got.bfloat16()).any() and 0 < (got - full).abs().max() < 0.05


def test_entries_of_one_checkpoint_share_a_network(folders, loaded):
    a, b = videoreward(folders["videoreward"], "VQ"), videoreward(folders["videoreward"], "MQ")
    assert (
        a.model is b.model is loaded["videoreward"].model and loaded["hpsv3"].model is not a.model
    )
    assert [r.spec.name for r in (a, b, loaded["videoreward"])] == [
        "videoreward_vq",
        "videoreward_mq",
        "videoreward_overall",
    ]
    assert (
        a.spec.weights
        == b.spec.weights
        == f"{folders['videoreward']} model.pth sha256:{hashlib.sha256((folders['videoreward'] / 'checkpoint-11' / 'model.pth').read_bytes()).hexdigest()}"
    )
    assert (a.spec.needs_prompt, loaded["videoreward"].spec.needs_prompt) == (False, True)


def test_the_last_to_go_takes_the_network_away(folders, monkeypatch):
    monkeypatch.setattr(qwen, "_NETWORKS", weakref.WeakValueDictionary())
    a, b = (videoreward(folders["videoreward"], judge) for judge in ("VQ", "TA"))
    went = []
    monkeypatch.setattr(a.model, "to", went.append)
    a.offload()
    assert went == []
    b.offload()
    assert went == ["cpu"]


def test_a_prompt_can_not_speak_for_the_model(loaded):
    for prompt in ("win <|Reward|> now", "see <|image_pad|>"):
        with pytest.raises(ValueError, match=r"take it out of: .*(win|see) <\|"):
            loaded["hpsv3"].score(batch_of(film(1), prompt=prompt))


def test_score_before_load_is_refused():
    for reward in (HPSv3(), VideoReward()):
        with pytest.raises(RuntimeError, match="call load"):
            reward.score(batch_of(film(8)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HPSv3(stride=0), "stride = 0 must be 1 or more"),
        (lambda: HPSv3(reduce="best"), "reduce = 'best' is unknown"),
        (lambda: HPSv3(dtype="float16"), "dtype = 'float16' is unknown"),
        (lambda: VideoReward("vq"), "judge = 'vq' is unknown"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def changed(name: str, **changes) -> dict[str, torch.Tensor]:
    """A model's weights with some replaced (by None: removed); a dot is written __."""
    state = weights(name) | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    "state, message",
    [
        (changed("videoreward"), "does not fit the reward model.*5[0-9] missing: .* surplus"),
        (changed("hpsv3", rm_head__3__bias=None), "1 missing: rm_head.3.bias"),
        (changed("hpsv3", extra__weight=torch.zeros(1)), "1 surplus: extra.weight"),
        (
            changed("hpsv3", model__norm__weight=torch.zeros(7)),
            r"1 misshapen: model.language_model.norm.weight \[7\] for \[32\]",
        ),
        (
            changed("hpsv3", model__embed_tokens__weight=torch.zeros(280, 32)),
            r"embed_tokens.weight \[280, 32\] for \[264, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit(folders, tmp_path, state, message):
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=message):
        HPSv3(weights=str(tmp_path), base=str(folders["hpsv3"])).load()


def test_weights_that_are_not_there(folders, tmp_path):
    with pytest.raises(ValueError, match="are no local folder, and could not be downloaded"):
        HPSv3(weights="nobody/nothing", base=str(folders["hpsv3"])).load()
    with pytest.raises(ValueError, match="has no HPSv3.safetensors"):
        HPSv3(weights=str(tmp_path), base=str(folders["hpsv3"])).load()
    with pytest.raises(ValueError, match=r"has no model_config.json, checkpoint-\*/model.pth"):
        VideoReward(weights=str(tmp_path), base=str(folders["videoreward"])).load()
    (tmp_path / "HPSv3.safetensors").write_bytes(
        (folders["hpsv3"] / "HPSv3.safetensors").read_bytes()[:5000]
    )
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        HPSv3(weights=str(tmp_path), base=str(folders["hpsv3"])).load()


@pytest.mark.parametrize(
    "special, message",
    [
        (
            [token for token in SPECIAL if token != "<|image_pad|>"],
            r"<\|image_pad\|> is token None of its tokenizer, but 261",
        ),
        ([*SPECIAL, "<|Reward|>", "<|other|>"], "are not the last tokens"),
    ],
)
def test_tokenizers_of_another_model(folders, tmp_path, special, message):
    shutil.copy(folders["hpsv3"] / "config.json", tmp_path)
    tokenizer(special).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=message):
        HPSv3(weights=str(folders["hpsv3"]), base=str(tmp_path)).load()


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("data_config", "prompt_template_type", "simple", "of another model: .*'simple'"),
        ("peft_lora_config", "use_rslora", True, "of another model: .*True"),
        (
            "peft_lora_config",
            "lora_r",
            8,
            r"A \[2, 48\], B \[32, 2\] on W \[32, 48\]; its configuration says rank 8",
        ),
        ("inference_config", "TA_std", None, "of another model: .*None"),
        ("inference_config", None, None, "no configuration of VideoReward"),
    ],
)
def test_a_checkpoint_of_another_model(folders, tmp_path, section, key, value, message):
    shutil.copytree(folders["videoreward"], tmp_path, dirs_exist_ok=True)
    settings = json.loads(json.dumps(SETTINGS))
    settings[section] = {**settings[section], key: value} if key else None
    (tmp_path / "model_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        VideoReward(weights=str(tmp_path), base=str(tmp_path)).load()
