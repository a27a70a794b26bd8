"""Names in LoRA files: which module a tensor belongs to, and which part of its LoRA it is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from kvpo.common.weights import State
from kvpo.convert.wan_names import bare_name, original_to_diffusers

HALF = re.compile(
    r"(?P<module>.+?)\.lora(?:_|\.)(?P<half>A|B|down|up)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?\.(?P<kind>weight|bias)$"
)
KOHYA = re.compile(r"lora_(?:unet|transformer)_(?P<flat>.+)$")
FLAT = (
    (r"blocks_(\d+)_(self_attn|cross_attn)_(q|k|v|o|k_img|v_img)", r"blocks.\1.\2.\3"),
    (r"blocks_(\d+)_ffn_(0|2)", r"blocks.\1.ffn.\2"),
    (r"blocks_(\d+)_(attn1|attn2)_(to_q|to_k|to_v|add_k_proj|add_v_proj)", r"blocks.\1.\2.\3"),
    (r"blocks_(\d+)_(attn1|attn2)_to_out_0", r"blocks.\1.\2.to_out.0"),
    (r"blocks_(\d+)_ffn_net_0_proj", r"blocks.\1.ffn.net.0.proj"),
    (r"blocks_(\d+)_ffn_net_2", r"blocks.\1.ffn.net.2"),
    (r"(time_embedding|text_embedding|time_projection)_(\d)", r"\1.\2"),
    (r"head_head", r"head.head"),
    (r"proj_out", r"proj_out"),
    (r"condition_embedder_time_proj", r"condition_embedder.time_proj"),
    (
        r"condition_embedder_(time|text)_embedder_linear_(1|2)",
        r"condition_embedder.\1_embedder.linear_\2",
    ),
)
"""Pattern of a name in kohya's style -> the module's name.

kohya's trainers write every dot of a module's name as an underscore; which ones were dots is known
of Wan's modules.
"""
OTHER_KINDS = {
    "dora_scale": "a DoRA, which also rescales the rows of a weight",
    "lora_magnitude_vector": "a DoRA, which also rescales the rows of a weight",
    "lokr_": "a LoKr, of Kronecker products",
    "hada_": "a LoHa, of Hadamard products",
    "oft_": "an OFT, of rotations",
    "lora_mid": "a LoCon with a third factor",
    "lora_embedding_": "a LoRA of an embedding table",
}


def of_an_adapter(name: str) -> bool:
    """Whether a tensor's name is one that a LoRA, or a kin of it, has and a generator has not."""
    return bool(
        HALF.match(name) or KOHYA.match(name) or any(f".{kind}" in name for kind in OTHER_KINDS)
    )


def parts_of_modules(state: State, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module as the file names it, without prefixes -> its parts: A, B, B.bias, alpha, diff_b."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    adapters, strange, twice = set(), [], ""
    for full, tensor in state.items():
        if kind := next(
            (
                what
                for mark, what in OTHER_KINDS.items()
                if f".{mark}" in full or full.endswith(mark)
            ),
            None,
        ):
            raise ValueError(
                f"{path} is {kind} ({full}); only plain LoRAs can be read. Merge it where it was "
                "trained, and import the merged weights"
            )
        if (module_part := _part(full)) is None:
            strange.append(full)
            continue
        module, part, adapter = module_part
        adapters.add(adapter)
        parts = modules.setdefault(_module_name(module, path), {})
        twice = twice or (module if part in parts else "")
        parts[part] = tensor
    if len(adapters - {None}) > 1:
        raise ValueError(
            f"{path} holds {len(adapters - {None})} adapters, "
            f"{', '.join(sorted(a for a in adapters if a))}; save the one that is meant alone"
        )
    if twice:
        raise ValueError(two_of(path, twice))
    for full in strange:
        if not (full.endswith((".diff", ".diff_b")) and not state[full].any()):
            raise ValueError(
                f"{path} holds {full}, which is no half of a LoRA, and only plain LoRAs can be read; "
                "merge it where it was trained, and import the merged weights"
            )
    return {
        m: parts
        for m, parts in modules.items()
        if set(parts) != {"diff_b"} or parts["diff_b"].any()
    }


def two_of(path: Path, module: str) -> str:
    """Words of the error where a file names a module twice."""
    return f"{path} holds two LoRAs of {module}, under different names; give each a file of its own"


def _part(full: str) -> tuple[str, str, str | None] | None:
    """(module, which part of its LoRA, name of the adapter); None for what is no part of one."""
    if match := HALF.match(full):
        half = {"down": "A", "up": "B"}.get(match["half"], match["half"])
        return (
            match["module"],
            half if match["kind"] == "weight" else f"{half}.bias",
            match["adapter"],
        )
    for part in ("alpha", "diff_b"):
        if full.endswith(f".{part}"):
            return (full.removesuffix(f".{part}"), part, None)
    return None


def _module_name(module: str, path: Path) -> str:
    """Name of a module without prefixes, and with its dots.

    Raises ValueError for a name of kohya's trainers that is no module of Wan's transformer.
    """
    module = bare_name(module)
    if (kohya := KOHYA.match(module)) is None:
        return module
    for pattern, dotted in FLAT:
        if re.fullmatch(pattern, kohya["flat"]):
            return re.sub(pattern, dotted, kohya["flat"])
    raise ValueError(
        f"{path} holds {module}, a name of kohya's trainers that is no module of Wan's "
        "transformer; give the base it was trained on"
    )


def diffusers_name(module: str) -> str:
    """Name of a module as diffusers has it; a name of the original Wan is translated."""
    (name,) = original_to_diffusers({f"{module}.weight": torch.empty(0)})
    return name.removesuffix(".weight")
