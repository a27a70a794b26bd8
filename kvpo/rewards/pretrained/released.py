"""Weights that others released, found here or on the hub.

They are loaded whole into the class they belong to, and named by their hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvpo.common.access import check_readable
from kvpo.common.files import first_line
from kvpo.common.hub import hub_faults

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
STOCK_FILES = ("*.json", "*.txt", "model*.safetensors")
"""Files of a hub repository that a transformers model, tokenizer and preprocessing need."""


def find(reward: str, name: str, wanted: Sequence[str]) -> Path:
    """The local file or folder ``name``, or else the folder of the hub id ``name``.

    Its files ``wanted`` are downloaded where they are not there yet.

    ValueError that names ``reward``, what is missing and the way out.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # a user without a home
        path = Path(name)
    check_readable(path)
    if path.exists():
        return path
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(
            f"reward {reward!r}: weights {name} are not there; give a folder that holds them, or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted)))
    except hub_faults() as error:
        reason = first_line(error)
        raise ValueError(
            f"reward {reward!r}: weights {name} are no local folder, and could not be downloaded ({reason}); "
            f"where there is a network: hf download {name} --local-dir FOLDER, then set weights: FOLDER"
        ) from None


def file_in(reward: str, found: Path, name: str) -> Path:
    """``found`` itself if it is a file, else the file ``name`` in it.

    Raises ValueError if it is not there.
    """
    path = found if found.is_file() else found / name
    check_readable(path)
    if not path.is_file():
        raise ValueError(
            f"reward {reward!r}: {path} is not there; give the file, or a folder that holds {name}"
        )
    return path


def load_stock(reward: str, kind: Any, folder: Path) -> torch.nn.Module:
    """A transformers model of class ``kind`` in float32, every tensor accounted for.

    Float32 on every device: the clips of a group differ in the third digit of a cosine, where half
    precision rounds. ValueError for a folder without weights, with damaged ones, or with those of
    another model.
    """
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers' own: stderr belongs to errors and to our bars
    found = read_json(reward, folder / "config.json").get("model_type")
    if found != kind.config_class.model_type:
        raise ValueError(
            f"reward {reward!r}: {folder} holds a model of type {found!r}; it must be {kind.config_class.model_type!r}, a {kind.__name__}"
        )
    weight_files(reward, folder)
    # they are refused below, by name
    options = dict(
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
    )
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"reward {reward!r}: the weights in {folder} can not be loaded ({first_line(error)}); copy them again"
        ) from None
    if wrong := sorted(
        str(key)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in info[what]
    ):
        raise ValueError(
            f"reward {reward!r}: {folder} holds other tensors than its config.json describes: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}; copy both again from one model"
        )
    return model


def weight_files(reward: str, folder: Path) -> list[Path]:
    """The folder's safetensors; ValueError if there are none."""
    if files := sorted(folder.glob("model*.safetensors")):
        for file in files:
            check_readable(file)
        return files
    raise ValueError(
        f"reward {reward!r}: {folder} holds no model*.safetensors; pickled weights are not read, convert them"
    )


def read_json(reward: str, path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises PermissionError if it may not be read, ValueError if it is missing or broken.
    """
    check_readable(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward {reward!r}: {path} can not be read ({error}); give a folder as released on the hub"
        ) from None
