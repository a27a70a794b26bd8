"""A generator with everything around it, from one folder in diffusers layout.

It has text encoder, transformer, VAE and geometry.

    model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  streaming.json

All but `streaming.json` are what `WanPipeline` saves and loads. Nothing here knows whether the
model is tiny.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from kvpo.common.access import check_readable
from kvpo.common.files import first_line, open_to_readers
from kvpo.common.finite import check_finite, check_finite_json, is_finite
from kvpo.common.text_files import read_text
from kvpo.generators.cache import FrameCache
from kvpo.generators.causal_wan import CausalWan
from kvpo.generators.flow import warped_sigmas
from kvpo.generators.history import Deployed, MemoryBank, SinkWindow
from kvpo.generators.memory import Bank
from kvpo.generators.preview import Preview
from kvpo.generators.streaming import FrameDecoder, StreamingDecoder, VaeFrames

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Geometry:
    """Geometry of the generator's streaming: the content of `streaming.json`."""

    block: int
    """Latent frames generated together."""
    sink: int
    """Oldest latent frames, always read."""
    window: int
    """Latent frames a block reads in all; -1: everything.

    They are sink, rolling past and the block itself.
    """
    latent_height: int
    latent_width: int
    fps: int
    """Pixel frames a second."""
    text_length: int
    """Tokens of an embedded prompt, zeros after its end included."""
    steps: int = 4
    """Denoise steps of a block."""
    shift: float = 5.0
    """Warp of the step schedule, see `kvpo.generators.flow.warp`."""
    bank: int = 0
    """Latent frames of MemFlow's memory bank, read beside the window; 0: none."""
    bank_every: int = 3
    """Blocks between frames recorded to the bank."""
    bank_keep: int = 0
    """Latent frames of sink and bank that each head reads, chosen by its queries (SMA); 0: all."""
    first_steps: int = 0
    """Denoise steps of a video's first block, which has no past to lean on; 0: as all others."""

    def __post_init__(self):
        least = {
            "block": 1,
            "sink": 0,
            "window": -1,
            "latent_height": 1,
            "latent_width": 1,
            "fps": 1,
            "text_length": 1,
            "steps": 1,
            "bank": 0,
            "bank_every": 1,
            "bank_keep": 0,
            "first_steps": 0,
        }
        for name, low in least.items():
            if type(value := getattr(self, name)) is not int or value < low:
                raise ValueError(f"{name} = {value!r} must be a whole number, {low} or more")
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift = {self.shift!r} must be a number above 0 and finite")
        if 0 <= self.window < self.sink + self.block:
            raise ValueError(
                f"window = {self.window} has no room for the sink ({self.sink}) and a block ({self.block}); widen it, or -1 for everything"
            )

        if self.bank and self.window < 0:
            raise ValueError(
                f"bank = {self.bank} beside a window of everything (-1) would only repeat frames; give a window, or no bank"
            )
        if self.bank_keep and not self.bank:
            raise ValueError(
                f"bank_keep = {self.bank_keep} chooses among sink and bank, and there is no bank; set bank, or bank_keep = 0"
            )

    def check_grid(self, patch_size: Sequence[int], source: str) -> None:
        """Check that the transformer's patches (frames, rows, columns) tile the latents.

        Raises ValueError where they do not.
        """
        for name, value, step in (
            ("latent_height", self.latent_height, patch_size[1]),
            ("latent_width", self.latent_width, patch_size[2]),
        ):
            if value % step:
                raise ValueError(
                    f"{source}: {name} = {value} is not a multiple of the transformer's patch, {step}; correct it there"
                )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of every block that may be explored: all but a video's first."""
        return warped_sigmas(self.steps, self.shift)

    def sigmas_of(self, block: int) -> tuple[float, ...]:
        """Noise levels of a block, by its number."""
        return (
            warped_sigmas(self.first_steps, self.shift)
            if block == 0 and self.first_steps
            else self.sigmas
        )

    @property
    def history(self) -> Deployed:
        window = SinkWindow(self.sink, self.window)
        return MemoryBank(window, self.bank, self.bank_every, self.block) if self.bank else window

    def resident(self, blocks: int) -> int:
        """Latent frames a cache must hold to stream so many blocks.

        A prompt switch re-encodes the latest ``window`` frames beside the sink.
        """
        return min(
            blocks * self.block, blocks * self.block if self.window < 0 else self.sink + self.window
        )

    def reencoded(self, block: int) -> range:
        """Frames that a prompt switch before ``block`` encodes once more.

        They are the window's past without the sink.
        """
        stop = block * self.block
        return range(self.sink if self.window < 0 else max(self.sink, stop - self.window), stop)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of a video of so many latent frames.

        The first gives 1, each after it gives 4.
        """
        return max(0, 4 * latent_frames - 3)

    @classmethod
    def read(cls, path: Path) -> Geometry:
        check_readable(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a pipeline folder needs it to know its block, sink and window; `kvpo pretrain` writes one, `kvpo.generators.pipeline.Geometry` says what belongs in it"
            )
        try:
            found = json.loads(read_text(path))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
        known = {f.name: f.default is MISSING for f in fields(cls)}
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold the keys {list(known)}, not {found!r}")
        if unknown := sorted(set(found) - set(known)):
            raise ValueError(f"{path}: unknown keys {unknown}; known are {list(known)}")
        if missing := sorted(
            name for name, needed in known.items() if needed and name not in found
        ):
            raise ValueError(
                f"{path}: missing keys {missing}; add them, `kvpo.generators.pipeline.Geometry` says what they mean"
            )
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


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
        transformer = _load(WanTransformer3DModel, folder / "transformer", dtype)
        vae = _load(AutoencoderKLWan, folder / "vae", vae_dtype or dtype)
        encoder = _load(UMT5EncoderModel, folder / "text_encoder", dtype) if text_encoder else None
        tokenizer = load_tokenizer(folder)
        scheduler = _load_weightless(FlowMatchEulerDiscreteScheduler, folder / "scheduler")
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


def check_folder(folder: Path) -> Geometry:
    """Read how the generator of a pipeline folder streams, without any weights.

    Raises PermissionError, FileNotFoundError or ValueError where the folder is none, or not whole.
    """
    check_readable(folder)
    check_readable(folder / "model_index.json")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no pipeline folder: model_index.json is missing; give a folder in diffusers layout, mini, or the weights of a run that kvpo align wrote, such as RUN:ema"
        )
    geometry = Geometry.read(folder / "streaming.json")
    for path in sorted(folder.glob("*/config.json")):
        check_finite_json(path)
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        _check_folder(folder / part)
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder} is no whole pipeline folder: {part}/ is missing; copy it again, or give a folder in diffusers layout"
            )
    return geometry


def load_tokenizer(folder: Path):
    """The tokenizer of a pipeline folder.  ValueError where its files are broken."""
    return _load_weightless(AutoTokenizer, folder / "tokenizer")


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Order the weights of the convolutions as CPUs like them.

    Decoding then takes a little more than half the time.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in vae.parameters():
        if p.dim() in formats:
            p.data = p.data.contiguous(memory_format=formats[p.dim()])


def _check_folder(folder: Path) -> None:
    """Check that a folder, and every file in it, may be read.

    Raises PermissionError, before any reader calls it missing or broken.
    """
    check_readable(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        check_readable(path)


def _load(kind, folder: Path, dtype: torch.dtype):
    """A stock class from its folder, every tensor accounted for."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
        reason = (
            f"holds only {pickled}, which would have to be unpickled; convert them to safetensors"
            if pickled
            else "holds no *.safetensors file; copy the weights into it"
        )
        raise FileNotFoundError(f"{folder} {reason}")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); copy it again"
            ) from None
    try:
        model, info = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder} does not hold a {kind.__name__} ({first_line(error)}); copy it again"
        ) from None
    wrong = {
        what: sorted(map(str, info[what]))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(what)
    }
    if wrong:
        listed = "; ".join(
            f"{what.replace('_', ' ')}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}"
            for what, keys in wrong.items()
        )
        raise ValueError(
            f"{folder} holds weights of another model than its config.json describes: {listed}; copy both again from one model"
        )
    return model


