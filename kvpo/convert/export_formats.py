"""`kvpo export`: a run's weights in the formats that other programs load.

pipeline          a pipeline folder, adapter merged                       kvpo, diffusers
diffusers-lora    pytorch_lora_weights.safetensors                        WanPipeline.load_lora_weights
peft              adapter_config.json, adapter_model.safetensors          PeftModel.from_pretrained(transformer, ...)
original-lora     lora.pt: {"generator_lora": adapter}                    LongLive, MemFlow and the paper's code
original-merged   generator.pt: {"generator": state}, original names      Self-Forcing and all that descend from it
comfyui-lora      lora.safetensors: diffusion_model.*.lora_down/up/alpha  ComfyUI's and its wrappers' LoRA loaders
comfyui-merged    model.safetensors: model.diffusion_model.*              ComfyUI's loader of diffusion models
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import WanPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from kvpo.common.files import must_be_new, whole_folder, write_atomic
from kvpo.common.weights import State
from kvpo.convert.lora import LowRank, merge
from kvpo.convert.wan_base import arguments, copy_file, copy_tree, save_transformer
from kvpo.convert.wan_names import diffusers_to_original, keeps_float32
from kvpo.generators.pipeline import Pipeline
from kvpo.runs.loading import is_run, load_generator, named, origin_of_run, run_config


def export(weights: str, format: str, out: Path | None, dtype: str) -> Path:
    """Write the folder, completely or not at all; returns its path.

    Arguments are those of `kvpo.commands.export.Export`, whose ``run`` is ``weights``. Raises
    ValueError for what the run can not give.
    """
    run, which = named(weights)
    if not is_run(run):
        raise ValueError(
            f"{run} is no run folder: it has no config.resolved.yaml; give the folder that `kvpo align` wrote"
        )
    config, adapter = run_config(Path(run)), format in ADAPTER_FORMATS
    if adapter and config.policy.train != "lora":
        raise ValueError(
            f"--format {format} is an adapter, but {run} trained all weights; export it as pipeline or original-merged, or for ComfyUI as comfyui-merged"
        )
    if adapter and (origin := origin_of_run(run)):
        raise ValueError(
            f"--format {format} is an adapter, and that of {run} acts on the weights of {origin.weights} that it started from, which nothing else has; export the whole model as pipeline, original-merged or comfyui-merged"
        )
    out = out or Path(run) / "export" / f"{which or 'ema'}-{format}"
    must_be_new(out)
    # the weights as they are trained, whatever the run computes in
    pipeline, label = load_generator(weights, dtype="float32")
    number = getattr(torch, dtype if dtype != "run" else "float32" if adapter else config.dtype)
    with whole_folder(out) as part:
        WRITERS[format](part, pipeline, number)
        write_atomic(part / "README.md", card(format, out.name, label, pipeline.folder))
    return out


def _adapter(pipeline: Pipeline, dtype: torch.dtype) -> State:
    """LoRA tensors, named as peft names them within the transformer.

    An example is blocks.0.attn1.to_q.lora_A.weight.
    """
    state = get_peft_model_state_dict(pipeline.generator.transformer, adapter_name="default")
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}


def merged_state(pipeline: Pipeline, dtype: torch.dtype) -> State:
    """The transformer's tensors with its adapter, if it has one, added to the weights."""
    transformer = pipeline.generator.transformer
    found = transformer.state_dict()
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in found.items()
        if ".lora_" not in name
    }
    if (peft := getattr(transformer, "peft_config", None)) is not None:
        config = peft["default"]
        halves = get_peft_model_state_dict(transformer, adapter_name="default")
        modules = {
            name.removesuffix(".lora_A.weight")
            for name in halves
            if name.endswith(".lora_A.weight")
        }
        adapter = {
            m: LowRank(
                halves[f"{m}.lora_A.weight"],
                halves[f"{m}.lora_B.weight"],
                config.lora_alpha / config.r,
            )
            for m in modules
        }
        merge(state, adapter, 1.0, "the run's adapter")
    return {
        name: tensor.detach().to(torch.float32 if keeps_float32(name) else dtype).contiguous()
        for name, tensor in state.items()
    }


