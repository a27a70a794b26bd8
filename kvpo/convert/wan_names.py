"""Released checkpoints, read without unpickling anything, and renamed.

Names become diffusers' and go back, with every tensor accounted for.

    self_forcing_dmd.pt           {"generator": state, "generator_ema": state}
    longlive_base.pt, base.pt     {"generator": state}
    lora.pt                       {"generator_lora": adapter}, or the bare adapter of peft

States have the original Wan's names under `model.` and whatever prefixes training wrappers have
left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from kvpo.common.weights import State

GENERATORS = ("generator", "generator_ema", "model")
JOINED = (*GENERATORS[:2], "generator_lora")
"""Keys of whole models; a name that begins with one of them and a dot is inside it."""
OF_TRAINERS = ("state_dict", "module", "model_state_dict")
"""Keys under which Lightning, DeepSpeed and many scripts save a model, tried after the family's."""
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = (
    "module.",
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "pipe.",
    "dit.",
    "net.",
    "unet.",
)
"""Prefixes that are taken off as often as they stand at the front.

They are DDP's, PEFT's, the trainers' own, ComfyUI's, diffusers', and those of trainers that save a
whole pipeline.
"""
DIFFUSERS_PARTS = (
    ".attn1.",
    ".attn2.",
    "condition_embedder.",
    "scale_shift_table",
    "proj_out.",
    ".ffn.net.",
)
"""Parts of names that only diffusers gives."""
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


def generator_state(
    content: Mapping[str, Any], path: Path, prefer: tuple[str, ...] = GENERATORS
) -> tuple[State, str]:
    """The generator's tensors with diffusers' names, and their key in the file.

    The key is "" where they lay at its top. ``prefer``: keys in order. Raises ValueError where the
    file holds no generator.
    """
    content = unfolded(content)
    nested = [key for key in prefer if isinstance(content.get(key), Mapping)]
    state = dict(content[nested[0]]) if nested else dict(content)
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange or not state:
        raise ValueError(
            f"{path} holds no generator: none of {', '.join(prefer)} is in it, and its top holds {sorted(map(str, content))[:8]}; give the checkpoint of a generator"
        )
    return original_to_diffusers(state), nested[0] if nested else ""


def unfolded(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its generators apart, where a format without levels has joined the names.

    ``generator.X`` and ``generator_ema.X`` become {"generator": {X: ...}, "generator_ema": ...}.
    """
    found: dict[str, Any] = {}
    for name, value in content.items():
        key, _, rest = name.partition(".")
        if rest and key in JOINED:
            found.setdefault(key, {})[rest] = value
        else:
            found[name] = value
    return found


def original_to_diffusers(state: Mapping[str, torch.Tensor]) -> State:
    """Rename original names, with training wrappers' prefixes, to diffusers' own.

    Returns the state dict of a `WanTransformer3DModel`, or of its LoRA.

    Names that are diffusers' own already stay: the converter would swap their second and third
    norms.
    """
    bare = {bare_name(name): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        taken = {bare_name(name): name for name in state}
        first = next(name for name in state if taken[bare_name(name)] != name)
        raise ValueError(
            f"{first} and {taken[bare_name(first)]} are two tensors of one name, so one of two "
            "models would be lost; save the one that is meant alone"
        )
    if any(part in name for name in bare for part in DIFFUSERS_PARTS):
        return bare
    return convert_wan_transformer_to_diffusers(bare)


def diffusers_to_original(state: Mapping[str, torch.Tensor]) -> State:
    """The inverse of `original_to_diffusers`, without any prefix."""
    return {_original(name): tensor for name, tensor in state.items()}


def bare_name(name: str) -> str:
    """A tensor's or module's name without what wrappers and trainers have put before it."""
    for part in WRAPPERS:
        name = name.replace(part, "")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _original(name: str) -> str:
    name = (
        "head.modulation"
        if name == "scale_shift_table"
        else name.replace("scale_shift_table", "modulation")
    )
    for old, new in reversed(RENAMED):
        name = name.replace(new, old)
    return name


def keeps_float32(name: str) -> bool:
    """Whether diffusers holds this tensor in float32 whatever the model's dtype.

    It does so with time embedding, modulation, norms.
    """
    return any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules)
