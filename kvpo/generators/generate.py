"""Videos from scripts, block by block, in memory or written while they are generated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from kvpo.common.progress import Progress
from kvpo.common.provenance import about_video
from kvpo.common.video import Mp4Writer
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.rope import check_positions
from kvpo.generators.sampler import NamedNoise, Sampler, StackedNoise, Stream
from kvpo.generators.sequence_split import check_split
from kvpo.types import Script


def generate(
    pipeline: Pipeline,
    sampler: Sampler,
    scripts: Sequence[Script],
    seed: int,
    names: Sequence[tuple[int | str, ...]],
) -> torch.Tensor:
    """Generate a video per script, uint8 [B, T, 3, H, W]; all have one length.

    The noise comes from the streams (seed, *name).
    """
    return torch.cat(list(streamed(pipeline, sampler, scripts, seed, names)), dim=1)


@torch.no_grad()
def streamed(
    pipeline: Pipeline,
    sampler: Sampler,
    scripts: Sequence[Script],
    seed: int,
    names: Sequence[tuple[int | str, ...]],
) -> Iterator[torch.Tensor]:
    """Generate as `generate` does, but yield the pixels block by block.

    Memory does not grow with the length, unless the generator's window is everything.
    """
    lengths = {s.blocks for s in scripts}
    if len(lengths) != 1:
        raise ValueError(
            f"videos generated together must be equally long, not {sorted(lengths)} blocks"
        )
    g, (blocks,) = pipeline.geometry, lengths
    # before anything is made, not at the frame that has none
    check_positions(pipeline.generator.transformer.rope, [[blocks * g.block - 1]])
    texts = sorted({t for s in scripts for t in s.texts})
    embeddings = dict(zip(texts, pipeline.encode_text(texts)))
    noise = StackedNoise(
        tuple(NamedNoise(pipeline.latent_shape(g.block), seed, name) for name in names)
    )
    cache = pipeline.new_cache(g.resident(blocks), rows=len(scripts))
    videos = Stream(pipeline.generator, g, sampler, scripts, embeddings, noise, cache)
    decoder = pipeline.decoder()
    for _ in range(blocks):
        yield decoder(videos.advance()).cpu()
        videos.forget()


def write_video(
    pipeline: Pipeline,
    sampler,
    script: Script,
    seed: int,
    path: Path,
    bar,
    about: Mapping[str, Any] | None = None,
) -> float:
    """Generate one video into a file; returns frames a second.

    The file is there when it is whole, or not at all. ``about``: what it says of itself.
    """
    frames, started = 0, time.perf_counter()
    with Mp4Writer(path, pipeline.geometry.fps, about=about) as writer:
        for pixels in _video(pipeline, sampler, script, seed):
            writer.write(pixels[0])
            frames += len(pixels[0])
            bar.advance(
                f"{path.name}: {frames} frames, {frames / (time.perf_counter() - started):.1f} a second"
            )
    return frames / (time.perf_counter() - started)


def follow_video(pipeline: Pipeline, sampler, script: Script, seed: int) -> None:
    """Generate what another rank's `write_video` writes, of a stream that both share."""
    for _ in _video(pipeline, sampler, script, seed):
        pass


def _video(pipeline: Pipeline, sampler, script: Script, seed: int) -> Iterator[torch.Tensor]:
    """Blocks of one video, RGB uint8 [1, T, 3, H, W], by the noise that `kvpo generate` names."""
    return streamed(pipeline, sampler, [script], seed, [("generate", script.id)])


def check_shared(folder: Path, geometry: Geometry, world: int) -> None:
    """Check, before any weights are read, that ``world`` processes can share a stream.

    ValueError where the generator in ``folder`` does not divide, see `check_split`.
    """
    if world > 1:
        config = WanTransformer3DModel.load_config(str(folder / "transformer"))
        _, ph, pw = config["patch_size"]
        tokens = (geometry.latent_height // ph) * (geometry.latent_width // pw)
        check_split(config["num_attention_heads"], tokens, geometry.bank, world)


def write_missing(
    pipeline: Pipeline,
    sampler,
    videos: Sequence[tuple[Script, int, Path]],
    label: str,
    progress: Progress,
    blind: bool = False,
) -> None:
    """Write the videos (script, seed, file) that are not there yet.

    A second call goes on where the first stopped. ``blind``: files do not say whose they are.
    """
    todo = [video for video in videos if not video[2].exists()]
    with progress.bar(f"videos of {label}", sum(script.blocks for script, _, _ in todo)) as bar:
        for script, seed, path in todo:
            write_video(
                pipeline,
                sampler,
                script,
                seed,
                path,
                bar,
                None if blind else about_video(script, seed, label),
            )