def write_pipeline(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    source = Path(pipeline.folder)
    save_transformer(
        arguments(pipeline.generator.transformer.config), merged_state(pipeline, dtype), folder
    )
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        copy_tree(source / part, folder / part)
    for name in ("model_index.json", "streaming.json"):
        copy_file(source / name, folder / name)


def write_diffusers_lora(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    config = pipeline.generator.transformer.peft_config["default"]
    stated = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": config.target_modules,
        "peft_type": "LORA",
    }
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=_adapter(pipeline, dtype),
        transformer_lora_adapter_metadata=stated,
    )


def write_peft(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    pipeline.generator.transformer.peft_config["default"].save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = (
        None  # the folder it was loaded from means nothing elsewhere
    )
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in _adapter(pipeline, dtype).items()},
        folder / "adapter_model.safetensors",
    )


def write_original_lora(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    state = diffusers_to_original(_adapter(pipeline, dtype))
    torch.save(
        {"generator_lora": {f"base_model.model.{name}": tensor for name, tensor in state.items()}},
        folder / "lora.pt",
    )


def write_original_merged(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    state = diffusers_to_original(merged_state(pipeline, dtype))
    torch.save(
        {"generator": {f"model.{name}": tensor for name, tensor in state.items()}},
        folder / "generator.pt",
    )


def write_comfyui_lora(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    config = pipeline.generator.transformer.peft_config["default"]
    halves = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    state = {}
    for name, tensor in diffusers_to_original(_adapter(pipeline, dtype)).items():
        module, _, half = name.rpartition(".lora_")
        state[f"diffusion_model.{module}.{halves[f'lora_{half}']}"] = tensor
        state[f"diffusion_model.{module}.alpha"] = torch.tensor(
            float(config.lora_alpha), dtype=torch.float32
        )
    save_file(state, folder / "lora.safetensors", metadata={"format": "pt"})


def write_comfyui_merged(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    state = diffusers_to_original(merged_state(pipeline, dtype))
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


ADAPTER_FORMATS = ("diffusers-lora", "peft", "original-lora", "comfyui-lora")
WRITERS: Mapping[str, Callable[[Path, Pipeline, torch.dtype], None]] = {
    "pipeline": write_pipeline,
    "diffusers-lora": write_diffusers_lora,
    "peft": write_peft,
    "original-lora": write_original_lora,
    "original-merged": write_original_merged,
    "comfyui-lora": write_comfyui_lora,
    "comfyui-merged": write_comfyui_merged,
}


BIDIRECTIONAL = """
These weights generate a video as a stream, block by block, each block reading a cache of the frames before it. {who} runs
them bidirectionally: all frames of one fixed length at once, with no cache and many steps. That is another sampler than the
one they were trained with; it loads, and its videos say little about these weights.
"""
STREAMED = """
As a stream they are run by kvpo (`kvpo generate FOLDER --prompt ...` does the same):

```python
import kvpo

video = kvpo.generate("FOLDER", ["a small red circle moves right slowly in the night", "it turns blue"], seconds=9)
video.save("video.mp4")
```
"""
RUNS_THEM = {
    "pipeline": "Stock diffusers (`WanPipeline`)",
    "diffusers-lora": "Stock diffusers (`WanPipeline`)",
    "comfyui-lora": "ComfyUI",
    "comfyui-merged": "ComfyUI",
}
"""Formats whose usual program generates otherwise than these weights were trained for."""


def card(format: str, folder: str, label: str, base: str) -> str:
    """README.md of an export: whose weights, how they are meant to be run.

    It has names only: a path of this machine says nothing elsewhere.
    """
    adapter = "\nThe adapter acts at scale 1 (alpha = rank).\n" if format in ADAPTER_FORMATS else ""
    other = BIDIRECTIONAL.format(who=RUNS_THEM[format]) if format in RUNS_THEM else ""
    streamed = STREAMED.replace("FOLDER", folder) if format == "pipeline" else ""
    return f"""# {label}

Written by `kvpo export --format {format}` (kvpo {version("kvpo")}) from the run's weights {label}; the run started from `{Path(base).name}`, whose licence governs these weights.
{adapter}{other}{streamed}"""
