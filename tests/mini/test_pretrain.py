"""Pretraining of the miniature: layouts, the flat forward against the cached one, resuming."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError

from kvpo.common.files import beside
from kvpo.common.progress import Progress
from kvpo.common.rng import normal, stream
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.history import SinkWindow
from kvpo.generators.pipeline import Pipeline, use_channels_last
from kvpo.mini.pretraining.autoencoder import clip, encode, fit_encoder, set_latent_scale
from kvpo.mini.pretraining.flat import flat_velocity, use_flat_attention
from kvpo.mini.pretraining.layouts import SLOTS, draw_layout, frames_of, layout
from kvpo.mini.pretraining.library import Library, load_library, save_library
from kvpo.mini.pretraining.linear_encoder import install
from kvpo.mini.pretraining.networks import (
    BLOCK,
    SINK,
    WINDOW,
    new_text_encoder,
    new_transformer,
    new_vae,
)
from kvpo.mini.pretraining.openings import (
    build_openings,
    likeliest,
    opening_lesson,
)
from kvpo.mini.pretraining.pretrain import Networks, Settings, export, pretrain
from kvpo.mini.pretraining.side_by_side import trained_beside
from kvpo.mini.pretraining.training import Kernels, Stage, forget, optimizers
from kvpo.mini.world import PILLAR

H = W = 4
CHANNELS, TEXT, TOKENS = 4, 8, 5


@pytest.fixture(scope="module")
def code():
    return fit_encoder(0, 40)


def test_the_stock_encoder_is_the_linear_code(code):
    vae = new_vae(0).eval()
    install(code, vae)
    pixels = torch.stack([clip(1, "encoder", i) for i in range(3)])
    with torch.no_grad():
        stock = vae.encode(pixels.transpose(1, 2) * 2 - 1).latent_dist
    assert torch.allclose(stock.mode().transpose(1, 2), code.raw(pixels), atol=2e-3)
    assert float(stock.std.max()) < 0.01


def test_a_still_picture_has_one_latent(code):
    """The first frame is read as if the picture stood still."""
    still = clip(2, "still")[:1].expand(9, -1, -1, -1)[None]
    z = code.raw(still)[0]
    assert torch.allclose(z, z[:1].expand_as(z), atol=1e-4)


def test_latents_are_scaled_but_not_whitened(code):
    vae = new_vae(0)
    set_latent_scale(vae, code, 0, 8)
    z = torch.cat([encode(vae, code, clip(0, "scale", i)[None]) for i in range(8)])
    spread = z.std((0, 1, 3, 4))
    assert float(z.std()) == pytest.approx(1, abs=0.01) and float(spread.max()) > 2 * float(
        spread.min()
    )


def tiny_transformer() -> WanTransformer3DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=1024,
        )
        for parameter in (
            model.parameters()
        ):  # stock initial values leave norms at 1 and biases at 0, where many mistakes cancel
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def test_layout_of_an_opening_by_hand():
    slots = layout("opening", 3).slots
    assert len(slots) == SLOTS
    seen = [(s.source, s.noisy, s.prompt, s.reads) for s in slots]
    first, second, third = frames_of(0), frames_of(1), frames_of(2)
    # blocks 1 and 2 under the new prompt; block 0 is the sink and keeps its own
    again_1 = frames_of(3)
    again_2 = frames_of(4)
    assert seen[:6] == [
        (0, False, 0, ()),
        (1, False, 1, first),
        (2, False, 2, first + second),
        (1, False, 3, first + again_2),
        (2, False, 3, first + again_1),
        (3, False, 3, first + again_1 + again_2),
    ]
    assert seen[7:13] == [
        (1, True, 1, first),
        (2, True, 2, first + second),
        (3, True, 3, first + again_1 + again_2),
        (4, True, 4, first + again_2 + frames_of(5)),
        (5, True, 5, first + frames_of(5) + frames_of(6)),
        (5, True, 5, first + frames_of(5) + frames_of(6)),
    ]
    assert third == (6, 7, 8)


def test_layout_of_a_later_stretch_by_hand():
    slots = layout("later", None).slots
    clean = [s for s in slots if not s.noisy]
    assert [s.source for s in clean] == list(range(7))
    assert clean[4].reads == frames_of(0) + frames_of(2) + frames_of(3)
    noisy = [s for s in slots if s.noisy]
    assert [s.source for s in noisy] == [3, 4, 5, 6, 7, 7, 6, 5]
    assert noisy[4].reads == frames_of(0) + frames_of(5) + frames_of(6)


@pytest.mark.parametrize("switch", [None, 2, 3, 5])
def test_unrouted_layouts_read_the_deployed_window(switch):
    plan, window = layout("opening", switch), SinkWindow(SINK, WINDOW)
    for slot in plan.slots:
        if slot.noisy:
            frames = [BLOCK * plan.slots[f // BLOCK].source + f % BLOCK for f in slot.reads]
            assert tuple(frames) == window.past(BLOCK * slot.source, BLOCK)
            assert all(not plan.slots[f // BLOCK].noisy for f in slot.reads)


def test_layouts_never_read_the_future_and_keep_the_budget():
    for i in range(200):
        plan = draw_layout(stream(0, "layouts", i))
        assert len(plan.slots) == SLOTS
        index, real = plan.keys()
        assert index.shape == real.shape == (SLOTS, WINDOW) and int(index.max()) < BLOCK * SLOTS
        for slot in plan.slots:
            assert len(set(slot.reads)) == len(slot.reads) <= WINDOW - BLOCK
            behind = [plan.slots[f // BLOCK] for f in slot.reads]
            if slot.noisy and plan.kind != "routed":
                assert all(not s.noisy and s.source < slot.source for s in behind)
            assert all(not s.noisy for s in behind)


@pytest.mark.parametrize("switch", [None, 4])
def test_flat_forward_equals_cached_forward(switch):
    """Teacher forcing in one sequence computes what the streaming generator computes block by
    block."""
    model, plan = tiny_transformer(), layout("opening", switch)
    sources, rows, slots = plan.sources, 2, len(plan.slots)
    x0 = normal((rows, BLOCK * sources, CHANNELS, H, W), 1, "x0")
    noisy = normal((rows, BLOCK * slots, CHANNELS, H, W), 1, "noisy")
    texts = normal((sources, 1, TOKENS, TEXT), 1, "text")
    if switch is not None:
        texts = torch.stack([texts[0] if s < switch else texts[switch] for s in range(sources)])
    sigma = torch.tensor(
        [0.625 + 0.02 * i if slot.noisy else 0.0 for i, slot in enumerate(plan.slots)]
    ).expand(rows, -1)
    at = plan.frames()
    is_noisy = torch.tensor([slot.noisy for slot in plan.slots]).repeat_interleave(BLOCK)
    x = torch.where(is_noisy[None, :, None, None, None], noisy, x0[:, at])
    text = torch.stack([texts[slot.prompt, 0] for slot in plan.slots]).expand(rows, -1, -1, -1)
    use_flat_attention(model)
    with torch.no_grad():
        flat = flat_velocity(model, plan, x, sigma, text, at.expand(rows, -1))

    cached, window = CausalWan(model), SinkWindow(SINK, WINDOW)
    cache = cached.new_cache(40, H, W, rows=rows, sink=SINK)
    with torch.no_grad():
        for block in range(sources):
            frames = list(range(BLOCK * block, BLOCK * (block + 1)))
            if block == switch:
                again = range(SINK, frames[0])
                cached.commit(
                    x0[:, again.start : again.stop],
                    texts[block],
                    list(again),
                    cache,
                    range(SINK),
                    own=WINDOW - SINK,
                )
            past = window.past(frames[0], BLOCK)
            for i, slot in enumerate(plan.slots):
                if slot.noisy and slot.source == block:
                    v = cached.velocity(
                        x[:, BLOCK * i : BLOCK * (i + 1)],
                        float(sigma[0, i]),
                        texts[block],
                        frames,
                        cache,
                        past,
                    )
                    assert torch.allclose(v, flat[:, BLOCK * i : BLOCK * (i + 1)], atol=1e-4), (
                        f"slot {i}, block {block}"
                    )
            cached.commit(x0[:, frames], texts[block], frames, cache, past)


TINY = Settings(
    code_clips=40,
    scale_clips=2,
    decoder_steps=2,
    decoder_batch=1,
    stories=90,
    flow_steps=2,
    beside=0,
    flow_batch=1,
    openings=2,
    save_every=1,
    measured=0,
    compile=False,
)


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # bf16 autocast of uncompiled blocks
def test_pretraining_killed_in_every_stage_ends_bit_for_bit_the_same(
    tmp_path, monkeypatch, capsys, one_thread
):
    """With one thread no stage trains in another process, whose `Stage.save` would not be ours."""
    pretrain(tmp_path / "whole", tmp_path / "work_a", settings=TINY)
    save = Stage.save

    def dying(stage: Stage) -> None:
        save(stage)
        if stage.step == 1:
            raise Killed(stage.name)

    monkeypatch.setattr(Stage, "save", dying)
    (tmp_path / "work_b").mkdir()
    # encoding them again would only take time
    shutil.copy(tmp_path / "work_a" / "stories.pt", tmp_path / "work_b")
    for name in ("decoder", "teacher_forcing"):
        with pytest.raises(Killed, match=name):
            pretrain(tmp_path / "resumed", tmp_path / "work_b", settings=TINY)
        assert not (tmp_path / "resumed").exists(), "weights that are not finished"
    pretrain(tmp_path / "resumed", tmp_path / "work_b", settings=TINY)
    assert "teacher_forcing: goes on after step 1 of 2" in capsys.readouterr().out
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    geometry = Pipeline.load(tmp_path / "whole").geometry
    assert (geometry.block, geometry.sink, geometry.window, geometry.text_length) == (3, 3, 12, 24)
    with pytest.raises(ValueError, match="flow_lr"):
        pretrain(tmp_path / "resumed", tmp_path / "work_b", settings=replace(TINY, flow_lr=1.0))


def test_what_is_no_pipeline_folder_is_not_replaced(tmp_path):
    """`kvpo pretrain OUT` once deleted whatever lay at OUT."""
    out, work = tmp_path / "thesis", tmp_path / "work"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    for place in (out, out / "chapter.tex"):
        with pytest.raises(
            ValueError,
            match=f"{place} is there and is no pipeline folder .*give a new or an empty folder",
        ):
            pretrain(place, work, settings=TINY)
    assert weights(tmp_path) == {"thesis/chapter.tex": b"years of work"} and not work.exists()


@pytest.mark.parametrize("work", ["out", "out/work"])
def test_the_finished_weights_do_not_replace_the_work_folder(tmp_path, work):
    with pytest.raises(ValueError, match="the work folder .* give another --work"):
        pretrain(tmp_path / "out", tmp_path / work, settings=TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a pipeline folder"])
def test_what_may_be_replaced(tmp_path, there):
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    # of other settings, so that it ends before it computes
    (work / "settings.json").write_text("{}")
    if there != "nothing":
        out.mkdir()
    if there == "a pipeline folder":
        (out / "streaming.json").touch()
    with pytest.raises(ValueError, match="was begun with other settings"):
        pretrain(out, work, settings=TINY)


def test_a_full_disk_keeps_the_state_before_it(tmp_path, monkeypatch):
    layer = torch.nn.Linear(1, 1)
    stage = Stage(
        "tiny", tmp_path, {"layer": layer}, lambda step: (layer.weight.sum(), {}), steps=2, lr=1e-3
    )
    stage.save()
    full_disk(monkeypatch)
    stage.step = 1
    with pytest.raises(
        OSError,
        match=r"^\S*tiny.state.pt could not be written \(unexpected pos 64 vs 0\); free disk space, then the same command goes on$",
    ):
        stage.save()
    assert (
        [p.name for p in tmp_path.iterdir()] == ["tiny.state.pt"]
        and stage.resume()
        and stage.step == 0
    )


def test_a_full_disk_leaves_no_half_library(tmp_path, monkeypatch):
    library, path = Library((), (), (), ()), tmp_path / "stories.pt"
    with monkeypatch.context() as patched:
        full_disk(patched)
        with pytest.raises(OSError, match="stories.pt could not be written .*free disk space"):
            save_library(library, path)
    assert not list(tmp_path.iterdir())
    save_library(library, path)
    assert load_library(path) == library


def full_disk(monkeypatch) -> None:
    def save(state, file) -> None:
        file.write(b"PK")
        raise RuntimeError("unexpected pos 64 vs 0\n(a stack of C++)")

    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_keeps_the_weights_before_it(tmp_path, monkeypatch):
    """As safetensors says it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "streaming.json").write_text("older")

    def save(pipeline, folder) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(Pipeline, "save", save)
    with pytest.raises(
        OSError, match="out could not be written .*No space left on device.*free disk space"
    ):
        export(Networks(new_vae(0), new_transformer(0), new_text_encoder(0)), out, Progress())
    assert weights(tmp_path) == {"out/streaming.json": b"older"}


