"""Scales that LoRA files state: in a header, in PEFT's config, in the notes of kohya's trainers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpo.common.text_files import read_text
from kvpo.convert.weight_files import ADAPTER_CONFIG, WeightFiles

HEADER = "lora_adapter_metadata"
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


def of_header(found: WeightFiles) -> Stated | None:
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


def of_trainer(found: WeightFiles) -> list[Stated]:
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


def of_config(found: WeightFiles) -> Stated | None:
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