def _load_weightless(kind, folder: Path):
    """A stock class from a folder of descriptions only."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    # of malformed files tokenizers raises bare ones, and transformers whatever its reading stumbles
    # over
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        reason = (
            _not_json(folder)
            or f"{folder} does not hold a {folder.name} ({type(error).__name__}: {first_line(error)})"
        )
    raise ValueError(f"{reason}; copy it again")


def _not_json(folder: Path) -> str:
    """Name the folder's file that is no JSON, and why; "" if all are."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{path} is not JSON ({error})"
    return ""


def pixel_span(blocks: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Pixel frames [first, stop) of blocks [first, stop)."""
    first, stop = (geometry.pixel_frames(b * geometry.block) for b in blocks)
    return first, stop


def block_at(second: float, geometry: Geometry, up: bool = False) -> int:
    """Number of the block whose first pixel frame is nearest to a time of the video, s.

    ``up``: number of blocks that reach the time. Raises ValueError unless it is above 0 and finite.
    """
    if not 0.0 < second < math.inf:
        raise ValueError(
            f"{second} s is no time of a video that a block could begin or end at; give more than 0"
        )
    # the first latent frame gives one pixel frame, every later one four
    blocks = (second * geometry.fps + 3) / (4 * geometry.block)
    return int(-(-blocks // 1)) if up else max(1, round(blocks))


def blocks_at(seconds: Sequence[float], geometry: Geometry) -> list[int]:
    """`block_at` of times at which prompts change, in their order.

    Raises ValueError where a time does not come after the one before it, or is nearest to the same
    block: a prompt between them would never be shown.
    """
    blocks = [block_at(second, geometry) for second in seconds]
    for (a, first), (b, second) in pairwise(zip(seconds, blocks)):
        if first >= second:
            raise ValueError(
                f"prompts can not change at {a:g} s and then at {b:g} s: a prompt is shown for a block of {4 * geometry.block / geometry.fps:g} s at least; give times that rise by that much"
            )
    return blocks