def test_what_a_device_raises_is_not_the_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), beside(tmp_path / "x", "free disk space"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_resumed_log_tells_every_step_once(tmp_path):
    log = tmp_path / "b.jsonl"
    log.write_text('{"step": 10}\n{"step": 20}\n{"st')
    forget(log, 10)
    assert log.read_text() == '{"step": 10}\n'


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else():
    model = tiny_transformer()
    muon, adamw = optimizers(model, Kernels(model), lr=1e-3, weight_decay=0.0)
    names = {p: n for n, p in model.named_parameters()}
    matrices = {names[p] for p in muon.param_groups[0]["params"]}
    assert matrices == {
        n
        for n in names.values()
        if n.startswith("blocks.") and n.endswith(".weight") and model.get_parameter(n).dim() == 2
    }
    assert len(matrices) == 3 * 10 and not matrices & {
        names[p] for p in adamw.param_groups[0]["params"]
    }
    assert len(matrices) + len(adamw.param_groups[0]["params"]) == len(names)


def test_muon_gets_the_decoders_kernels_as_matrices_that_share_their_memory():
    vae = new_vae(0)
    use_channels_last(vae)
    decoder = vae.decoder
    kernels = Kernels(decoder)
    first_and_last = {decoder.conv_in.weight, decoder.conv_out.weight}
    weights = {p for p in decoder.parameters() if p.numel() > len(p)}
    assert weights - first_and_last == set(kernels.weights)
    muon, adamw = optimizers(decoder, kernels, lr=1e-3, weight_decay=0.0)
    assert first_and_last <= set(adamw.param_groups[0]["params"])
    for weight in kernels.weights:
        # stored as an unordered one may be: the matrix is then a copy, and right
        weight.grad = torch.randn(weight.shape)
    kernels.take_gradients()
    before = [weight.detach().clone() for weight in kernels.weights]
    for group in muon.param_groups:
        group["lr"] = 1.0
    muon.step()
    for old, weight in zip(before, kernels.weights, strict=True):
        step = (old - weight.detach()).flatten(1)
        assert float((step * weight.grad.flatten(1)).sum()) > 0, (
            "the kernel itself goes down its gradient"
        )


def test_every_update_of_a_kernel_sees_its_own_gradient_only(tmp_path):
    """Kernels are in an optimizer only as matrices; when each optimizer cleared what it had,
    their gradients added up from step to step."""
    stack = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Conv2d(2, 2, 1)]))
    weight = stack[0][0].weight

    def loss(step: int):
        return (weight * (step + 1.0)).sum(), {}

    stage = Stage("tiny", tmp_path, {"stack": stack}, loss, steps=2, lr=1e-3, clip=1e9)
    for step in range(2):
        stage.update()
        assert torch.equal(stage.kernels.matrices[0].grad, torch.full((2, 2), step + 1.0))


