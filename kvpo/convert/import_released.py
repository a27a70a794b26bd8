"""`kvpo import`: a released checkpoint becomes a pipeline folder in diffusers layout.

It also takes the Wan2.1 folder that the checkpoint was trained from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from kvpo.common.files import must_be_new, whole_folder, write_atomic
from kvpo.common.finite import check_finite
from kvpo.common.weights import State, account, sha256_of
from kvpo.convert.lora import adapter_in, described, is_adapter, merge
from kvpo.convert.wan_base import BaseFolder, new_transformer, open_base, save_transformer
from kvpo.convert.wan_names import OF_TRAINERS, generator_state, keeps_float32, unfolded
from kvpo.convert.weight_files import WeightFiles, find_weights
from kvpo.generators.geometry import Geometry

Content = tuple[WeightFiles, dict[str, Any]]
"""Weight files, and what is in them by name."""
DAMAGED = "its training went wrong, or the file was damaged: copy it again, or give another one"


@dataclass(frozen=True)
class Format:
    """A family of released checkpoints: what its files leave unsaid."""

    name: str
    source: str
    licence: str
    """Licence of the weights, as their publisher states it."""
    geometry: Geometry
    prefer: tuple[str, ...] = ("generator", "generator_ema", "model")
    """Keys of the generator in the file, best first.

    The first is what the family's own inference takes.
    """
    named: str = ""
    """Pattern of the last two parts of a path that mean this format; "" = none do.

    It holds where only its family's name was given: framewise/causal_forcing.pt.
    """
    size: str = "1.3b"
    """Size of the base, as `kvpo plan --size` names it."""
    base: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """Hub id of the base that it was trained from."""
    scale: int = 8
    """Rows and columns of pixels that the base's VAE makes of a latent."""
    otherwise: str = ""
    """Difference of its own inference from what is done here; "" = none that is known."""


WAN = Geometry(
    block=3, sink=0, window=21, latent_height=60, latent_width=104, fps=16, text_length=512
)
"""Geometry of 480 x 832 pixels with window 21, which is everything.

Self-Forcing and Causal-Forcing were trained on 21 latent frames; a longer video rolls on.
"""
LONGLIVE = replace(WAN, sink=3, window=12)
FRAMEWISE = replace(WAN, block=1)
"""Geometry of one latent frame a block.

The models of fewer steps denoise a video's first block in four all the same.
"""
MEMFLOW = replace(LONGLIVE, bank=3, bank_every=3)
"""Sparse memory activation (`bank_keep` in streaming.json) is off in its released configuration."""
LONGLIVE_2 = Geometry(
    block=8, sink=8, window=32, latent_height=44, latent_width=80, fps=24, text_length=512
)
"""Geometry of 704 x 1280 pixels on Wan2.2-TI2V-5B, whose VAE makes 16 x 16 of a latent."""
UNKNOWN = "not known here; see the source"
CAUSAL_FORCING = "https://huggingface.co/zhuhz22/Causal-Forcing"
EMA = ("generator_ema", "generator", "model")

FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format(
            "self-forcing",
            "https://huggingface.co/gdhe17/Self-Forcing",
            "CC-BY-NC-SA-4.0",
            WAN,
            EMA,
        ),
        # Its README runs the chunk-wise model without --use_ema, and the frame-wise ones with it.
        Format("causal-forcing", CAUSAL_FORCING, "Apache-2.0", WAN),
        Format(
            "causal-forcing-framewise",
            CAUSAL_FORCING,
            "Apache-2.0",
            FRAMEWISE,
            EMA,
            r"frame-?_?wise",
        ),
        Format(
            "causal-forcing-2step",
            CAUSAL_FORCING,
            "Apache-2.0",
            replace(FRAMEWISE, steps=2, first_steps=4),
            EMA,
            r"2-?_?step",
        ),
        Format(
            "causal-forcing-1step",
            CAUSAL_FORCING,
            "Apache-2.0",
            replace(FRAMEWISE, steps=1, first_steps=4),
            EMA,
            r"1-?_?step",
        ),
        Format("longlive", "https://github.com/NVlabs/LongLive", UNKNOWN, LONGLIVE),
        Format("memflow", "https://huggingface.co/KlingTeam/MemFlow", "Apache-2.0", MEMFLOW),
        Format("kvpo", "https://huggingface.co/Richard-ZZZZZ/KVPO", UNKNOWN, LONGLIVE),
        Format(
            "krea",
            "https://huggingface.co/krea/krea-realtime-video",
            UNKNOWN,
            replace(WAN, window=6),
            size="14b",
            base="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            otherwise="before every block it encodes the 3 frames that the block reads anew, the oldest of them from pixels; here the block reads the pages of the last 3 as they were written",
        ),
        Format(
            "longlive-2",
            "https://huggingface.co/Efficient-Large-Model/LongLive-2.0-5B",
            UNKNOWN,
            LONGLIVE_2,
            size="5b",
            base="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            scale=16,
            otherwise="it solves with UniPC, and at a scene cut it pins a new sink and moves positions on by 8; here noise is added anew between steps (sampler ode: Euler), and the sink is the video's first block",
        ),
    )
}


@dataclass(frozen=True)
class Source:
    """One file that went in."""

    path: Path
    what: str
    sha256: str


