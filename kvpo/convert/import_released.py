"""`kvpo import`: a released checkpoint and the Wan2.1 folder it was trained from -> a pipeline folder in diffusers layout."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from kvpo.common.files import must_be_new, whole_folder, write_atomic
from kvpo.common.weights import State, _sha256, account, read_checkpoint
from kvpo.convert.wan_base import BaseFolder, new_transformer, open_base, save_transformer
from kvpo.convert.wan_names import adapter_of, generator_state, is_adapter, keeps_float32, merge
from kvpo.generators.pipeline import Geometry


@dataclass(frozen=True)
class Format:
    """A family of released checkpoints: what its files leave unsaid."""

    name: str
    source: str
    licence: str
    """Of the weights, as their publisher states it."""
    geometry: Geometry
    prefer: tuple[str, ...] = ("generator", "generator_ema", "model")
    """Keys of the generator in the file, best first."""


WAN = Geometry(block=3, sink=0, window=21, latent_height=60, latent_width=104, fps=16, text_length=512)
"""480 x 832.  Window 21: everything, in the 21 latent frames that Self-Forcing and Causal-Forcing were trained on; a longer video rolls on."""
LONGLIVE = replace(WAN, sink=3, window=12)
MEMFLOW = replace(LONGLIVE, bank=3, bank_every=3)
"""Sparse memory activation (`bank_keep` in streaming.json) is off in its released configuration."""
UNKNOWN = "not known here; see the source"

FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format("self-forcing", "https://huggingface.co/gdhe17/Self-Forcing", "CC-BY-NC-SA-4.0", WAN, ("generator_ema", "generator", "model")),
        Format("causal-forcing", "https://github.com/thu-ml/Causal-Forcing", UNKNOWN, WAN, ("generator_ema", "generator", "model")),
        Format("longlive", "https://github.com/NVlabs/LongLive", UNKNOWN, LONGLIVE),
        Format("memflow", "https://huggingface.co/KlingTeam/MemFlow", "Apache-2.0", MEMFLOW),
        Format("kvpo", "https://huggingface.co/Richard-ZZZZZ/KVPO", UNKNOWN, LONGLIVE),
    )
}


@dataclass(frozen=True)
class Source:
    """One file that went in."""

    path: Path
    what: str
    sha256: str


def import_checkpoint(
    files: Sequence[Path], out: Path, format: str, geometry: Geometry, base_folder: str, dtype: str, which: str, lora_scale: float, say: Callable[[str], None] = lambda line: None
) -> Path:  # fmt: skip
    """Write the pipeline folder.  ``say`` is told what is going on.  ValueError or FileNotFoundError, before anything is written, for whatever does not fit."""
    must_be_new(out)  # said before gigabytes are read
    kind, base = FORMATS[format], open_base(base_folder)
    config = base.transformer_config()
    geometry.check_grid(config["patch_size"], f"--format {format}")
    state, sources = _weights(kind, files, config, lora_scale, which, say)
    number = getattr(torch, dtype)
    disable_progress_bar()  # transformers' own, on stderr
    say(f"writing {len(state)} tensors in {dtype}, and the parts of {base.folder}")
    with whole_folder(out) as part:
        _write(part, base, config, {n: t.to(torch.float32 if keeps_float32(n) else number) for n, t in state.items()}, geometry)
        write_atomic(part / "README.md", _card(kind, base, sources, number))
    return out


def _weights(kind: Format, files: Sequence[Path], config: dict[str, Any], lora_scale: float, which: str, say) -> tuple[State, list[Source]]:
    contents = [(path, read_checkpoint(path)) for path in files]
    generators, adapters = ([c for c in contents if is_adapter(c[1]) == wanted] for wanted in (False, True))
    if len(generators) != 1:
        raise ValueError(f"{len(generators)} of the {len(contents)} files hold a generator ({', '.join(p.name for p, _ in generators) or 'none'}); give exactly one, and any number of LoRA files")
    (path, content), wanted = generators[0], {n: t.shape for n, t in new_transformer(config).state_dict().items()}
    state, key = generator_state(content, path, (which,) if which else kind.prefer)
    account(state, wanted, str(path), f"the transformer of the base ({config['num_layers']} layers of {config['num_attention_heads']} x {config['attention_head_dim']})")
    say(f"{path}: {len(state)} tensors{f' under {key!r}' if key else ''}, each in its place")
    sources = [Source(path, f"generator{f', key {key}' if key else ''}", _sha256(path))]
    for path, content in adapters:
        merge(state, adapter := adapter_of(content, path), lora_scale, str(path))
        rank = len(next(iter(adapter.values()))[0])
        sources.append(Source(path, f"LoRA of rank {rank} on {len(adapter)} modules, merged at scale {lora_scale:g}", _sha256(path)))
        say(f"{path}: {sources[-1].what}")
    return state, sources


def _write(folder: Path, base: BaseFolder, config: dict[str, Any], state: State, geometry: Geometry) -> None:
    save_transformer(config, state, folder)
    base.write_parts(folder)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=geometry.shift, stochastic_sampling=True).save_pretrained(folder / "scheduler")
    write_atomic(folder / "streaming.json", json.dumps(asdict(geometry), indent=1) + "\n")
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", type(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index = {"_class_name": "WanPipeline", "_diffusers_version": version("diffusers"), "boundary_ratio": None, "expand_timesteps": False} | parts
    write_atomic(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _card(kind: Format, base: BaseFolder, sources: Sequence[Source], dtype: torch.dtype) -> str:
    files = "\n".join(f"| {s.path.name} | {s.what} | `{s.sha256}` |" for s in sources)
    return f"""# {kind.name}, imported

A streaming text-to-video generator in diffusers layout, written by `kvpo import --format {kind.name}` (kvpo {version("kvpo")}). Transformer in {str(dtype).removeprefix("torch.")}, except what diffusers holds in float32.

Weights from {kind.source}; licence of these weights, as stated there: {kind.licence}.
Text encoder, tokenizer and VAE from Wan2.1 (`{base.folder.name}`), Apache-2.0. The stricter licence governs this folder.

| file | what | sha256 |
|---|---|---|
{files}
"""
