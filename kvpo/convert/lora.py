"""LoRA files of every common form, each module with its own scale.

    W + strength * alpha / rank * B A

    modules   blocks.0.attn1.to_q (diffusers), blocks.0.self_attn.q (Wan),
              lora_unet_blocks_0_self_attn_q (kohya), under whatever prefixes: transformer.
              diffusion_model. base_model.model. module. model.
    halves    lora_A / lora_B, lora_down / lora_up, with or without an adapter's name:
              lora_A.default.weight
    scale     X.alpha beside the halves; `lora_adapter_metadata` in a safetensors header, as
              diffusers writes it; adapter_config.json of PEFT; `ss_network_alpha` of kohya's
              trainers, where nothing else says it.  Nothing said means alpha = rank, as diffusers
              and ComfyUI take it

What is stored in two places must agree.  ``strength`` is the user's and multiplies, as in
diffusers and ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvpo.common.finite import check_finite
from kvpo.common.weights import State
from kvpo.convert.lora_names import diffusers_name, of_an_adapter, parts_of_modules, two_of
from kvpo.convert.lora_scales import Stated, of_config, of_header, of_trainer
from kvpo.convert.wan_names import unfolded
from kvpo.convert.weight_files import WeightFiles, find_weights
from kvpo.generators.pipeline import Pipeline


class LowRank(NamedTuple):
    """Low-rank change of one module's weight W: W + scale * B A."""

    A: torch.Tensor
    """[r, in]"""
    B: torch.Tensor
    """[out, r]"""
    scale: float = 1.0
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised ones."""
    bias: torch.Tensor | None = None
    """[out], added to the module's bias, its own scale included."""


Adapter = dict[str, LowRank]
"""Module, named as diffusers names it -> its LoRA."""

NESTED = ("generator_lora",)


