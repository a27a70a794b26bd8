"""A generator with everything around it, from one folder in diffusers layout.

It has text encoder, transformer, VAE and geometry.

    model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  streaming.json

All but `streaming.json` are what `WanPipeline` saves and loads. Nothing here knows whether the
model is tiny.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from kvpo.common.files import open_to_readers
from kvpo.common.finite import check_finite, is_finite
from kvpo.generators.cache import FrameCache
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.geometry import Geometry
from kvpo.generators.memory import Bank
from kvpo.generators.pipeline_folder import (
    check_folder,
    load_description,
    load_part,
    load_tokenizer,
)
from kvpo.generators.preview import Preview
from kvpo.generators.streaming import FrameDecoder, StreamingDecoder, VaeFrames


@dataclass
class Pipeline:
    """A loaded generator."""

    generator: CausalWan
    vae: AutoencoderKLWan
    geometry: Geometry
    stock: WanPipeline
    """diffusers' own pipeline of the same modules, for prompt encoding and saving."""
    folder: str
    known: dict[str, torch.Tensor] = field(default_factory=dict)
    """Prompt -> its embedding up to its end, [n, D] in main memory: every text is encoded once."""
    spec: str = ""
    """Name it was asked for by, such as RUN:ema; "" where that is not known.

    `kvpo.api.functions.load` sets it.
    """
    preview: Preview | None = None
    """Small decoder of what is scored in training; None: the VAE's.

    What is shown, evaluated and exported is decoded by the VAE in any case.
    """

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        text_encoder: bool = True,
    ) -> Pipeline:
        """Load a pipeline from its folder; ``vae_dtype``: default ``dtype``.

        Without ``text_encoder`` only texts that are put into ``known`` can be asked for.

        Raises FileNotFoundError or ValueError, one line that names the file, for anything missing,
        broken, foreign or pickled; PermissionError for what may not be read, FloatingPointError for
        weights that are not finite.
        """
        # transformers' own, one per component: stderr belongs to errors and to our bars
        disable_progress_bar()
        folder = Path(folder)
        geometry = check_folder(folder)
        transformer = load_part(WanTransformer3DModel, folder / "transformer", dtype)
        vae = load_part(AutoencoderKLWan, folder / "vae", vae_dtype or dtype)
        encoder = (
            load_part(UMT5EncoderModel, folder / "text_encoder", dtype) if text_encoder else None
        )
        tokenizer = load_tokenizer(folder)
        scheduler = load_description(FlowMatchEulerDiscreteScheduler, folder / "scheduler")
        geometry.check_grid(transformer.config.patch_size, str(folder / "streaming.json"))
        stock = WanPipeline(tokenizer, encoder, vae, scheduler, transformer)
        for part, module in (("transformer", transformer), ("vae", vae), ("text_encoder", encoder)):
            if module is not None:
                module.requires_grad_(False).eval().to(device)
                check_finite(
                    module.named_parameters(),
                    str(folder / part),
                    "its training went wrong, or a file was damaged: copy it again, or give another one",
                )
        if torch.device(device).type == "cpu":
            use_channels_last(vae)
        return cls(CausalWan(transformer), vae, geometry, stock, str(folder))

    @property
    def device(self) -> torch.device:
        return self.generator.device

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed prompts: [P, L, D], with zeros after each prompt's end.

        The network reads them unmasked. Raises ValueError for a prompt that would be cut.
        """
        if new := [t for t in dict.fromkeys(texts) if t not in self.known]:
            for text in new:
                if (
                    count := len(self.stock.tokenizer(text, verbose=False).input_ids)
                ) > self.geometry.text_length:
                    raise ValueError(
                        f"a prompt has {count} tokens, this generator reads {self.geometry.text_length} and would ignore the rest; shorten {text[:60]!r}..."
                    )
            if self.stock.text_encoder is None:
                raise ValueError(
                    f"the text encoder is not loaded, and {new[0][:60]!r} has not been embedded with the others; load the pipeline with its text encoder, or give all prompts to load_with_texts"
                )
            # One at a time: padding to a batch's longest prompt may round differently, and a prompt
            # must always read the same.
            for text in new:
                (x_LD,), _ = self.stock.encode_prompt(
                    text,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.geometry.text_length,
                )
                self.known[text] = self._to_its_end(x_LD, text)
        return torch.stack(
            [
                torch.nn.functional.pad(x, (0, 0, 0, self.geometry.text_length - len(x)))
                for x in map(self.known.__getitem__, texts)
            ]
        ).to(self.device)

    def _to_its_end(self, x_LD: torch.Tensor, text: str) -> torch.Tensor:
        """A prompt's embedding without the zeros after it, in main memory.

        Raises FloatingPointError for one that says nothing: a broken text encoder must not make
        videos, nor files that keep its embeddings.
        """
        tokens = x_LD.any(dim=1).nonzero()
        if not len(tokens) or not is_finite(x_LD):
            what = "NaN or infinite" if len(tokens) else "all zero"
            raise FloatingPointError(
                f"the embedding of the prompt {text[:60]!r} is {what}; the text encoder in {self.folder} has made it: look at its weights, or load it in float32"
            )
        return x_LD[: int(tokens.max()) + 1].cpu()

    def forget_text_encoder(self) -> None:
        """Free the text encoder's memory; only texts in ``known`` can be asked for then."""
        self.stock.register_modules(text_encoder=None)

    def new_cache(self, capacity: int, rows: int = 1) -> FrameCache:
        """An empty cache of ``capacity`` latent frames."""
        g = self.geometry
        cache = self.generator.new_cache(
            capacity, g.latent_height, g.latent_width, rows=rows, sink=g.sink
        )
        cache.bank = Bank.empty(cache.k, g.bank_keep) if g.bank else None
        return cache

    def latent_shape(self, frames: int) -> tuple[int, int, int, int]:
        g = self.geometry
        return (
            frames,
            self.generator.transformer.config.in_channels,
            g.latent_height,
            g.latent_width,
        )

    def decoder(self) -> StreamingDecoder:
        return StreamingDecoder(VaeFrames(self.vae))

    @property
    def scoring(self) -> FrameDecoder:
        """The network that decodes a group before it is scored."""
        return VaeFrames(self.vae) if self.preview is None else self.preview

    def save(self, folder: str | Path) -> None:
        """Write the pipeline folder; the caller makes it atomic by moving it into place."""
        self.stock.save_pretrained(folder, safe_serialization=True)
        (Path(folder) / "streaming.json").write_text(
            json.dumps(asdict(self.geometry), indent=1) + "\n"
        )
        open_to_readers(Path(folder))


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Order the weights of the convolutions as CPUs like them.

    Decoding then takes a little more than half the time.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in vae.parameters():
        if p.dim() in formats:
            p.data = p.data.contiguous(memory_format=formats[p.dim()])
