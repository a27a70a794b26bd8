"""The preview decoder: files in the released format, pixels like a plain computation's, and where
they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from previews import NARROW, shapes, tensors, write_preview
from tiny import draw, new_rollout, story

from kvpo.generators.preview import Layout, Preview, read_preview
from kvpo.generators.streaming import StreamingDecoder
from kvpo.method.score import decode


@pytest.fixture(scope="module")
def preview(folder, tmp_path_factory):
    path = write_preview(tmp_path_factory.mktemp("preview") / "tae.safetensors")
    return read_preview(path, folder)


def by_hand(state: dict[str, torch.Tensor], z_NCHW: torch.Tensor, patch: int = 1) -> torch.Tensor:
    """Pixels [T, 3, H, W] in [0, 1] of a whole video, layer by layer over all of its frames."""
    s = {name: t.float() for name, t in state.items()}

    def conv(x, number):
        return F.conv2d(
            x, s[f"decoder.{number}.weight"], s.get(f"decoder.{number}.bias"), padding=1
        )

    def block(x, n):
        y = torch.cat((x, torch.cat((torch.zeros_like(x[:1]), x[:-1]))), dim=1)
        y = conv(y, f"{n}.conv.0").relu()
        return (conv(conv(y, f"{n}.conv.2").relu(), f"{n}.conv.4") + x).relu()

    def grown(x, number, times):
        weight = s[f"decoder.{number}.conv.weight"]
        y = F.conv2d(x.repeat_interleave(2, -1).repeat_interleave(2, -2), weight)
        parts = y.chunk(len(weight) // x.shape[1], dim=1)[-times:]
        return torch.stack(parts, dim=1).flatten(0, 1)

    x = conv(3 * torch.tanh(z_NCHW / 3), 1).relu()
    for first, times in ((3, 1), (9, 2), (15, 2)):
        for number in range(first, first + 3):
            x = block(x, number)
        x = conv(grown(x, first + 4, times), first + 5)
    return F.pixel_shuffle(conv(x.relu(), 22), patch).clamp(0, 1)[3:]


@pytest.mark.parametrize(("latents", "patch"), [(16, 1), (48, 2)])
def test_names_and_shapes_of_the_released_files(latents, patch):
    """At full width: 9.8 million numbers in the decoder of Wan2.1's latents."""
    with torch.device("meta"):
        built = {n: tuple(p.shape) for n, p in Preview(Layout(latents, patch)).named_parameters()}
    file = shapes(latents, patch=patch)
    assert built == {n: shape for n, shape in file.items() if n.startswith("decoder.")}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("first_growth", [1, 2])
def test_a_file_decodes_as_the_plain_computation(folder, tmp_path, suffix, first_growth):
    """Also of a file whose first stage could make two frames: the later one is taken."""
    state = tensors(shapes(4, NARROW, first_growth=first_growth))
    path = write_preview(tmp_path / f"tae.{suffix}", state)
    network, z = read_preview(path, folder), draw(2, 5, 4, 3, 2)
    pixels = StreamingDecoder(network)(z)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 17, 3, 24, 16)
    for row in range(2):
        expected = (by_hand(state, z[row]) * 255).round()
        assert (pixels[row].float() - expected).abs().max() <= 1
        assert expected.std() > 10, "not black or white alone"


def test_patches(tmp_path):
    """taew2_2's layout: 16 pixels a latent."""
    state = tensors(shapes(6, NARROW, patch=2))
    network = read_preview(write_preview(tmp_path / "tae.safetensors", state), tmp_path)
    assert network.layout == Layout(6, 2, NARROW)
    z = draw(1, 3, 6, 2, 2)
    expected = (by_hand(state, z[0], 2) * 255).round()
    assert (StreamingDecoder(network)(z)[0].float() - expected).abs().max() <= 1


