"""The generator against outputs of the released models' own code (LongLive, Self-Forcing,
Causal-Forcing), tiny, float32.

Free running: every step's input follows from our own outputs, so errors would add up over the whole
stream.
"""

import pytest
import torch
from diffusers import WanTransformer3DModel
from golden import case, read_tensors

from kvpo.convert.wan_names import original_to_diffusers
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.flow import add_noise
from kvpo.generators.geometry import Geometry
from kvpo.generators.history import Routed
from kvpo.generators.sampler import Renoise, Stream
from kvpo.types import BranchPlan, Script, Window

ATOL = 1e-4
"""What the golden README suggests for stock diffusers' float32 time sinusoid."""


class RecordingWan(CausalWan):
    """Keeps the clean passes' outputs, and adds the context noise of the reference's training
    pipelines."""

    context_sigma, context_noise, block = 0.0, None, 3

    def commit(self, clean, text, frames, cache, past=(), rows=None, own=None):
        if own is None and self.context_sigma > 0.0:
            clean = add_noise(
                clean, self.context_noise[frames[0] // self.block], self.context_sigma
            )
        self.last_commit = super().commit(clean, text, frames, cache, past, rows, own)
        return self.last_commit


class GoldenNoise:
    def __init__(self, tensors, block):
        self.noise, self.steps, self.block = tensors["noise"], tensors.get("renoise"), block

    def start(self, block):
        return self.noise[:, block * self.block : (block + 1) * self.block]

    def renoise(self, block, step):
        return self.steps[block, step]


def model_of(config):
    m = config["model"]
    transformer = WanTransformer3DModel(
        num_attention_heads=m["num_heads"],
        attention_head_dim=m["dim"] // m["num_heads"],
        in_channels=16,
        out_channels=16,
        text_dim=m["text_dim"],
        freq_dim=m["freq_dim"],
        ffn_dim=m["ffn_dim"],
        num_layers=m["num_layers"],
        cross_attn_norm=True,
        eps=1e-6,
    )
    transformer.load_state_dict(
        original_to_diffusers(read_tensors(config["weights"].removesuffix(".safetensors"))),
        strict=True,
    )
    return RecordingWan(transformer.requires_grad_(False).eval())


def geometry_of(config):
    g = config["geometry"] | {k: config[k] for k in ("window", "sink", "capacity") if k in config}
    geometry = Geometry(
        g["block"],
        g["sink"],
        g["window"],
        g["height"],
        g["width"],
        fps=16,
        text_length=config["model"]["text_len"],
        steps=len(config["steps"]["sigmas"]),
    )
    assert geometry.sigmas == pytest.approx(config["steps"]["sigmas"], abs=1e-6)
    return geometry, g["capacity"]


def stream_of(config, tensors, starts=(0,)):
    """Model and stream of a case; the texts of a script's segments are named by their number."""
    model, (geometry, capacity) = model_of(config), geometry_of(config)
    model.context_sigma, model.context_noise, model.block = (
        config["context_sigma"],
        tensors.get("context_noise"),
        geometry.block,
    )
    rows, text = config["batch"], tensors["text"]
    if len(starts) > 1:  # [segment, batch, L, D]
        scripts = [
            Script(
                "golden", tuple(f"{s}" for s in range(len(starts))), tuple(starts), config["blocks"]
            )
        ]
        assert rows == 1, "a switch of several rows is not in the golden format"
        embeddings = {f"{s}": text[s, 0] for s in range(len(starts))}
    else:
        scripts = [Script(f"golden {b}", (f"{b}",), (0,), config["blocks"]) for b in range(rows)]
        embeddings = {f"{b}": text[b] for b in range(rows)}
    cache = model.new_cache(
        capacity, geometry.latent_height, geometry.latent_width, rows=rows, sink=geometry.sink
    )
    return model, Stream(
        model, geometry, Renoise(), scripts, embeddings, GoldenNoise(tensors, geometry.block), cache
    )


def run_block(model, stream, history=None):
    """Outputs of the denoise passes and the clean pass [pass, B, F, C, H, W], and the predicted
    x0 of every step."""
    seen = []
    clean = stream.advance(history, lambda i, x, v: seen.append((x, v)))
    sigmas = stream.geometry.sigmas
    x0 = torch.stack([(x.double() - s * v.double()).float() for (x, v), s in zip(seen, sigmas)])
    torch.testing.assert_close(x0[-1], clean)
    return torch.stack([v for _, v in seen] + [model.last_commit]), x0


def assert_block(config, tensors, block, velocity, x0):
    """Compare what the case stores of this block, of the last blocks at least; returns whether
    it stores a velocity."""
    if (index := block - (config["blocks"] - len(tensors["x0"]))) >= 0:
        stored = tensors["x0"][index]
        torch.testing.assert_close(
            x0[-stored.shape[0] :] if stored.dim() == 6 else x0[-1], stored, atol=ATOL, rtol=0
        )
    if (index := block - config.get("velocity_first_block", config.get("fork_block", 0))) < 0:
        return False
    passes = config.get("velocity_passes", list(range(len(velocity))))
    torch.testing.assert_close(velocity[passes], tensors["velocity"][index], atol=ATOL, rtol=0)
    return True


@pytest.mark.parametrize(
    "name",
    ["longlive_stream", "self_forcing_global", "self_forcing_local9", "causal_forcing_local9"],
)
def test_golden_stream(name):
    config, tensors = case(name)
    model, stream = stream_of(config, tensors)
    assert all(
        assert_block(config, tensors, b, *run_block(model, stream)) for b in range(config["blocks"])
    )


def test_golden_per_frame_timesteps():
    config, tensors = case("longlive_per_frame_timesteps")
    model, (geometry, capacity) = model_of(config), geometry_of(config)
    F, rows = geometry.block, tensors["text"].shape[0]
    cache = model.new_cache(
        capacity, geometry.latent_height, geometry.latent_width, rows=rows, sink=geometry.sink
    )
    for i, (latents, time, expected) in enumerate(
        zip(tensors["inputs"], tensors["timesteps"], tensors["velocity"])
    ):
        frames = list(range(i * F, (i + 1) * F))
        past = geometry.history.past(frames[0], F)
        if (time == 0).all():
            v = model.commit(latents, tensors["text"], frames, cache, past)
        else:
            v = model.velocity(latents, time / 1000.0, tensors["text"], frames, cache, past)
        torch.testing.assert_close(v, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["longlive_routing_unrolled", "longlive_routing_rolled"])
def test_golden_routing(name):
    """The reference reads frame f + 3 for a request of f once its cache has rolled; our plan
    names the frames it really read."""
    config, tensors = case(name)
    model, stream = stream_of(config, tensors)
    g, fork = stream.geometry, config["fork_block"]
    routed = tuple(config["routed_frames_used"])
    window = Window(fork, config["perturbed_blocks"])
    history = Routed(g.history, (BranchPlan(frames=routed),), window, g.block)
    for block in range(config["blocks"]):
        if block == fork:
            for layer in (0, config["model"]["num_layers"] - 1):
                if f"routed_k.layer{layer}" in tensors:
                    k = torch.cat(
                        [stream.cache.k[layer][:, stream.cache.slots[f]] for f in routed], dim=1
                    )
                    torch.testing.assert_close(
                        k, tensors[f"routed_k.layer{layer}"], atol=ATOL, rtol=0
                    )
        past = history.past(block * g.block, g.block)
        past = past[0] if isinstance(past, list) else past
        if str(block) in config["attended_frames"]:
            assert sorted([*past, *range(block * g.block, (block + 1) * g.block)]) == sorted(
                config["attended_frames"][str(block)]
            )
        result = run_block(model, stream, history)
        assert assert_block(config, tensors, block, *result) == (block >= fork)
        if block == fork - 1 and "prefix_velocity_last_block" in tensors:
            torch.testing.assert_close(
                result[0], tensors["prefix_velocity_last_block"], atol=ATOL, rtol=0
            )


def test_golden_prompt_switch():
    config, tensors = case("longlive_prompt_switch")
    model, stream = stream_of(config, tensors, starts=(0, *config["switch_blocks"]))
    for block in range(config["blocks"]):
        if block in config["switch_blocks"]:
            stream.switch()
            check_reencoding(config, tensors, model, stream, config["switch_blocks"].index(block))
        assert assert_block(config, tensors, block, *run_block(model, stream))


def check_reencoding(config, tensors, model, stream, switch):
    """Outputs and pages right after a re-encoding. The reference also passes the sink's frames
    through, and discards them."""
    g, entry, name = stream.geometry, config["recache"][switch], f"switch{switch + 1}"
    stop = entry["start_frame"] + entry["frames"]
    first = max(entry["start_frame"], g.sink)
    count = min(stop - first, model.last_commit.shape[1])
    torch.testing.assert_close(
        model.last_commit[:, -count:],
        tensors[f"recache_velocity.{name}"][:, -count:],
        atol=ATOL,
        rtol=0,
    )
    tokens = config["geometry"]["tokens_per_frame"]
    for layer in range(config["model"]["num_layers"]):
        for kind, pages in (("k", stream.cache.k), ("v", stream.cache.v)):
            if (expected := tensors.get(f"recached_{kind}.{name}.layer{layer}")) is not None:
                got = torch.cat(
                    [pages[layer][:, stream.cache.slots[f]] for f in range(first, stop)], dim=1
                )
                torch.testing.assert_close(
                    got, expected[:, -tokens * (stop - first) :], atol=ATOL, rtol=0
                )
