"""Released checkpoints (original Wan names) -> diffusers names."""

from __future__ import annotations

from typing import Mapping

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("base_model.model.", "model.")


def original_to_diffusers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a `WanTransformer3DModel`, or of its LoRA, from one with original names and training wrappers' prefixes."""
    return convert_wan_transformer_to_diffusers({_bare(name): tensor for name, tensor in state.items()})


def _bare(name: str) -> str:
    for part in WRAPPERS:
        name = name.replace(part, "")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
