"""A pipeline folder is checked, and the stock parts in it are loaded, every tensor accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from kvpo.common.access import check_readable
from kvpo.common.files import first_line
from kvpo.common.finite import check_finite_json
from kvpo.generators.geometry import Geometry

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def check_folder(folder: Path) -> Geometry:
    """Read how the generator of a pipeline folder streams, without any weights.

    Raises PermissionError, FileNotFoundError or ValueError where the folder is none, or not whole.
    """
    check_readable(folder)
    check_readable(folder / "model_index.json")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no pipeline folder: model_index.json is missing; give a folder in diffusers layout, mini, or the weights of a run that kvpo align wrote, such as RUN:ema"
        )
    geometry = Geometry.read(folder / "streaming.json")
    for path in sorted(folder.glob("*/config.json")):
        check_finite_json(path)
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        _check_folder(folder / part)
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder} is no whole pipeline folder: {part}/ is missing; copy it again, or give a folder in diffusers layout"
            )
    return geometry


def load_tokenizer(folder: Path):
    """The tokenizer of a pipeline folder.  ValueError where its files are broken."""
    return load_description(AutoTokenizer, folder / "tokenizer")


def _check_folder(folder: Path) -> None:
    """Check that a folder, and every file in it, may be read.

    Raises PermissionError, before any reader calls it missing or broken.
    """
    check_readable(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        check_readable(path)


def load_part(kind, folder: Path, dtype: torch.dtype):
    """A stock class from its folder, every tensor accounted for."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
        reason = (
            f"holds only {pickled}, which would have to be unpickled; convert them to safetensors"
            if pickled
            else "holds no *.safetensors file; copy the weights into it"
        )
        raise FileNotFoundError(f"{folder} {reason}")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); copy it again"
            ) from None
    try:
        model, info = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder} does not hold a {kind.__name__} ({first_line(error)}); copy it again"
        ) from None
    wrong = {
        what: sorted(map(str, info[what]))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(what)
    }
    if wrong:
        listed = "; ".join(
            f"{what.replace('_', ' ')}: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}"
            for what, keys in wrong.items()
        )
        raise ValueError(
            f"{folder} holds weights of another model than its config.json describes: {listed}; copy both again from one model"
        )
    return model


def load_description(kind, folder: Path):
    """A stock class from a folder of descriptions only."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    # of malformed files tokenizers raises bare ones, and transformers whatever its reading stumbles
    # over
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        reason = (
            _not_json(folder)
            or f"{folder} does not hold a {folder.name} ({type(error).__name__}: {first_line(error)})"
        )
    raise ValueError(f"{reason}; copy it again")


def _not_json(folder: Path) -> str:
    """Name the folder's file that is no JSON, and why; "" if all are."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{path} is not JSON ({error})"
    return ""
