"""Stage 8: save and resume everything a run needs to go on as if it had never stopped.

    checkpoints/step-000010/  tensors.safetensors   current, behaviour, EMA, reference weights, optimizer moments
                              shard-*.safetensors   instead of it, one a rank, where weights are sharded
                              state.json            counters, the config and versions they belong to, the names and digests of the files
    checkpoints/ema.safetensors                     the newest averaged weights by diffusers' names, for use elsewhere (not where sharded, nor an adapter on weights of another run: `kvpo export`)

A checkpoint is written beside its final place and renamed: it is there completely or not at all.
Shards are written by torch.distributed.checkpoint in its safetensors format, because its own one is
an index in pickle. A single whole file is a valid case of that format: one reader serves both, and
any number of ranks. `kvpo.policy.saving` writes while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from kvpo.common.access import check_readable
from kvpo.common.environment import packages
from kvpo.common.files import open_to_readers
from kvpo.distributed.ranks import Lost, Ranks
from kvpo.policy.policy import Policy

SETS = ("current", "behaviour", "average", "reference")
MOMENTS = ("exp_avg", "exp_avg_sq")
WHOLE, ELSEWHERE = "tensors.safetensors", "ema.safetensors"


class BrokenCheckpoint(ValueError):
    """A file of a checkpoint that is not there, or not whole."""

    def __init__(self, path: Path, error: object):
        fault = self.fault = f"{path} is broken or missing ({error})"
        super().__init__(f"{fault}; delete {path.parent} to go on from the checkpoint before it")


@dataclass(frozen=True)
class Snapshot:
    """Copy of what goes into a checkpoint: training may go on while it is written."""

    state: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    """Tensors in main memory: of sharded weights this rank's parts, else all of them."""
    elsewhere: Mapping[str, torch.Tensor]
    """The averaged weights among the tensors, as diffusers names them.

    They are those of a LoRA file, or the transformer's own. It is empty where weights are sharded,
    because no rank has them whole, and where no folder elsewhere has the backbone of an adapter.
    """
    sharded: bool

    @classmethod
    def of(
        cls,
        step: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        beside: Mapping[str, torch.Tensor] = {},
        elsewhere: bool = True,
    ) -> Snapshot:
        """After ``step`` steps.  ``beside``: other tensors, whole and alike on all ranks.

        ``elsewhere``: the averaged weights are written for use elsewhere, too.
        """
        state = {
            "step": step,
            "updates": policy.updates,
            "lag": policy.lag,
            "optimizer_steps": _optimizer_steps(optimizer),
            "config": config,
            "packages": packages(),
        }
        tensors = BlockingAsyncStager().stage({**_tensors(policy, optimizer), **beside})
        stock = (
            {_stock_name(name): tensors[f"average.{name}"] for name in policy.names}
            if elsewhere and not policy.sharded
            else {}
        )
        return cls(state, tensors, stock, policy.sharded)


def save_checkpoint(
    folder: Path, snapshot: Snapshot, keep: int, best: int = 0, ranks: Ranks = Ranks()
) -> Path:
    """Write a checkpoint whole to ``folder``/step-... and remove old ones; its path.

    The ``keep`` newest stay, and that of step ``best``. ``ranks``: those that write shards, which
    all enter; whole weights are written by one rank.

    OSError with the way out where the disk refuses; nothing is lost then.
    """
    target = at_step(folder, snapshot.state["step"])
    part, beside = folder / f".{target.name}.part", folder / f".{ELSEWHERE}.part"
    try:
        ranks.only_first(lambda: _make_anew(part))
        if snapshot.sharded:
            # of the time before the weights were sharded
            ranks.only_first(lambda: (folder / ELSEWHERE).unlink(missing_ok=True))
            _write_shards(snapshot.tensors, part, ranks)
        else:
            _write_file(snapshot.tensors, part / WHOLE)
            if snapshot.elsewhere:
                _write_file(snapshot.elsewhere, beside)
        ranks.only_first(lambda: _finish(part, target, snapshot.state))
        ranks.only_first(lambda: _put_there(beside, folder / ELSEWHERE))
    except Lost:
        raise
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        beside.unlink(missing_ok=True)
        raise OSError(
            f"checkpoint {target} could not be written ({error}); the ones before it are untouched. Free disk space, then go on with --resume"
        ) from None
    ranks.only_first(lambda: _remove_old(target, keep, at_step(folder, best)))
    return target


def _put_there(part: Path, target: Path) -> None:
    """Give a file its name, where there is one."""
    if part.exists():
        os.replace(part, target)


def _remove_old(target: Path, keep: int, best: Path) -> None:
    for old in _up_to(target)[:-keep]:
        if old != best:
            shutil.rmtree(old)


def at_step(folder: Path, step: int) -> Path:
    """Path of the checkpoint after ``step`` steps, if there is one."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first.

    PermissionError where they may not be looked for: a run would begin anew beside them.
    """
    check_readable(folder)
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def _up_to(target: Path) -> list[Path]:
    """Checkpoints up to ``target``; later ones are leftovers that could not be read on resume."""
    return [found for found in checkpoints(target.parent) if found.name <= target.name]


