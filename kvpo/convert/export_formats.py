"""`kvpo export`: a run's weights in the formats that other programs load.

    pipeline          a pipeline folder, adapter merged                       kvpo, diffusers
    diffusers-lora    pytorch_lora_weights.safetensors                        WanPipeline.load_lora_weights
    peft              adapter_config.json, adapter_model.safetensors          PeftModel.from_pretrained(transformer, ...)
    original-lora     lora.pt: {"generator_lora": adapter}                    LongLive, MemFlow and the paper's code
    original-merged   generator.pt: {"generator": state}, original names      Self-Forcing and all that descend from it
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Mapping

import torch
from diffusers import WanPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from kvpo.common.files import must_be_new, whole_folder, write_atomic
from kvpo.common.weights import State
from kvpo.convert.wan_base import arguments, link_tree, save_transformer
from kvpo.convert.wan_names import diffusers_to_original, keeps_float32, merge
from kvpo.generators.pipeline import Pipeline
from kvpo.runs.loading import is_run, load_generator, run_config


def export(weights: str, format: str, out: Path | None, dtype: str) -> Path:
    """Write the folder, completely or not at all; arguments as in `kvpo.commands.export.Export`, whose ``run`` is ``weights``.  ValueError for what the run can not give."""
    run, _, which = weights.partition(":")
    if not is_run(Path(run)):
        raise ValueError(f"{run} is no run folder: it has no config.resolved.yaml")
    config, adapter = run_config(Path(run)), format in ADAPTER_FORMATS
    if adapter and config.policy.train != "lora":
        raise ValueError(f"--format {format} is an adapter, but {run} trained all weights; export it as pipeline or original-merged")
    out = out or Path(run) / "export" / f"{which or 'ema'}-{format}"
    must_be_new(out)
    pipeline, label = load_generator(weights, dtype="float32")  # the weights as they are trained, whatever the run computes in
    number = getattr(torch, dtype if dtype != "run" else "float32" if adapter else config.dtype)
    with whole_folder(out) as part:
        WRITERS[format](part, pipeline, number)
        write_atomic(part / "README.md", _card(format, label, pipeline.folder))
    return out


def _adapter(pipeline: Pipeline, dtype: torch.dtype) -> State:
    """LoRA tensors, named as peft names them within the transformer: blocks.0.attn1.to_q.lora_A.weight."""
    state = get_peft_model_state_dict(pipeline.generator.transformer, adapter_name="default")
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}


def merged_state(pipeline: Pipeline, dtype: torch.dtype) -> State:
    """The transformer's tensors with its adapter, if it has one, added to the weights."""
    transformer = pipeline.generator.transformer
    found = transformer.state_dict()
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in found.items() if ".lora_" not in name}
    if (peft := getattr(transformer, "peft_config", None)) is not None:
        config, halves = peft["default"], get_peft_model_state_dict(transformer, adapter_name="default")
        modules = {name.removesuffix(".lora_A.weight") for name in halves if name.endswith(".lora_A.weight")}
        merge(state, {m: (halves[f"{m}.lora_A.weight"], halves[f"{m}.lora_B.weight"]) for m in modules}, config.lora_alpha / config.r, "the run's adapter")
    return {name: tensor.detach().to(torch.float32 if keeps_float32(name) else dtype).contiguous() for name, tensor in state.items()}


def write_pipeline(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    source = Path(pipeline.folder)
    save_transformer(arguments(pipeline.generator.transformer.config), merged_state(pipeline, dtype), folder)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        link_tree(source / part, folder / part)
    for name in ("model_index.json", "streaming.json"):
        shutil.copy2(source / name, folder / name)


def write_diffusers_lora(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=_adapter(pipeline, dtype))


def write_peft(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    pipeline.generator.transformer.peft_config["default"].save_pretrained(folder)
    save_file({f"base_model.model.{name}": tensor for name, tensor in _adapter(pipeline, dtype).items()}, folder / "adapter_model.safetensors")


def write_original_lora(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    state = diffusers_to_original(_adapter(pipeline, dtype))
    torch.save({"generator_lora": {f"base_model.model.{name}": tensor for name, tensor in state.items()}}, folder / "lora.pt")


def write_original_merged(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    state = diffusers_to_original(merged_state(pipeline, dtype))
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "generator.pt")


ADAPTER_FORMATS = ("diffusers-lora", "peft", "original-lora")
WRITERS: Mapping[str, Callable[[Path, Pipeline, torch.dtype], None]] = {
    "pipeline": write_pipeline,
    "diffusers-lora": write_diffusers_lora,
    "peft": write_peft,
    "original-lora": write_original_lora,
    "original-merged": write_original_merged,
}


def _card(format: str, label: str, base: str) -> str:
    return f"""# {label}

Written by `kvpo export --format {format}` (kvpo {version("kvpo")}) from the run's weights {label}; the run started from `{base}`, whose licence governs these weights.
An adapter acts at scale 1 (alpha = rank).
"""
