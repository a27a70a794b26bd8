"""The held-out evaluators: another kind of eye, which must agree on the obvious."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from kvpo.common.rng import stream
from kvpo.mini.pretraining.attributes import frames, spoil, train_classifier
from kvpo.mini.rewards.attributes import HEADS, WEIGHTS, load_network, read_frames
from kvpo.mini.rewards.flow_motion import FlowMotion
from kvpo.mini.rewards.heldout import AttributeAgreement, IdentityDrift, diversity
from kvpo.mini.rewards.world import MotionQuality, TextAlignment, VisualQuality
from kvpo.mini.world import PILLAR, Scene, play, render
from kvpo.rewards.base import VideoBatch, check_output, to_uint8
from kvpo.rewards.calibration import degrade

SCENE = Scene("circle", "red", "small", "paper", False, "left", "quickly")
PROMPT = "a small red circle moves quickly to the left over white paper"


def film(scene: Scene, count: int = 36, x: float = 40.0) -> torch.Tensor:
    return to_uint8(render([scene], play([scene], [0], count, x, 30.0)))


def batch_of(clip: torch.Tensor, prompt: str = PROMPT) -> VideoBatch:
    return VideoBatch(clip[None], 16.0, (prompt,))


@pytest.fixture(scope="module")
def evaluators():
    loaded = {"attributes": AttributeAgreement(), "identity": IdentityDrift(), "flow": FlowMotion()}
    for evaluator in loaded.values():
        evaluator.load("cpu")
    return loaded


def value(evaluator, batch: VideoBatch) -> float:
    return check_output(evaluator.spec, batch, evaluator.score(batch)).scores.item()


def test_no_family_in_common_with_training(evaluators):
    trained = {reward.spec.family for reward in (VisualQuality(), MotionQuality(), TextAlignment())}
    assert trained == {"world-pixels"} and trained.isdisjoint(
        {e.spec.family for e in evaluators.values()}
    )


def test_the_weights_are_small_and_say_how_good_they_are():
    with safe_open(str(WEIGHTS), framework="pt") as file:
        about = json.loads(file.metadata()["card"])
    assert WEIGHTS.stat().st_size <= 400 * 1024
    for kind, least in (("clean", 0.99), ("spoilt", 0.97)):
        assert all(about["unseen"][kind][name] >= least for name in HEADS), about


def test_accuracy_on_fresh_spoilt_frames():
    generator = stream(99, "heldout-test")
    pixels, labels = frames(generator, 256)
    p, _ = read_frames(load_network(), to_uint8(spoil(pixels, generator))[None])
    for name in HEADS:
        at = labels[name] >= 0
        assert (p[name][0].argmax(-1) == labels[name])[at].float().mean() > 0.95, name


@pytest.mark.parametrize(
    "scene, part",
    [
        (replace(SCENE, colour="blue"), "colour"),
        (replace(SCENE, shape="cross"), "shape"),
        (replace(SCENE, size="large"), "size"),
        (replace(SCENE, place="night"), "place"),
        (replace(SCENE, pillar=True), "pillar"),
    ],
)
def test_attributes_name_the_wrong_part(evaluators, scene, part):
    assert value(evaluators["attributes"], batch_of(film(SCENE))) > 0.97
    parts = {
        k: v.item() for k, v in evaluators["attributes"].score(batch_of(film(scene))).parts.items()
    }
    # a pillar that nobody asked for hides the object
    assert parts.pop(part) < 0.1 and min(parts.values()) > (0.5 if part == "pillar" else 0.9), parts


def test_attributes_miss_the_object_in_the_open_only(evaluators):
    empty = film(SCENE, 1)[:, :, :1, :1].expand(36, 3, 64, 64).clone()
    empty[:] = film(SCENE, 1)[0, :, -1:, -1:]
    assert value(evaluators["attributes"], batch_of(empty)) < 0.6
    empty[..., PILLAR[0] : PILLAR[1]] = torch.tensor((76, 70, 66), dtype=torch.uint8)[:, None, None]
    parts = evaluators["attributes"].score(batch_of(empty, PROMPT + " with a pillar")).parts
    assert parts["colour"].isnan().all() and parts["pillar"].item() > 0.95


def test_identity_drift(evaluators):
    steady, drifts = batch_of(film(SCENE)), degrade(batch_of(film(SCENE)), "colour_drift", 0)
    changed = batch_of(torch.cat((film(SCENE, 18), film(replace(SCENE, shape="cross"), 18))))
    good = value(evaluators["identity"], steady)
    assert (
        good > 0.95
        and value(evaluators["identity"], drifts) < good - 0.1
        and value(evaluators["identity"], changed) < good - 0.2
    )


@pytest.mark.parametrize("kind", ["left", "right", "up", "down", "circle", "bounce"])
def test_flow_knows_the_direction(evaluators, kind):
    batch = batch_of(film(replace(SCENE, motion=kind), 40))
    verb = {
        "left": "moves left",
        "right": "moves right",
        "up": "rises",
        "down": "sinks",
        "circle": "circles",
        "bounce": "bounces",
    }
    direction = {
        k: evaluators["flow"]
        .score(VideoBatch(batch.frames, 16.0, (f"a red circle {v} quickly on paper",)))
        .parts["direction"]
        .item()
        for k, v in verb.items()
    }
    right = direction.pop(kind)
    assert right > 0.8 and right > max(direction.values()) + 0.2, (kind, right, direction)


def test_flow_hates_jitter_shuffling_and_rest(evaluators):
    batch = batch_of(film(SCENE))
    good = evaluators["flow"].score(batch).parts["smooth"].item()
    assert good > 0.85
    for name in ("frozen", "shuffle", "jitter", "noise"):
        assert (
            evaluators["flow"].score(degrade(batch, name, 0)).parts["smooth"].item() < 0.5 * good
        ), name


def test_nothing_to_see_is_invalid_for_flow(evaluators):
    grey = batch_of(torch.full((36, 3, 64, 64), 128, dtype=torch.uint8))
    output = check_output(evaluators["flow"].spec, grey, evaluators["flow"].score(grey))
    assert not output.valid.any() and output.scores.isnan().all()


def test_diversity_tells_meaning_from_pixels():
    network = load_network()
    same, moved, recoloured = film(SCENE), film(SCENE, x=10.0), film(replace(SCENE, colour="green"))
    assert diversity(torch.stack((same, same)), network) == pytest.approx(
        {"pixels": 0, "embedding": 0, "attributes": 0}, abs=1e-5
    )
    shifted = diversity(torch.stack((same, moved)), network)
    other = diversity(torch.stack((same, recoloured)), network)
    assert (
        shifted["pixels"] > other["pixels"]
        and shifted["attributes"] < 0.02 < 0.15 < other["attributes"]
    )
    with pytest.raises(ValueError, match="at least 2 videos"):
        diversity(same[None], network)


def test_score_before_load_is_refused():
    with pytest.raises(RuntimeError, match="call load"):
        AttributeAgreement().score(batch_of(film(SCENE)))


def test_bad_weights_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(WEIGHTS.read_bytes()[:1000])
    for path in (tmp_path / "missing.safetensors", tmp_path / "broken.safetensors"):
        with pytest.raises(ValueError, match="cannot read attribute weights"):
            load_network(path)


def test_training_is_deterministic():
    a, b = (train_classifier(seed=3, steps=2).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
