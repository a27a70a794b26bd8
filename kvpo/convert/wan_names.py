"""Released checkpoints: read without unpickling anything, renamed to diffusers' names and back, every tensor accounted for.

    self_forcing_dmd.pt           {"generator": state, "generator_ema": state}
    longlive_base.pt, base.pt     {"generator": state}
    lora.pt                       {"generator_lora": adapter}, or the bare adapter of peft

States have the original Wan's names under `model.` and whatever prefixes training wrappers have left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from kvpo.common.weights import State, read_checkpoint
from kvpo.generators.pipeline import Pipeline

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module -> (A [r, in], B [out, r]): the module's weight W acts as W + scale * B A."""

GENERATORS = ("generator", "generator_ema", "model")
ADAPTERS = ("generator_lora",)
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("base_model.model.", "model.", "transformer.")
RENAMED = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm2", "norm#"),  # the two swap: original norm2 is norm3 in diffusers
    ("norm3", "norm2"),
    ("norm#", "norm3"),
)
"""Original part, part in diffusers.  Only for the way back; the way in is diffusers' own."""


def is_adapter(content: Mapping[str, Any]) -> bool:
    return any(isinstance(content.get(key), Mapping) for key in ADAPTERS) or any(".lora_A." in name for name in content)


def generator_state(content: Mapping[str, Any], path: Path, prefer: tuple[str, ...] = GENERATORS) -> tuple[State, str]:
    """The generator's tensors with diffusers' names, and where in the file they lay ("" = at its top).  ``prefer``: keys in order."""
    nested = [key for key in prefer if isinstance(content.get(key), Mapping)]
    state = dict(content[nested[0]]) if nested else dict(content)
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange or not state:
        raise ValueError(f"{path} holds no generator: none of {', '.join(prefer)} is in it, and its top holds {sorted(map(str, content))[:8]}")
    return original_to_diffusers(state), nested[0] if nested else ""


def original_to_diffusers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of a `WanTransformer3DModel`, or of its LoRA, from one with original names and training wrappers' prefixes."""
    return convert_wan_transformer_to_diffusers({_bare(name): tensor for name, tensor in state.items()})


def diffusers_to_original(state: Mapping[str, torch.Tensor]) -> State:
    """The inverse of `original_to_diffusers`, without any prefix."""
    return {_original(name): tensor for name, tensor in state.items()}


def _bare(name: str) -> str:
    for part in WRAPPERS:
        name = name.replace(part, "")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _original(name: str) -> str:
    name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
    for old, new in reversed(RENAMED):
        name = name.replace(new, old)
    return name


def adapter_of(content: Mapping[str, Any], path: Path) -> Adapter:
    """The LoRA of a file, modules named as in diffusers.  ValueError for halves without their other, and for ranks that differ."""
    state = next((content[key] for key in ADAPTERS if isinstance(content.get(key), Mapping)), content)
    state = original_to_diffusers({name.replace(".default.", "."): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)})
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        module, _, half = name.rpartition(".lora_")
        if not module or half not in ("A.weight", "B.weight"):
            raise ValueError(f"{path} holds {name}, which is no half of a LoRA; only plain LoRA adapters can be read")
        halves.setdefault(module, {})[half[0]] = tensor
    for module, pair in halves.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{path}: the LoRA of {module} has {({half: list(t.shape) for half, t in pair.items()})}; A [r, in] and B [out, r] must share their rank r")
    if len(ranks := {len(pair["A"]) for pair in halves.values()}) != 1:
        raise ValueError(f"{path} holds LoRA modules of ranks {sorted(ranks)}; one rank is expected, because the scale alpha / rank is not in the file")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def merge(state: State, adapter: Adapter, scale: float, source: str) -> None:
    """Add the adapter to the weights it belongs to; those become float32, so that nothing of it is rounded away yet.  ValueError where it is of another base."""
    wrong = [m for m, (A, B) in adapter.items() if f"{m}.weight" not in state or state[f"{m}.weight"].shape != (len(B), A.shape[1])]
    if wrong:
        raise ValueError(f"{source} is the LoRA of another base: {len(wrong)} of its {len(adapter)} modules do not fit, first {wrong[0]}; give the base it was trained on")
    for module, (A, B) in adapter.items():
        state[f"{module}.weight"] = state[f"{module}.weight"].float() + scale * (B.float() @ A.float())


def keeps_float32(name: str) -> bool:
    """Tensors that diffusers holds in float32 whatever the model's dtype: time embedding, modulation, norms."""
    return any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules)


@torch.no_grad()
def add_lora(pipeline: Pipeline, path: Path, scale: float) -> None:
    """Merge a LoRA file into the generator's weights.  ValueError where it is of another base."""
    parameters = dict(pipeline.generator.transformer.named_parameters())
    adapter, state = adapter_of(read_checkpoint(path), path), dict(parameters)
    merge(state, adapter, scale, str(path))
    for module in adapter:
        parameters[f"{module}.weight"].copy_(state[f"{module}.weight"])