def test_kernels_that_would_be_copies_are_refused():
    with pytest.raises(ValueError, match="call use_channels_last first"):
        Kernels(new_vae(0).decoder)


def one_weight(folder: Path, steps: int, fails: bool = False) -> Stage:
    layer = torch.nn.Linear(1, 1)

    def loss(step: int):
        if fails:
            raise FloatingPointError("the fault")
        return layer.weight.square().sum(), {}

    return Stage("tiny", folder, {"layer": layer}, loss, steps=steps, lr=1e-2)


@pytest.fixture
def two_threads():
    yield from threads(2)


@pytest.fixture
def one_thread():
    yield from threads(1)


def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def test_a_stage_trained_beside_is_finished_when_the_body_ends(tmp_path, two_threads):
    with trained_beside(one_weight, (tmp_path, 5), Progress()):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    stage = one_weight(tmp_path, 5)
    assert stage.resume() and stage.step == 5


def test_a_finished_stage_has_no_process_beside(tmp_path, two_threads, monkeypatch):
    """A resumed pretraining started a process for a decoder that was done, and waited for it."""
    stage = one_weight(tmp_path, 5)
    assert not stage.finished()
    stage.run(Progress(), until=3)
    assert not one_weight(tmp_path, 5).finished()
    stage.run(Progress())
    assert one_weight(tmp_path, 5).finished()

    def start(_how):
        raise AssertionError("a process was started")

    monkeypatch.setattr("kvpo.mini.pretraining.side_by_side.get_context", start)
    with trained_beside(one_weight, (tmp_path, 5), Progress(), finished=True):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_a_fault_of_the_training_beside_is_met_by_who_runs_the_stage(tmp_path, two_threads, capfd):
    with trained_beside(one_weight, (tmp_path, 5, True), Progress()):
        pass
    assert "FloatingPointError: the fault" in capfd.readouterr().err
    with pytest.raises(FloatingPointError, match="the fault"):
        one_weight(tmp_path, 5, True).run(Progress())


