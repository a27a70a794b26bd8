"""``kvpo pretrain``: the miniature's start weights, from nothing, in two stages.

    decoder           latents -> clips; the encoder is computed, not trained           (kvpo.mini.pretraining.autoencoder)
    teacher_forcing   causal flow matching on true pasts, with the text encoder        (kvpo.mini.pretraining.teacher_forcing)

Half of the noise levels are the sampler's own four, so four steps work as well as eight. Nothing
teaches the generator on its own stream: nobody has the true continuation of that, and what it does
wrong there is what alignment is to mend.

The decoder does not need the generator nor the generator the decoder, so on a CPU they train side
by side at first. Everything random is named by (seed, stage, step). Killed at any instant and
started again, it goes on where it was.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from kvpo.common.files import beside, write_atomic
from kvpo.common.progress import Progress
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.pipeline import Pipeline, use_channels_last
from kvpo.mini.pretraining.autoencoder import decoder_loss, fit_encoder, set_latent_scale
from kvpo.mini.pretraining.card import measured, write_card
from kvpo.mini.pretraining.flat import use_flat_attention
from kvpo.mini.pretraining.library import Library, build_library, load_library, save_library
from kvpo.mini.pretraining.linear_encoder import LinearEncoder, install
from kvpo.mini.pretraining.networks import (
    BLOCK,
    SINK,
    STEPS,
    TEXT_LEN,
    WINDOW,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)
from kvpo.mini.pretraining.openings import build_openings
from kvpo.mini.pretraining.side_by_side import trained_beside
from kvpo.mini.pretraining.teacher_forcing import teacher_forcing_loss
from kvpo.mini.pretraining.training import AGAIN, Stage
from kvpo.mini.world import FPS, SIZE

GEOMETRY = Geometry(
    block=BLOCK,
    sink=SINK,
    window=WINDOW,
    latent_height=SIZE // 8,
    latent_width=SIZE // 8,
    fps=FPS,
    text_length=TEXT_LEN,
    steps=STEPS,
    shift=5.0,
)

DECODER_MATRIX_RATE = 2.5
"""Learning rate of Muon over that of AdamW, for the decoder.

Held-out error after 400 steps: 0.119, at a rate of 5.0 0.126; of a decoder of width 12 it is 0.138
at 5.0, 0.208 at 12.0 and 0.198 with AdamW alone.
"""


@dataclass(frozen=True)
class Settings:
    code_clips: int = 400
    """Clips to which the encoder's linear code is fitted."""
    scale_clips: int = 64
    """Clips from which the latents' mean and scale are measured."""
    decoder_steps: int = 4000
    decoder_batch: int = 4
    decoder_lr: float = 2e-3
    stories: int = 2400
    """Stories that the generator's crops are cut from."""
    flow_steps: int = 6500
    beside: int = 1900
    """Generator's steps that are done while the decoder trains in a process of its own.
    That needs a CPU of at least two cores."""
    flow_batch: int = 8
    flow_lr: float = 2e-3
    openings: int = 2048
    """Prompts of which the generator sees true openings."""
    save_every: int = 100
    """Steps between two states on disk: what a kill costs at most."""
    measured: int = 256
    """Held-out stories for the model card; 0 = no card."""
    compile: bool = True
    """Compile the transformer's blocks."""


@dataclass(frozen=True)
class Networks:
    vae: torch.nn.Module
    transformer: torch.nn.Module
    encoder: torch.nn.Module

    @property
    def generator(self) -> torch.nn.ModuleDict:
        """Modules that are trained by teacher forcing."""
        return torch.nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.encoder})

    def to(self, device) -> Networks:
        for module in (self.vae, self.transformer, self.encoder):
            module.to(device)
        return self


def pretrain(
    out: Path, work: Path, seed: int = 0, settings: Settings = Settings(), device: str = "cpu"
) -> None:
    """Train everything and write the pipeline folder ``out``.

    States, the encoded stories and the logs go to ``work``. Raises ValueError,
    before anything is touched, where ``out`` holds something else than a pipeline folder.
    """
    out, work, progress = Path(out), Path(work), Progress()
    may_be_replaced(out, work)
    out = out.resolve()  # a link stays one, and even "." has a name
    claim(work, seed, settings)
    nets = Networks(new_vae(seed), new_transformer(seed), new_text_encoder(seed)).to(device)
    code = set_code(nets.vae, seed, settings)
    library = stories(nets, code, work, seed, settings, progress)
    use_flat_attention(nets.transformer)
    if settings.compile:
        nets.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    openings = build_openings(nets.vae, code, seed, settings.openings)

    loss = teacher_forcing_loss(
        nets.transformer, nets.encoder, library, openings, seed, settings.flow_batch, device
    )
    flow = Stage(
        "teacher_forcing",
        work,
        nets.generator,
        loss,
        steps=settings.flow_steps,
        lr=settings.flow_lr,
        ema=0.995,
        save_every=settings.save_every,
    )
    decoder = decoder_stage(nets.vae, code, work, seed, settings, device)
    with (
        trained_beside(lone_decoder, (work, seed, settings), progress, decoder.finished())
        if device == "cpu"
        else nullcontext()
    ):
        flow.run(progress, until=settings.beside)
    decoder.run(progress)  # done already, if it trained beside
    flow.run(progress)
    export(nets, out, progress)
    if settings.measured:
        numbers = measured(Pipeline.load(out, device), settings.measured)
        write_card(
            out,
            numbers,
            settings.measured,
            settings,
            seed,
            {stage.name: stage.seconds for stage in (decoder, flow)},
        )
        progress.say(
            "held-out stories: "
            + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        )