def import_checkpoint(
    files: Sequence[Path],
    out: Path,
    kind: Format,
    geometry: Geometry,
    base_folder: str,
    dtype: str,
    which: str,
    lora_scale: float,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the pipeline folder; ``say`` is told what is going on.

    Raises ValueError or FileNotFoundError, before anything is written, for whatever does not fit.
    """
    must_be_new(out)  # said before gigabytes are read
    base = open_base(base_folder)
    config = base.transformer_config()
    geometry.check_grid(config["patch_size"], f"--format {kind.name}")
    say(_assumed(kind, geometry))
    state, sources = _weights(kind, files, config, lora_scale, which, say)
    number = getattr(torch, dtype)
    disable_progress_bar()  # transformers' own, on stderr
    say(f"writing {len(state)} tensors in {dtype}, and the parts of {base.folder}")
    with whole_folder(out) as part:
        _write(
            part,
            base,
            config,
            {n: t.to(torch.float32 if keeps_float32(n) else number) for n, t in state.items()},
            geometry,
        )
        write_atomic(
            part / "README.md",
            _card(
                kind,
                base_folder if not Path(base_folder).exists() else base.folder.name,
                sources,
                number,
            ),
        )
    return out


def _assumed(kind: Format, geometry: Geometry) -> str:
    """Say what is assumed because the files do not say it, and how to change it."""
    g = geometry
    first = f" (the first block {g.first_steps})" if g.first_steps else ""
    said = f"block {g.block}, steps {g.steps}{first}, sink {g.sink}, window {g.window}" + (
        f", memory bank {g.bank}" if g.bank else ""
    )
    pixels = f"{kind.scale * g.latent_height} x {kind.scale * g.latent_width} pixels"
    other = f"\n{kind.name}'s own inference differs: {kind.otherwise}" if kind.otherwise else ""
    return f"taken for {kind.name}: {said}, {pixels}; the files do not say it, --block, --steps, --first-steps, --sink and --window do{other}"


def _weights(
    kind: Format, paths: Sequence[Path], config: dict[str, Any], lora_scale: float, which: str, say
) -> tuple[State, list[Source]]:
    """The generator's weights with all LoRAs in them, and the files that they are from."""
    generator, adapters = _parted(paths)
    state, sources = _generator(kind, *generator, config, which, say)
    for files, content in adapters:
        adapter = adapter_in(files, content)
        check_finite(
            ((f"{m}.{half}", t) for m, low in adapter.items() for half, t in zip("AB", low)),
            str(files.path),
            DAMAGED,
        )
        merge(state, adapter, lora_scale, str(files.path))
        sources += [
            Source(file, described(adapter, lora_scale), sha256_of(file)) for file in files.files
        ]
        say(f"{files.path}: {sources[-1].what}")
    check_finite(
        state.items(),
        "what the LoRAs and the generator make together",
        "give a smaller --lora-scale",
    )
    return state, sources


def _parted(paths: Sequence[Path]) -> tuple[Content, list[Content]]:
    """The one generator among some files, and the LoRAs; shards given one by one are one set."""
    found = [find_weights(path) for path in paths]
    found = [
        f
        for i, f in enumerate(found)
        if len(f.files) == 1 or f.files not in [g.files for g in found[:i]]
    ]
    contents = [(f, unfolded(f.read())) for f in found]
    generators, adapters = (
        [c for c in contents if is_adapter(c[1]) == wanted] for wanted in (False, True)
    )
    if len(generators) != 1:
        names = ", ".join(f.path.name for f, _ in generators) or "none"
        raise ValueError(
            f"{len(generators)} of the {len(contents)} files hold a generator ({names}); give exactly one, and any number of LoRA files"
        )
    return generators[0], adapters


def _generator(
    kind: Format,
    files: WeightFiles,
    content: Mapping[str, Any],
    config: dict[str, Any],
    which: str,
    say,
) -> tuple[State, list[Source]]:
    """A generator's weights, each of which has its place in the base's transformer."""
    path = files.path
    wanted = {n: t.shape for n, t in new_transformer(config).state_dict().items()}
    state, key = generator_state(content, path, (which,) if which else (*kind.prefer, *OF_TRAINERS))
    if which and not key:
        raise ValueError(
            f"--weights {which}: {path} holds one generator and no keys to choose from; leave it out"
        )
    account(
        state,
        wanted,
        str(path),
        f"the transformer of the base ({config['num_layers']} layers of {config['num_attention_heads']} x {config['attention_head_dim']})",
    )
    check_finite(state.items(), str(path), DAMAGED)
    say(f"{path}: {len(state)} tensors{_chosen(content, key, kind, which)}, each in its place")
    what = f"generator{f', key {key}' if key else ''}"
    return state, [Source(file, what, sha256_of(file)) for file in files.files]


def _chosen(content: Mapping[str, Any], key: str, kind: Format, which: str) -> str:
    """Say which of the file's weights were taken, and why."""
    if not key:
        return ""
    others = [
        name for name in kind.prefer if name != key and isinstance(content.get(name), Mapping)
    ]
    if which or not others:
        return f" under {key!r}"
    why = (
        f"what {kind.name}'s own inference takes"
        if key == kind.prefer[0]
        else "the first of those that it has"
    )
    return f" under {key!r}, {why} (the file also has {', '.join(map(repr, others))}, which --weights {others[0]} takes)"


def _write(
    folder: Path, base: BaseFolder, config: dict[str, Any], state: State, geometry: Geometry
) -> None:
    save_transformer(config, state, folder)
    base.write_parts(folder)
    FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=geometry.shift, stochastic_sampling=True
    ).save_pretrained(folder / "scheduler")
    write_atomic(folder / "streaming.json", json.dumps(asdict(geometry), indent=1) + "\n")
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": [
            "transformers",
            type(
                AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            ).__name__,
        ],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": version("diffusers"),
        "boundary_ratio": None,
        "expand_timesteps": False,
    } | parts
    write_atomic(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _card(kind: Format, base: str, sources: Sequence[Source], dtype: torch.dtype) -> str:
    files = "\n".join(f"| {s.path.name} | {s.what} | `{s.sha256}` |" for s in sources)
    return f"""# {kind.name}, imported

A streaming text-to-video generator in diffusers layout, written by `kvpo import --format {kind.name}` (kvpo {version("kvpo")}). Transformer in {str(dtype).removeprefix("torch.")}, except what diffusers holds in float32.

Weights from {kind.source}; licence of these weights, as stated there: {kind.licence}.
Text encoder, tokenizer and VAE from {"Wan2.2" if kind.size == "5b" else "Wan2.1"} (`{base}`), Apache-2.0. The stricter licence governs this folder.
{f"{chr(10)}Its own inference differs: {kind.otherwise}.{chr(10)}" if kind.otherwise else ""}
| file | what | sha256 |
|---|---|---|
{files}
"""
