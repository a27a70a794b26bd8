"""The weights of a run that another run starts from, kept in the folder of the one that starts.

    RUN/start.safetensors    the transformer's tensors, adapter merged; in the header where they came from

The run they came from may train on, move or be deleted: what has started from it is resumed,
evaluated and exported by its own copy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvpo.common.access import check_readable
from kvpo.common.files import beside, first_line, open_to_readers
from kvpo.common.finite import check_finite
from kvpo.common.weights import account
from kvpo.generators.pipeline import Pipeline
from kvpo.policy.adapters import Adapters
from kvpo.policy.policy import Policy

FILE = "start.safetensors"
HEADER = "kvpo"
"""Key of the header's metadata that holds an `Origin`."""


@dataclass(frozen=True)
class Origin:
    """The origin of a run's start weights."""

    weights: str
    """As they were asked for, such as runs/a:ema."""
    checkpoint: str
    """Name of the checkpoint that held them, such as step-000030."""
    pipeline: str
    """Pipeline folder that has everything but the transformer; `mini` is one, too."""
    families: tuple[str, ...]
    """Families of the rewards that they were trained on, in all rounds."""


def keep_start(path: Path, pipeline: Pipeline, origin: Origin) -> None:
    """Write a generator's weights as they are now, without an adapter that is on them.

    OSError with the way out where the disk refuses; nothing half-written remains.
    """
    # by its parameters: the state_dict of sharded weights is of this rank's parts
    state = {
        name.replace(".base_layer.", "."): p.detach().cpu().contiguous()
        for name, p in pipeline.generator.transformer.named_parameters()
        if ".lora_" not in name
    }
    header = {"format": "pt", HEADER: json.dumps(asdict(origin))}
    with beside(path, "free disk space, or choose another disk by --out") as part:
        save_file(state, part, metadata=header)
        open_to_readers(part)
        part.replace(path)


def origin_of(path: Path) -> Origin:
    """The origin of kept weights.  PermissionError or ValueError where that can not be read."""
    check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[HEADER])
        return Origin(**content | {"families": tuple(content["families"])})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, error) from None


def put_kept(pipeline: Pipeline, path: Path) -> None:
    """Put kept weights in the place of the transformer's.

    Raises PermissionError, ValueError or FloatingPointError, which name the file, where it may not
    be read, is broken or of another transformer, or holds numbers that are not finite.
    """
    check_readable(path)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _broken(path, error) from None
    transformer = pipeline.generator.transformer
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    account(state, shapes, str(path), pipeline.folder)
    check_finite(state.items(), str(path), "copy it back, or start a new run by --out")
    transformer.load_state_dict(state)


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}, the weights that its run started from, is broken ({type(error).__name__}: {first_line(error)}); copy it back, or start a new run by --out"
    )


@torch.no_grad()
def merge_adapter(policy: Policy) -> float:
    """Add a policy's adapter to the weights below it and take it away.

    Returns how much of what it adds is lost because sums are rounded to the weights' precision: the
    norm of the lost part, over that of the whole.
    """
    adapters = Adapters(policy.model.transformer, policy.names)
    lost = added = 0.0
    for base, whole, exact in zip(
        adapters.bases, adapters.merged(policy.parameters), adapters.added(policy.parameters)
    ):
        reached = whole.float() - base.float()
        lost += float((reached - exact).square().sum())
        added += float(exact.square().sum())
        base.data.copy_(whole)
    policy.model.transformer.unload_lora()
    return (lost / added) ** 0.5 if added else 0.0
