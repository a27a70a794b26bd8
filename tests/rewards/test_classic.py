"""Classical measures on clips whose motion, colours and statistics are known by construction."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from kvpo.common.rng import stream
from kvpo.rewards.base import VideoBatch, check_output
from kvpo.rewards.calibration import DEGRADATIONS, loop, pan_of_still, zoom_of_still
from kvpo.rewards.classic import measures
from kvpo.rewards.classic.classic import Classic, falling, mean_of, rising
from kvpo.rewards.classic.niqe import WEIGHTS, Niqe, Photographs

SIZE, T = 64, 16


def texture(seed: int, height: int, width: int, contrast: float = 40.0) -> torch.Tensor:
    """Coloured blots, float [3, H, W], a few pixels wide."""
    noise = torch.randn(1, 3, height, width, generator=stream(seed, "texture"))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    return (128 + contrast * smooth / smooth.std())[0].clamp(0, 255)


def film(
    speed: float = 1.0, camera: float = 0.0, frames: int = T, size: int = SIZE
) -> torch.Tensor:
    """uint8 [1, T, 3, S, S]: a textured square of 3/8 of the side goes down over textured
    ground, which goes left."""
    ground, thing, side = texture(1, size, 2 * size), texture(2, size, size, 55.0), 3 * size // 8
    clip = []
    for t in range(frames):
        picture = ground[:, :, round(camera * t) : round(camera * t) + size].clone()
        top = round(4 + speed * t)
        picture[:, top : top + side, 20 : 20 + side] = thing[:, :side, :side]
        clip.append(picture)
    return torch.stack(clip)[None].round().to(torch.uint8)


def batch_of(frames: torch.Tensor, fps: float = 16.0) -> VideoBatch:
    return VideoBatch(frames, fps, ("",) * len(frames))


def judged(frames: torch.Tensor, fps: float = 16.0):
    reward, batch = Classic(), batch_of(frames, fps)
    return check_output(reward.spec, batch, reward.score(batch))


def pictures(frames: torch.Tensor) -> list[np.ndarray]:
    return measures.shrink(frames[0].numpy())


def plain(*levels: float) -> list[np.ndarray]:
    return [np.full((16, 16, 3), level, dtype=np.uint8) for level in levels]


# ---- single measures


def test_flow_of_a_known_translation():
    ground = texture(1, SIZE, 80).round().to(torch.uint8)
    (step,) = measures.steps(pictures(torch.stack((ground[:, :, 5:69], ground[:, :, 2:66]))[None]))
    inner = step.flow[8:-8, 8:-8]
    np.testing.assert_allclose(np.median(inner, axis=(0, 1)), (3, 0), atol=0.05)
    assert (
        np.abs(inner - (3, 0)).mean() < 0.1
        and measures.warp_error(step) < 1e-4
        and measures.lost(step) < 0.02
    )
    assert measures.own_motion(step) == 0  # all of it is the camera's


@pytest.mark.parametrize("camera", [0.0, 1.0])
def test_own_motion_is_the_things_speed_whatever_the_camera_does(camera):
    steps = measures.steps(pictures(film(speed=1.0, camera=camera, frames=6)))
    speed = np.mean([measures.own_motion(step) for step in steps]) * math.hypot(SIZE, SIZE)
    assert speed == pytest.approx(math.hypot(1.0, camera), rel=0.3)


def test_one_thing_on_an_empty_wall_is_no_camera():
    clip = film()
    wall = torch.full_like(clip, 200)
    for t in range(T):
        wall[0, t, :, 4 + t : 28 + t, 20:44] = clip[0, t, :, 4 + t : 28 + t, 20:44]
    assert judged(wall).parts["motion"].item() > 0.5


def test_rates_are_per_second():
    slow, fast = (judged(film(), fps).parts["motion"].item() for fps in (0.5, 1.0))
    assert fast == pytest.approx(2 * slow, rel=1e-5) and 0 < fast < 1


def test_bend_of_even_and_of_alternating_motion():
    right = measures.Step(
        *pictures(film(frames=2)),
        np.full((SIZE, SIZE, 2), (1.0, 0.0)),
        *[np.ones((SIZE, SIZE), bool)] * 2,
    )
    left = measures.Step(right.before, right.after, -right.flow, right.inside, right.found)
    assert measures.bend([right] * 4) == 0
    assert measures.bend([right, left] * 2) == pytest.approx(2 / 1.05)


def test_flicker_and_fade():
    assert measures.flicker(plain(100, 110, 100, 110)) == pytest.approx(20 / 255)
    assert measures.flicker(plain(100, 110, 120, 130)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "levels, expected",
    [
        ((0, 10, 20, 30), 1.0),
        ((0, 10, 0, 10), 0.0),
        ((7, 7, 7, 7), 0.0),
        ((0, 0, 0, 30), 0.5),  # frame 2 has been there, frame 3 has not
        (
            (0, 20, 5, 30),
            (5 / 20 + 10 / 20) / 2,
        ),  # successive frames are 20, 15, 25 apart: 20 on average
    ],
)
def test_novelty(levels, expected):
    assert measures.novelty(plain(*levels)) == pytest.approx(expected)


@pytest.mark.parametrize("waves", [4, 8])
def test_sharpness_of_a_grating(waves):
    """Of cos(kx) the second difference is 2 (1 - cos k), the slope sin k: their ratio is 2 tan(k
    / 2), whatever the contrast."""
    k = 2 * math.pi * waves / SIZE
    for contrast in (30, 100):
        row = 128 + contrast * np.cos(k * np.arange(SIZE + 1))
        picture = np.repeat(np.repeat(row.round().astype(np.uint8)[None, :, None], SIZE, 0), 3, 2)
        assert measures.sharpness(picture) == pytest.approx(2 * math.tan(k / 2), rel=0.03)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x: x, 0.0),
        (
            lambda x: 0.5 * x,
            math.log(136 / 72),
        ),  # brightness 128 -> 64, each on a floor of 8; saturation is tested below
        (lambda x: x.roll(1, -3), 2 * math.pi / 3),  # red becomes green: a third of the circle
    ],
)
def test_colour_drift(change, expected):
    still = texture(3, SIZE, SIZE)
    grey = still.mean(0, keepdim=True)
    still = 128 + (grey - 128) + 60 * torch.tensor([1.0, -0.5, -0.5])[:, None, None]
    still = still * 128 / still.mean()
    step = static_step(still, change(still))
    brightness, saturation, hue = measures._gain(step)
    total = math.hypot(brightness, saturation, hue)
    assert measures.colour_drift([step]) == pytest.approx(total) and max(
        abs(brightness), abs(hue)
    ) == pytest.approx(expected, abs=0.05)


def test_colour_drift_counts_the_furthest_not_the_end():
    still = texture(3, SIZE, SIZE)
    pale = still.mean(0, keepdim=True) + 0.5 * (still - still.mean(0, keepdim=True))
    there, back = static_step(still, pale), static_step(pale, still)
    assert measures.colour_drift([there, back]) == pytest.approx(math.log(2), rel=0.2)
    assert measures.colour_drift([there]) == pytest.approx(
        measures.colour_drift([there, back]), rel=1e-6
    )


def static_step(before: torch.Tensor, after: torch.Tensor) -> measures.Step:
    """A step in which nothing moves."""
    first, second = (
        np.ascontiguousarray(x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
        for x in (before, after)
    )
    return measures.Step(
        first, second, np.zeros((SIZE, SIZE, 2), np.float32), *[np.ones((SIZE, SIZE), bool)] * 2
    )


def test_a_cut_is_lost():
    steps = measures.steps(
        pictures(torch.cat((film(frames=2), 255 - film(camera=9, frames=5)[:, 4:]), 1))
    )
    assert measures.lost(steps[0]) < 0.2 < 0.6 < measures.lost(steps[1])


# ---- the composite


def test_shapes_of_the_parts():
    assert [rising(x, 2.0) for x in (0, 1, 2, 9)] == [0, 0.5, 1, 1]
    assert [falling(x, 1.0, 2.0) for x in (0, 1, 3)] == [1, 1, pytest.approx(math.exp(-1))]
    nan = float("nan")
    assert math.isnan(rising(nan, 2.0)) and math.isnan(falling(nan, 1.0, 2.0))
    means = mean_of(torch.tensor([[1.0, 0.0, 1.0, nan], [0.25, 1.0, nan, 0.0]]))
    assert means[:2].tolist() == [0.5, 0.0] and means[2].isnan() and means[3] == 0


def test_frozen_is_measured_and_worth_nothing():
    output = judged(DEGRADATIONS["frozen"](film(), stream(0)))
    assert (
        output.valid.all()
        and output.scores.item()
        == 0
        == output.parts["motion"].item()
        == output.parts["novelty"].item()
    )


@pytest.fixture(scope="module")
def good():
    return film(camera=0.5)


@pytest.fixture(scope="module")
def best(good):
    return judged(good).scores.item()


BLIND = {"backwards", "twin", "vanish"}
"""A reversed clip, a second object and a grey one (this clip has no plain place to vanish in)
are for other rewards."""


@pytest.mark.parametrize("flaw", [f for f in DEGRADATIONS if f not in BLIND])
def test_every_flaw_costs(good, best, flaw):
    assert judged(DEGRADATIONS[flaw](good, stream(0, "classic-test"))).scores.item() < best - 0.05


def test_a_pan_over_a_still_is_no_motion(good):
    for cheat in (pan_of_still, zoom_of_still):
        parts = judged(cheat(good, stream(0, "pan"))).parts
        assert parts["motion"].item() < 0.25 < 0.9 < judged(good).parts["motion"].item()


@pytest.mark.parametrize(
    "part, spoil, doses",
    [
        (
            "warp",
            lambda x, dose: x + dose * torch.randn(x.shape, generator=stream(1)),
            (0, 10, 20, 40),
        ),
        (
            "flicker",
            lambda x, dose: x * (1 + dose * (-1) ** torch.arange(T))[:, None, None, None],
            (0, 0.05, 0.1, 0.2),
        ),
        (
            "colour",
            lambda x, dose: (
                x.mean(2, keepdim=True)
                + (1 + dose * torch.arange(T) / T)[:, None, None, None]
                * (x - x.mean(2, keepdim=True))
            ),
            (0, 0.5, 1, 2),
        ),
        (
            "sharp",
            lambda x, dose: (
                (1 - dose) * x + dose * DEGRADATIONS["blur"](x.to(torch.uint8), stream(0))
            ),
            (0, 0.5, 0.8, 1),
        ),
    ],
)
def test_a_larger_dose_costs_more(good, part, spoil, doses):
    values = [
        judged(spoil(good.float(), dose).round().clamp(0, 255).to(torch.uint8)).parts[part].item()
        for dose in doses
    ]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.2, values


def test_large_pictures_are_judged_as_small_ones():
    clip = film(camera=0.5, frames=8, size=80)[..., :40, :]
    wide = clip.repeat_interleave(4, -1).repeat_interleave(4, -2)  # 320 wide: the limit
    wider = clip.repeat_interleave(8, -1).repeat_interleave(8, -2)
    for name, value in judged(wide).parts.items():
        assert judged(wider).parts[name].item() == pytest.approx(value.item(), abs=0.02), name


def test_scores_do_not_depend_on_the_batch(good):
    other = film(camera=0.0)
    assert torch.equal(
        judged(torch.cat((good, other))).scores,
        torch.cat((judged(good).scores, judged(other).scores)),
    )


def test_bad_input(good):
    assert not judged(good[:, :1]).valid.any() and not judged(good[:, :7]).valid.any()
    grey = judged(DEGRADATIONS["grey"](good, stream(0)))
    assert grey.valid.all() and grey.scores.item() == 0 == grey.parts["sharp"].item()
    pumping = judged(
        (torch.arange(T)[None, :, None, None, None] * 8).expand(1, T, 3, SIZE, SIZE).to(torch.uint8)
    )
    assert pumping.scores.item() == 0 and pumping.parts["motion"].isnan().all()
    ramp = judged(
        (torch.arange(SIZE) * 2 + torch.arange(T)[:, None, None, None])[None]
        .expand(1, T, 3, SIZE, SIZE)
        .to(torch.uint8)
    )
    # it changes, is not plain, and has no texture to follow
    assert not ramp.valid.any() and ramp.scores.isnan().all()
    with pytest.raises(ValueError, match="64 x 8 pixels .* too small"):
        judged(good[..., :8, :])
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            Classic(enough_motion=bad)


# ---- the cheats


def test_cheats_are_made_of_what_they_say(good):
    later = good.clone()
    later[:, 1:] = 0
    for cheat in (pan_of_still, zoom_of_still):
        cheated = cheat(good, stream(0, "cheat"))
        assert cheated.shape == good.shape and cheated.dtype == torch.uint8
        # the first frame is all they need
        assert torch.equal(cheated, cheat(later, stream(0, "cheat")))
        # and every frame is another one
        assert (cheated[:, 1:] != cheated[:, :-1]).flatten(2).any(2).all()
    assert torch.equal(zoom_of_still(good, stream(0))[:, 0], good[:, 0])
    assert torch.equal(loop(good, stream(0)), good[:, [0, 1, 2, 3] * 4])


# ---- NIQE


@pytest.fixture(scope="module")
def niqe():
    reward = Niqe(stride=1)
    reward.load("cpu")
    return reward


@pytest.fixture(scope="module")
def photograph():
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_niqe_is_the_published_one(niqe, photograph):
    """PyPI basicsr 1.4.2, whose port agrees with the MATLAB release to 1e-5, gives GOLDEN."""
    assert -niqe.score(batch_of(photograph[None, None])).scores.item() == pytest.approx(
        GOLDEN, abs=0.02
    )


GOLDEN = 3.5782


def test_niqe_dislikes_noise_and_blur(niqe, photograph):
    clip = photograph[None, None]
    clean, noisy, blurred = (
        niqe.score(batch_of(x)).scores.item()
        for x in (
            clip,
            DEGRADATIONS["noise"](clip, stream(0)),
            DEGRADATIONS["blur"](clip, stream(0)),
        )
    )
    assert noisy < clean - 2 and blurred < clean - 1


@pytest.mark.parametrize(
    "shape, draw",
    [
        (2.0, torch.randn),
        (
            1.0,
            lambda *size, generator: (
                torch.rand(*size, generator=generator).log()
                - torch.rand(*size, generator=generator).log()
            ),
        ),
    ],
)
def test_niqe_fits_gaussians_and_laplacians(niqe, shape, draw):
    alpha, mean, left, right = (
        v.item() for v in niqe.model.fit(3 * draw(1, 400, 400, generator=stream(0, "fit")).double())
    )
    width = {2.0: 3 * math.sqrt(2), 1.0: 3.0}[shape]  # exp(-(x / width) ** shape)
    assert (
        alpha == pytest.approx(shape, rel=0.03)
        and mean == pytest.approx(0, abs=0.1)
        and left == pytest.approx(width, rel=0.04) == pytest.approx(right, rel=0.04)
    )


def test_niqe_of_the_photographs_own_statistics_is_zero(niqe, photograph):
    features = niqe.model.features(photograph)
    assert Photographs(features.mean(0), features.T.cov())(photograph).item() == pytest.approx(
        0, abs=1e-6
    )


def test_niqe_needs_patches_with_contrast(niqe, photograph):
    for frame in (
        photograph[:, :191, :191],
        photograph[:, :64, :64],
        torch.full((3, 200, 200), 128, dtype=torch.uint8),
    ):
        assert niqe.score(batch_of(frame[None, None])).scores.isnan().all()
    letterbox = torch.cat((torch.zeros_like(photograph[:, :96]), photograph[:, 96:]), 1)
    assert niqe.score(batch_of(letterbox[None, None])).valid.all()


def test_niqe_parameters_come_with_their_notice():
    with safe_open(str(WEIGHTS), framework="pt") as file:
        assert (
            "University of Texas at Austin" in file.metadata()["notice"]
            and "NIQE Software Release" in file.metadata()["source"]
        )
    assert WEIGHTS.stat().st_size < 16_000


def test_niqe_refuses_options():
    with pytest.raises(ValueError, match="stride = 0"):
        Niqe(stride=0)
    with pytest.raises(ValueError, match="reduce = 'median'"):
        Niqe(reduce="median")
