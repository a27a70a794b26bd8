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

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvpo.common.finite import check_finite
from kvpo.common.text_files import read_text
from kvpo.common.weights import State
from kvpo.convert.wan_names import bare_name, original_to_diffusers, unfolded
from kvpo.convert.weight_files import ADAPTER_CONFIG, WeightFiles, find_weights
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
HEADER = "lora_adapter_metadata"
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
CHANGES_ITS_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts of `init_lora_weights` under which an adapter's halves alone are not the change.

PEFT then subtracts the adapter's start from the base.
"""


@dataclass(frozen=True)
class Stated:
    """alpha and rank as a header or an adapter_config.json states them, with PEFT's meaning."""

    source: str
    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False

    def scale(self, names: Sequence[str], found: int) -> float:
        """Scale of a module, known by any of ``names``, whose halves have rank ``found``.

        ValueError where another rank is stated.
        """
        rank = _by_pattern(self.rank_pattern, names, self.rank)
        if rank is not None and int(rank) != found:
            raise ValueError(
                f"{self.source} states rank {rank} for {names[0]}, but its tensors have rank "
                f"{found}; give both of one adapter"
            )
        alpha = float(_by_pattern(self.alpha_pattern, names, self.alpha))
        return alpha / (math.sqrt(found) if self.stabilised else found)


def is_adapter(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a LoRA, or a kin of it, rather than a generator."""
    if any(isinstance(content.get(key), Mapping) for key in NESTED):
        return True
    return any(
        HALF.match(name) or KOHYA.match(name) or any(f".{kind}" in name for kind in OTHER_KINDS)
        for name in content
    )


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
    stated = [s for s in (_of_header(found), _of_config(found)) if s is not None]
    if not stated and not any(name.endswith(".alpha") for name in content):
        stated = _of_trainer(found)
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
    modules = _collected(state, path)
    if not modules:
        raise ValueError(
            f"{path} holds no LoRA: no lora_A and lora_B, or lora_down and lora_up, are among its "
            f"{len(state)} tensors; give the file of a LoRA"
        )
    adapter: Adapter = {}
    for name, parts in modules.items():
        module = _diffusers_name(name)
        if module in adapter:
            raise ValueError(_two_of(path, module))
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


# --- Names ---


def _collected(state: State, path: Path) -> dict[str, dict[str, torch.Tensor]]:
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
        raise ValueError(_two_of(path, twice))
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


def _two_of(path: Path, module: str) -> str:
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


def _diffusers_name(module: str) -> str:
    (name,) = original_to_diffusers({f"{module}.weight": torch.empty(0)})
    return name.removesuffix(".weight")


# --- Scales ---


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


def _of_header(found: WeightFiles) -> Stated | None:
    """Read what diffusers has written into the file's header; None if there is nothing.

    It is a PEFT config, its keys prefixed by the component.
    """
    if (text := found.header().get(HEADER)) is None:
        return None
    source = f"{HEADER} in the header of {found.files[0].name}"
    try:
        config = json.loads(text)
    except ValueError:
        raise ValueError(f"{found.path}: {source} is not JSON; save the adapter again") from None
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{found.path}: {source} holds a {type(config).__name__}, not named settings; save the adapter again"
        )
    own = {
        key.removeprefix("transformer."): value
        for key, value in config.items()
        if key.startswith("transformer.")
    }
    return _stated(own or {k: v for k, v in config.items() if "." not in k}, source, found.path)


def _of_trainer(found: WeightFiles) -> list[Stated]:
    """Read alpha from the notes of kohya's trainers in a header, where no alpha tensor says it.

    The tensors come first where they are there: single blocks may have been trained at another one.
    """
    alpha = found.header().get("ss_network_alpha", "None")
    if alpha == "None":
        return []
    try:
        return [Stated("ss_network_alpha", None, float(alpha))]
    except ValueError:
        raise ValueError(
            f"{found.path}: ss_network_alpha in its header is {alpha!r}; it must be a number"
        ) from None


def _of_config(found: WeightFiles) -> Stated | None:
    """Read what PEFT has written beside the file; None if there is nothing."""
    if found.config is None:
        return None
    try:
        config = json.loads(read_text(found.config))
    except ValueError as error:
        raise ValueError(f"{found.config} is not JSON ({error}); copy it again") from None
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{found.config} holds a {type(config).__name__}, not named settings; save the adapter again"
        )
    return _stated(config, ADAPTER_CONFIG, found.path)


def _stated(config: Mapping[str, Any], source: str, path: Path) -> Stated | None:
    """Read alpha and rank from an adapter's config; None if it is empty.

    Raises ValueError for settings under which the halves alone are not the whole change.
    """
    if not config:
        return None
    if (kind := str(config.get("peft_type") or "LORA").rpartition(".")[2]) != "LORA":
        raise ValueError(
            f"{path}: {source} describes a {kind}; only plain LoRAs can be read. Merge it where it "
            "was trained, and import the merged weights"
        )
    start = config.get("init_lora_weights")
    faults = {
        "use_dora": bool(config.get("use_dora")),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        f"init_lora_weights {start}": isinstance(start, str)
        and start.lower().startswith(CHANGES_ITS_BASE),
    }
    if bad := [name for name, wrong in faults.items() if wrong]:
        raise ValueError(
            f"{path}: {source} sets {', '.join(bad)}, so its halves alone are not its change; "
            "merge it where it was trained, and import the merged weights"
        )
    if "lora_alpha" not in config:
        raise ValueError(
            f"{path}: {source} states no lora_alpha, and without it the scale is a guess; write "
            "the one it was trained with"
        )
    try:
        rank = None if config.get("r") is None else int(config["r"])
        ranks, alphas = (dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
        return Stated(
            source, rank, float(config["lora_alpha"]), ranks, alphas, bool(config.get("use_rslora"))
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: {source} states r = {config.get('r')!r} and lora_alpha = "
            f"{config['lora_alpha']!r}; both must be numbers"
        ) from None


def _by_pattern(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that a name ends in, as PEFT matches them."""
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default


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