def newest_whole(found: Sequence[Path], say: Callable[[str], None]) -> Path:
    """The newest checkpoint that is whole; broken ones after it are named to ``say``.

    ValueError where there is none, PermissionError where one may not be read.
    """
    for checkpoint in reversed(found):
        for name in ("", "state.json", *(p.name for p in checkpoint.glob("*.safetensors"))):
            # one that may not be read is not broken: no older one is taken in its place
            check_readable(checkpoint / name)
        try:
            _shapes(checkpoint)
            _refuse_changed(checkpoint)
            return checkpoint
        except BrokenCheckpoint as error:
            say(f"{error.fault}: looking at the checkpoint before it")
    raise ValueError(
        f"none of the checkpoints in {found[0].parent} can be read; start a new run by --out"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    check_readable(path)
    try:
        state = json.loads(path.read_text())
        missing = [
            key
            for key in ("step", "updates", "lag", "optimizer_steps", "config")
            if key not in state
        ]
        if missing:
            raise ValueError(f"it has no {missing}; copy the checkpoint again")
    except (OSError, ValueError, TypeError) as error:
        raise BrokenCheckpoint(path, error) from None
    return state


def load_checkpoint(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Put everything back from a checkpoint; the step to go on with.

    All ranks enter, whichever ranks have written it.

    ValueError naming the file where it is broken, or the checkpoint where it is of another policy.
    """
    with policy.layout.ranks.together():
        state = _put_back(checkpoint, policy, optimizer)
    policy.layout.refresh()
    policy.updates, policy.lag = state["updates"], state["lag"]
    return state["step"]


def read_tensors(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of those whose names begin with ``prefix``."""
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in _shapes(checkpoint).items()
        if name.startswith(prefix)
    }
    _read(checkpoint, tensors)
    return tensors


def _put_back(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state, found = read_state(checkpoint), _shapes(checkpoint)
    wanted = _sets(policy)
    wrong = [name for name, w in wanted.items() if name not in found or found[name].size != w.shape]
    if wrong:
        raise ValueError(
            f"{checkpoint} belongs to another policy: {len(wrong)} of its tensors are missing or misshapen, first {wrong[0]}; resume with the run's own config"
        )
    moments = {m: [torch.empty_like(p) for p in policy.parameters] for m in MOMENTS}
    moved = [f"{MOMENTS[0]}.{name}" in found for name in policy.names]
    for m, values in moments.items():
        wanted |= {
            f"{m}.{name}": w
            for name, w, has in zip(policy.names, policy.layout.described(values), moved)
            if has
        }
    _read(checkpoint, wanted)
    for i, (p, has) in enumerate(zip(policy.parameters, moved)):
        if has:
            optimizer.state[p] = {
                "step": torch.tensor(float(state["optimizer_steps"])),
                **{m: values[i].detach() for m, values in moments.items()},
            }
    return state


def _shapes(checkpoint: Path) -> dict[str, Any]:
    """Name -> metadata of all that is in it, after a look at the header of every file."""
    for name in read_state(checkpoint).get("files", [WHOLE]):
        check_readable(checkpoint / name)
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise BrokenCheckpoint(checkpoint / name, error) from None
    return HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata


def _refuse_changed(checkpoint: Path) -> None:
    """Headers can be whole where what follows is not.  Checkpoints of before have no digests."""
    for name, digest in read_state(checkpoint).get("digests", {}).items():
        try:
            found = _digest(checkpoint / name)
        except OSError as error:
            raise BrokenCheckpoint(checkpoint / name, error) from None
        if found != digest:
            raise BrokenCheckpoint(
                checkpoint / name,
                f"its content has changed since it was written: digest {found}, then {digest}",
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _read(checkpoint: Path, into: dict[str, torch.Tensor]) -> None:
    """Every process by itself; of a sharded tensor only its own part."""
    try:
        with warnings.catch_warnings():
            # it is what no_dist asks for
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(into, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    except CheckpointException as error:
        raise BrokenCheckpoint(checkpoint / "*.safetensors", _reasons(error)) from None


def _write_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: w.contiguous() for name, w in tensors.items()}, path)
        open_to_readers(path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _write_shards(tensors: Mapping[str, torch.Tensor], part: Path, ranks: Ranks) -> None:
    try:
        with ranks.meeting():
            dcp.save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
                process_group=ranks.channel,
            )
    except CheckpointException as error:
        raise OSError(_reasons(error)) from None


def _finish(part: Path, target: Path, state: Mapping[str, Any]) -> None:
    """The manifest, and then the name that makes it count."""
    open_to_readers(part)
    files = sorted(path.name for path in part.iterdir())
    (part / "state.json").write_text(
        json.dumps(
            {**state, "files": files, "digests": {name: _digest(part / name) for name in files}}
        )
    )
    _flush(part)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _stock_name(name: str) -> str:
    """Name of a trained weight: an adapter's as in a LoRA file, else the transformer's own."""
    return f"transformer.{name.replace('.default.', '.')}" if ".lora_" in name else name


def _sets(policy: Policy) -> dict[str, torch.Tensor]:
    sets = zip(
        SETS,
        (
            [p.detach() for p in policy.parameters],
            policy.behaviour,
            policy.average,
            policy.reference,
        ),
    )
    return {
        f"{s}.{name}": w
        for s, weights in sets
        for name, w in zip(policy.names, policy.layout.described(weights))
    }


def _tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = _sets(policy)
    for m in MOMENTS:
        values = [
            optimizer.state[p][m] if p in optimizer.state else None for p in policy.parameters
        ]
        tensors |= {
            f"{m}.{name}": w
            for name, w in zip(policy.names, policy.layout.described(values))
            if w is not None
        }
    return tensors


def _optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    return max((int(s["step"]) for s in optimizer.state.values()), default=0)


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {found}" for rank, (found, _) in error.failures.items())


def _flush(folder: Path) -> None:
    """Write everything to the disk before the rename makes it count."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
