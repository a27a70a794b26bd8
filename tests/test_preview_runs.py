"""The preview decoder in a run: what is scored in training is its, what is evaluated is the VAE's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from previews import NARROW, shapes, tensors, write_preview
from test_align import settings, write_recipe
from test_benchmarks import load

from kvpo.commands import main as cli
from kvpo.common.progress import Progress
from kvpo.config import from_dict
from kvpo.doctor.preview_ranks import preview_agreement
from kvpo.generators.preview import Preview
from kvpo.generators.streaming import VaeFrames
from kvpo.planning.amounts import amounts
from kvpo.planning.costs import costs, sizes_of
from kvpo.planning.memory import stages
from kvpo.planning.missing import missing
from kvpo.planning.work import savings, work
from kvpo.train import Alignment

CLIPS = {"clip_frames": 8, "min_frames": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_preview(tmp_path_factory.mktemp("preview") / "tae.safetensors")


@pytest.fixture(scope="module")
def config(folder, file):
    return from_dict(settings(folder, score=CLIPS | {"preview": str(file)}))


@pytest.fixture(scope="module")
def alignment(config, tmp_path_factory):
    return Alignment(config, tmp_path_factory.mktemp("out"), Progress())


@pytest.fixture
def decoded(monkeypatch):
    """Latent frames that each of the two decoders decodes."""
    counts = {Preview: 0, VaeFrames: 0}
    for kind in counts:
        frame = kind.frame

        def counted(self, *args, _kind=kind, _frame=frame, **kwargs):
            counts[_kind] += 1
            return _frame(self, *args, **kwargs)

        monkeypatch.setattr(kind, "frame", counted)
    return counts


def test_training_sees_the_preview_and_evaluation_the_vae(alignment, decoded):
    alignment.step(0)
    assert decoded[Preview] > 0 == decoded[VaeFrames]
    before = decoded[Preview]
    alignment.trials._scored("start", alignment.parts.policy.reference)
    assert decoded[Preview] == before and decoded[VaeFrames] > 0


def test_a_checkpoint_belongs_to_its_preview(alignment, folder, tmp_path):
    """A file of the same name with other numbers would give other rewards."""
    other = tensors(shapes(4, NARROW)) | {"decoder.22.bias": torch.full((3,), 0.25).half()}
    path = write_preview(tmp_path / "tae.safetensors", other)
    changed = Alignment(
        from_dict(settings(folder, score=CLIPS | {"preview": str(path)})), tmp_path, Progress()
    )
    plain = Alignment(from_dict(settings(folder)), tmp_path, Progress())
    assert alignment.state._identity["preview"] != changed.state._identity["preview"]
    assert alignment.state._identity["decoder"] == plain.state._identity["decoder"]
    assert "preview" not in plain.state._identity


def test_ranks_of_a_preview_with_the_vae_s(alignment):
    """With itself in both places they agree; a random network's pixels say something else."""
    script = alignment.parts.source.script(0, 0)
    rollout, *_ = alignment.parts.explore(script, alignment.parts.embed(script), ("ranks",))
    found = preview_agreement(alignment.parts, rollout)
    assert set(found.ranks) == {(s, r) for s in ("local", "global") for r in ("Warmth", "Change")}
    assert all(math.isnan(r) or abs(r) < 1.0 + 1e-9 for r in found.ranks.values())
    assert found.pixels > 1.0
    pipeline = alignment.parts.pipeline
    kept, pipeline.preview = pipeline.preview, VaeFrames(pipeline.vae)
    same = preview_agreement(alignment.parts, rollout)
    pipeline.preview = None
    with pytest.raises(ValueError, match="no preview decoder; set score.preview"):
        preview_agreement(alignment.parts, rollout)
    pipeline.preview = kept
    assert same.pixels == 0.0 and list(same.ranks.values()) == pytest.approx([1.0] * 4)


def test_the_doctor_gives_a_line_for_each_reward_and_signal(capsys, folder, file, tmp_path):
    content = settings(folder, score=CLIPS | {"preview": str(file)})
    assert cli.main(["doctor", write_recipe(tmp_path / "r.yaml", content)]) == 0
    said = capsys.readouterr().out
    for signal in ("local", "global"):
        for reward in ("Warmth", "Change"):
            assert f"preview decoder: ranks of {reward}, {signal}, with the VAE's" in said
    assert "all invariants hold" in said


def test_the_benchmark_takes_the_mean_over_groups(alignment):
    module = load("preview")
    found = module.measured(alignment.parts, 2, Progress())
    results = module.summary(found)
    both = [f.ranks["local", "Warmth"] for f in found]
    assert results["local Warmth"]["mean"] == pytest.approx(sum(both) / 2)
    assert results["local Warmth"]["groups"] == 2 and len(results) == 4


def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    capsys, folder, tmp_path, monkeypatch
):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded before the preview decoder was checked")

    for name in ("load_pipeline", "load_with_texts", "judges"):
        monkeypatch.setattr(f"kvpo.runs.parts.{name}", loaded)
    path = write_preview(tmp_path / "tae.safetensors", tensors(shapes(16, NARROW)))
    recipe = write_recipe(
        tmp_path / "r.yaml", settings(folder, score=CLIPS | {"preview": str(path)})
    )
    assert cli.main(["align", recipe, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip()
    assert "decodes latents of 16 channels" in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_said_with_all_else_that_is_missing(folder):
    config = from_dict(settings(folder, score=CLIPS | {"preview": "nowhere/taew2_1.pth"}))
    (fault,) = missing(config)
    assert "score.preview: nowhere/taew2_1.pth is not there" in str(fault)


def test_the_plan_counts_it(config, folder):
    """Its work and its field in place of the VAE's, and its weights beside it."""
    plain, sizes = from_dict(settings(folder)), sizes_of(config)
    found, without = costs(config, sizes), costs(plain, sizes)
    assert without.preview is None and found.full.rows == without.full.rows
    assert found.decoding(plain) is found.full and found.decoding(config) is found.preview
    assert found.preview.field == 8 and 0 < found.preview.rows.flops < found.full.rows.flops
    counted = amounts(config, sizes.geometry, field=8)
    expected = counted.decoded_prefix * found.preview.prefix.flops
    expected += counted.decoded_rows * found.preview.rows.flops / found.rows["decode_rows"]
    assert work(config, sizes, found, counted)["decoding"] == pytest.approx(expected)
    by_stage = stages(config, sizes, found)
    assert by_stage["decoding"]["preview decoder"] == found.preview.weights > 0
    assert "preview decoder" not in stages(plain, sizes, without)["decoding"]
    assert not any("preview" in option for option in savings(config, sizes, found))