def is_adapter(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a LoRA, or a kin of it, rather than a generator."""
    if any(isinstance(content.get(key), Mapping) for key in NESTED):
        return True
    return any(of_an_adapter(name) for name in content)


def read_lora(path: Path) -> Adapter:
    """The LoRA in a file or folder.

    FileNotFoundError, PermissionError, or ValueError that says what is in it instead.
    """
    found = find_weights(path)
    return adapter_in(found, found.read())


def adapter_in(found: WeightFiles, content: Mapping[str, Any]) -> Adapter:
    """The LoRA of files that are read already.

    It minds what their header and their adapter_config.json say.
    """
    stated = [s for s in (of_header(found), of_config(found)) if s is not None]
    if not stated and not any(name.endswith(".alpha") for name in content):
        stated = of_trainer(found)
    return adapter_of(content, found.path, stated)


def adapter_of(content: Mapping[str, Any], path: Path, stated: Iterable[Stated] = ()) -> Adapter:
    """The LoRA of a file's content.

    ValueError for halves without their other, for scales that contradict each other, and for what
    is no LoRA.
    """
    content = unfolded(content)
    nested = next(
        (content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content
    )
    state = {name: tensor for name, tensor in nested.items() if isinstance(tensor, torch.Tensor)}
    modules = parts_of_modules(state, path)
    if not modules:
        raise ValueError(
            f"{path} holds no LoRA: no lora_A and lora_B, or lora_down and lora_up, are among its "
            f"{len(state)} tensors; give the file of a LoRA"
        )
    adapter: Adapter = {}
    for name, parts in modules.items():
        module = diffusers_name(name)
        if module in adapter:
            raise ValueError(two_of(path, module))
        adapter[module] = _low_rank(path, name, module, parts, stated)
    return adapter


def merge(
    state: State, adapter: Mapping[str, LowRank | tuple], strength: float, source: str
) -> None:
    """Add the adapter to the weights it belongs to.

    They become float32, so that nothing of it is rounded away yet. Raises ValueError where it is of
    another base.
    """
    if not math.isfinite(strength):
        raise ValueError(
            f"a LoRA's strength of {strength} is no number to multiply by; give --lora-scale 1 for "
            "the LoRA as it was trained"
        )
    lows = {module: LowRank(*low) for module, low in adapter.items()}
    wrong = [m for m, low in lows.items() if not _fits(state, m, low)]
    if wrong:
        raise ValueError(
            f"{source} is the LoRA of another base: {len(wrong)} of its {len(lows)} modules do not "
            f"fit, first {wrong[0]}; give the base it was trained on"
        )
    for module, (A, B, scale, bias) in lows.items():
        weight = state[f"{module}.weight"]
        state[f"{module}.weight"] = weight.float() + strength * scale * (
            B.to(weight.device).float() @ A.to(weight.device).float()
        )
        if bias is not None:
            state[f"{module}.bias"] = (
                state[f"{module}.bias"].float() + strength * bias.to(weight.device).float()
            )


def described(adapter: Adapter, strength: float) -> str:
    """Describe the adapter in one line: rank, modules, and the scale at which it acts."""
    ranks = sorted({len(low.A) for low in adapter.values()})
    scales = sorted({low.scale for low in adapter.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    own = f"{scales[0]:.6g}" if len(scales) == 1 else f"{scales[0]:.6g} to {scales[-1]:.6g}"
    scale = f"its own alpha / rank {own}, times --lora-scale {strength:g}"
    return f"LoRA of rank {rank} on {len(adapter)} modules, {scale}"


def _low_rank(
    path: Path, name: str, module: str, parts: Mapping[str, torch.Tensor], stated: Iterable[Stated]
) -> LowRank:
    A, B, alpha = parts.get("A"), parts.get("B"), parts.get("alpha")
    if A is None or B is None or A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
        raise ValueError(
            f"{path}: the LoRA of {module} has "
            f"{ ({part: list(t.shape) for part, t in parts.items()}) }; A [r, in] and B [out, r] "
            "must share their rank r"
        )
    scales = {s.source: s.scale((name, module), len(A)) for s in stated}
    if alpha is not None:
        scales[f"{name}.alpha"] = float(alpha) / len(A)
    if any(not math.isfinite(scale) for scale in scales.values()):
        raise ValueError(
            f"{path}: alpha / rank of {module} is "
            f"{', '.join(f'{v:g} by {k}' for k, v in scales.items())}; it must be a finite number"
        )
    if scales and max(scales.values()) - min(scales.values()) > 1e-6 * max(
        map(abs, scales.values())
    ):
        said = " and ".join(f"{scale:g} by {source}" for source, scale in scales.items())
        raise ValueError(
            f"{path}: the scale alpha / rank of {module} is {said}; they contradict each other, so "
            "nothing was merged. Correct the one that is wrong"
        )
    scale = next(iter(scales.values()), 1.0)
    bias = scale * parts["B.bias"].float() if "B.bias" in parts else parts.get("diff_b")
    return LowRank(A, B, scale, bias)


def _fits(state: State, module: str, low: LowRank) -> bool:
    weight, bias = state.get(f"{module}.weight"), state.get(f"{module}.bias")
    if weight is None or weight.shape != (len(low.B), low.A.shape[1]):
        return False
    return low.bias is None or (bias is not None and bias.shape == low.bias.shape)


@torch.no_grad()
def add_lora(pipeline: Pipeline, path: Path, strength: float) -> str:
    """Merge a LoRA into the generator's weights; returns one line that says what it is.

    Raises ValueError where it is of another base.
    """
    # A run's own adapter lies beside the weights: theirs are then named base_layer.
    parameters = {
        name.replace(".base_layer.", "."): p
        for name, p in pipeline.generator.transformer.named_parameters()
    }
    adapter, state = read_lora(path), dict(parameters)
    check_finite(
        ((f"{m}.{half}", t) for m, low in adapter.items() for half, t in zip("AB", low)),
        str(path),
        "its training went wrong, or the file was damaged: copy it again, or give another one",
    )
    merge(state, adapter, strength, str(path))
    for name, merged in state.items():
        if merged is not parameters[name]:
            parameters[name].copy_(merged)
    return described(adapter, strength)