def may_be_replaced(out: Path, work: Path) -> None:
    """Check that ``out`` is missing, empty or a pipeline folder, and ``work`` lies elsewhere.

    What is at ``out`` goes when the new weights come. Raises ValueError where the check fails.
    """
    empty = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    if not empty and not (out / "streaming.json").is_file():
        raise ValueError(
            f"{out} is there and is no pipeline folder (it has no streaming.json), so it is not replaced; give a new or an empty folder, or an older pipeline folder"
        )
    if out.resolve() in (work.resolve(), *work.resolve().parents):
        raise ValueError(
            f"the work folder {work} lies in {out}, which is replaced as a whole by the finished weights; give another --work, or another folder for the weights"
        )


def claim(work: Path, seed: int, settings: Settings) -> None:
    """Remember what this folder is being made with.

    Raises ValueError if it was begun with something else.
    """
    made_with, path = {"seed": seed, **asdict(settings)}, work / "settings.json"
    if not path.exists():
        write_atomic(path, json.dumps(made_with, indent=1) + "\n")
    elif (before := json.loads(path.read_text())) != made_with:
        changed = {k: (before.get(k), v) for k, v in made_with.items() if before.get(k) != v}
        raise ValueError(
            f"{work} was begun with other settings: {changed} (then, now); use another work folder, or the settings it was begun with"
        )


def set_code(vae: AutoencoderKLWan, seed: int, s: Settings) -> LinearEncoder:
    """Compute the encoder and the scale of its latents.

    It takes seconds, so it is done again after a restart.
    """
    code = fit_encoder(seed, s.code_clips)
    install(code, vae)
    set_latent_scale(vae, code, seed, s.scale_clips)
    return code


def decoder_stage(
    vae: AutoencoderKLWan, code: LinearEncoder, work: Path, seed: int, s: Settings, device: str
) -> Stage:
    use_channels_last(vae)  # a quarter of the time less on a CPU
    loss = decoder_loss(vae, code, seed, s.decoder_batch, device)
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    return Stage(
        "decoder",
        work,
        modules,
        loss,
        steps=s.decoder_steps,
        lr=s.decoder_lr,
        matrix_rate=DECODER_MATRIX_RATE,
        save_every=s.save_every,
    )


def lone_decoder(work: Path, seed: int, s: Settings) -> Stage:
    """The decoder's stage with networks of its own, for a process of its own."""
    vae = new_vae(seed)
    return decoder_stage(vae, set_code(vae, seed, s), work, seed, s, "cpu")


def stories(
    nets: Networks, code: LinearEncoder, work: Path, seed: int, s: Settings, progress: Progress
) -> Library:
    path = work / "stories.pt"
    if path.exists():
        progress.say(f"stories: {path} is there already")
    else:
        with progress.bar("stories", s.stories) as bar:
            save_library(build_library(nets.vae, code, seed, s.stories, bar.move_to), path)
    return load_library(path)


def export(nets: Networks, out: Path, progress: Progress) -> None:
    """The pipeline folder, there completely or not at all; a model card already in it stays."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    transformer = type(nets.transformer).from_config(nets.transformer.config)
    transformer.load_state_dict(nets.transformer.state_dict())
    # Half of the file would be the encoder's zeros. Float16 moves a decoded pixel by at most one of
    # 255 levels, and whoever loads the folder computes in the precision that he asks for.
    vae = copy.deepcopy(nets.vae).half()
    stock = WanPipeline(new_tokenizer(), nets.encoder, vae, new_scheduler(), transformer)
    with beside(out, AGAIN) as part:
        Pipeline(CausalWan(transformer), vae, GEOMETRY, stock, str(part)).save(part)
        if (card := out / "README.md").exists():
            shutil.copy(card, part / "README.md")
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)
    progress.say(f"weights: written to {out}")
