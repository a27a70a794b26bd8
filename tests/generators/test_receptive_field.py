"""A decoder that starts a receptive field before a clip gives the clip's own pixels."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny import draw, new_pipeline, new_rollout, story

from kvpo.common.rng import stream
from kvpo.generators.streaming import receptive_field
from kvpo.method.prefix import PrefixDecoders
from kvpo.method.score import decode
from kvpo.method.settings import ScoreConfig
from kvpo.mini.pretraining.networks import new_vae

SMALL = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4}
MEANS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
WAN = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
SHAPES = {
    "wan": WAN,
    "wan 2.2": WAN | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
    "one residual block": WAN | {"num_res_blocks": 1},
    "one doubling": WAN | {"temperal_downsample": [False, False, True]},
    "none": WAN | {"temperal_downsample": [False, False, False]},
}
FIELDS = {"wan": 38, "wan 2.2": 38, "one residual block": 30, "one doubling": 43, "none": 60}
"""By hand, for `wan`: 2 + 8 + 12 at rate 1, and 2 for the doubling, 24; twice that and 12 + 2 at
rate 2, 62; twice that and 12 + 12 + 2 at rate 4, 150; of 4 a latent frame, 37.5."""


def vae_of(shape: dict) -> AutoencoderKLWan:
    """Random and larger than at rest: the far past must show in what is compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(0, "vae").initial_seed())
        vae = AutoencoderKLWan(**SMALL | MEANS | shape)
        for p in vae.decoder.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    return vae.double().eval().requires_grad_(False)


def last_frame(vae: AutoencoderKLWan, z_NCHW: torch.Tensor) -> torch.Tensor:
    """The decoder's own numbers of the last latent frame, before they are bytes."""
    cache, found = [None] * vae._cached_conv_counts["decoder"], None
    z = vae.post_quant_conv(z_NCHW.transpose(0, 1)[None])
    for i in range(z.shape[2]):
        found = vae.decoder(z[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_pixels_depend_on_the_receptive_field_and_on_nothing_before(name):
    """The same numbers from as many frames before as are counted, and others from fewer; the last
    one's share is small, and float64 sees it."""
    vae = vae_of(SHAPES[name])
    lead = receptive_field(vae)
    assert lead == FIELDS[name]
    z = draw(lead + 4, 4, 1, 1, dtype=torch.float64)
    whole = last_frame(vae, z)

    def apart(before: int) -> float:
        return float((last_frame(vae, z[-before - 1 :]) - whole).abs().max())

    assert apart(lead) < 1e-13, "but for the rounding of other memory layouts"
    assert apart(lead - 6) > 1e-11
    assert name != "wan" or 1e-12 < apart(lead - 1) < 1e-9, "the count is no bound but the number"


def test_the_miniature_s():
    assert receptive_field(new_vae(0)) == 28


def test_prefixes_are_decoded_from_the_receptive_field_on():
    """Side by side and of several lengths: the bytes of decoding all of each; a shorter lead
    decodes less and gives others."""
    pipeline = new_pipeline()
    field = receptive_field(pipeline.vae)
    prefixes = [draw(n, 4, 4, 4, seed=n) for n in (field + 5, field + 2, 3)]
    after = draw(1, 2, 4, 4, 4, seed=9)
    for row, prefix in enumerate(prefixes):
        decoder = PrefixDecoders(pipeline, prefixes).take(row)
        whole = pipeline.decoder()(torch.cat([prefix[None], after], dim=1))[:, -8:]
        assert decoder._frames == min(len(prefix), field)
        assert (decoder(after).int() - whole.int()).abs().max() <= 1
        short = PrefixDecoders(pipeline, prefixes).take(row, 2)
        assert short._frames == 2 and short.skipped == (len(prefix) - 2,)


def test_faults_are_named_by_the_video_s_frames():
    pipeline = new_pipeline()
    decoder = PrefixDecoders(pipeline, [draw(9, 4, 4, 4)]).take(0, 2)
    broken = torch.full((1, 1, 4, 4, 4), float("nan"))
    with pytest.raises(FloatingPointError, match="latents of latent frame 9 are NaN"):
        decoder(broken)
    with pytest.raises(FloatingPointError, match="latents of latent frame 9 of video 0, 1 of 2"):
        decoder.fork(2)(broken.expand(2, -1, -1, -1, -1))


def test_the_setting_reaches_the_decoder():
    pipeline = new_pipeline()
    rollout = new_rollout(pipeline, story(8), fork=4)
    assert torch.equal(decode(pipeline, rollout, 9), decode(pipeline, rollout, 9, lead=99))
    assert not torch.equal(decode(pipeline, rollout, 9), decode(pipeline, rollout, 9, lead=1))
    with pytest.raises(ValueError, match="score.lead = 0 must be 1 or more"):
        ScoreConfig(lead=0)