def test_a_stream_in_parts_is_the_stream(preview):
    """Chunks, forks that leave the state as it is, and rows that go on alone."""
    z = draw(3, 6, 4, 2, 2)
    whole = StreamingDecoder(preview)(z)
    decoder = StreamingDecoder(preview)
    parts = [decoder(z[:, :1]), decoder(z[:, 1:3])]
    for go_on in (decoder.fork(3), decoder.part(0, 3), decoder):
        got = torch.cat([*parts, go_on(z[:, 3:])], dim=1)
        assert (got.int() - whole.int()).abs().max() <= 1
    one = StreamingDecoder(preview)
    one(z[:1, :2])
    both = one.fork(2)(z[:1, 2:].expand(2, -1, -1, -1, -1))
    assert (both.int() - whole[:1, 5:].int()).abs().max() <= 1


def test_pixels_depend_on_eight_latent_frames_before_and_on_none_after(folder, tmp_path):
    """The decoder may start so many frames earlier; one fewer gives other numbers."""
    preview = read_preview(write_preview(tmp_path / "tae.pth"), folder).double()
    assert preview.field == 8
    z = draw(1, 12, 4, 2, 2, dtype=torch.float64)

    def frames(latents):
        state, out = preview.blank(), []
        for i, frame in enumerate(preview.prepared(latents).split(1, dim=2)):
            out.append(preview.frame(frame, state, first=not i))
        return out

    whole, other = frames(z), frames(torch.cat((z[:, :7], -z[:, 7:8], z[:, 8:]), dim=1))
    same = [torch.equal(a, b) for a, b in zip(whole, other)]
    assert same[:7] == [True] * 7 and not same[7]
    assert torch.allclose(frames(z[:, 3:])[8], whole[11], atol=1e-12, rtol=0)
    assert (frames(z[:, 4:])[7] - whole[11]).abs().max() > 1e-9


def test_a_group_is_decoded_on_from_its_prefix(own_pipeline, preview):
    """As with the VAE: rows and anchor go on from the one state that the prefix leaves, and a lead
    of the preview's own field is enough."""
    own_pipeline.preview = preview
    rollout = new_rollout(own_pipeline, story(8), fork=4)
    got = decode(own_pipeline, rollout, 32)
    for row in (0, 3):
        video = StreamingDecoder(preview)(torch.cat((rollout.prefix, rollout.latents[row]))[None])
        assert got[row].shape == video[0, 29:].shape
        assert (got[row].int() - video[0, 29:].int()).abs().max() <= 1
    vae = own_pipeline.decoder()(torch.cat((rollout.prefix, rollout.latents[0]))[None])
    assert vae.shape == video.shape and not torch.equal(vae, video)


def test_faults_are_named(preview):
    with pytest.raises(FloatingPointError, match="the latents of latent frame 1 are NaN"):
        StreamingDecoder(preview)(torch.tensor([1.0, float("nan")]).view(1, 2, 1, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "decoder.9.conv.2.bias"}, "1 missing: decoder.9.conv.2.bias"),
        (lambda s: s | {"decoder.23.weight": s["decoder.22.weight"]}, "1 surplus: decoder.23.weight"),
        (lambda s: s | {"decoder.4.conv.0.weight": s["decoder.4.conv.2.weight"]}, r"1 misshapen: decoder.4.conv.0.weight \[8, 8, 3, 3\] for \[8, 16, 3, 3\]"),
        (lambda s: {"a": s["decoder.22.bias"]}, "1 surplus: a"),
        (lambda s: s | tensors(shapes(16, NARROW)), "decodes latents of 16 channels, 8 x 8 pixels and 4 frames of a latent, but the generator's VAE 4 channels"),
        (lambda s: s | tensors(shapes(4, NARROW, patch=2)), "16 x 16 pixels and 4 frames of a latent, but the generator's VAE 4 channels, 8 x 8"),
        (lambda s: s | {"decoder.22.bias": s["decoder.22.bias"] * float("nan")}, r"decoder.22.bias \(3 of 3 numbers\)"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    path = write_preview(tmp_path / "tae.safetensors", change(tensors(shapes(4, NARROW))))
    with pytest.raises((ValueError, FloatingPointError), match=message):
        read_preview(path, folder)


def test_a_missing_file_and_a_pickle_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="score.preview: .* is not there; fetch a file"):
        read_preview(tmp_path / "tae.pth", folder)
    torch.save({"decoder": torch.nn.Linear(1, 1)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_preview(tmp_path / "net.pth", folder)