def test_the_training_beside_ends_with_the_body(tmp_path, two_threads):
    with pytest.raises(KeyError), trained_beside(one_weight, (tmp_path, 10**9), Progress()):
        raise KeyError("of the body")


def test_the_likeliest_opening_by_hand():
    """sigma 0: the nearest; sigma 1: the one that the noise has the largest product with,
    whatever its norm."""
    # [R, K, F, C, H, W]
    candidates = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])[None, :, None, :, None, None]
    x = torch.tensor([0.9, 1.0])[None, None, :, None, None]
    assert likeliest(x, candidates, 0.0).tolist() == [0]  # distances^2 1.01, 4.81, 4.61
    assert likeliest(x, candidates, 1.0).tolist() == [1]  # products 0.9, 3, -0.9


@pytest.fixture(scope="module")
def openings(code):
    vae = new_vae(0)
    set_latent_scale(vae, code, 0, 8)
    return build_openings(vae, code, 0, 6)


def test_an_opening_lesson_asks_for_one_true_opening(openings):
    """x - sigma v of every block is one of the prompt's openings, to half precision."""
    encoder = new_text_encoder(0)
    tokens = {tuple(t.tolist()): i for i, t in enumerate(openings.tokens)}
    lesson = opening_lesson(encoder, openings, 2, stream(0, "lesson"), "cpu")
    assert (
        len(tokens) == 6 and lesson.x.shape[:2] == (2, 72) and lesson.target.shape == lesson.x.shape
    )
    sigma = lesson.sigma.repeat_interleave(BLOCK, 1)[:, :, None, None, None]
    answers = (lesson.x - sigma * lesson.target).unflatten(1, (-1, BLOCK)).flatten(0, 1)
    every = openings.latents.flatten(0, 1).float()
    nearest = torch.cdist(
        answers.flatten(1), every.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).amin(1)
    assert float(nearest.max()) < 1e-3


def test_openings_leave_a_pillar_free(openings):
    for scene, places in zip(openings.scenes, openings.places):
        assert not scene.pillar or all(
            x < PILLAR[0] or x > PILLAR[1] for x in places[:, 0].tolist()
        )
        assert len(set(map(tuple, places.tolist()))) == (6 if scene.pillar else 9)
