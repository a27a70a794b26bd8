"""Golden files: numbers of the released code, which the tests with `golden` in their names
reproduce.

The folder is named by the environment variable KVPO_GOLDEN (default: ../shared/golden beside the
repository). Its README tells what the numbers are, and which differences are rounding.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

VARIABLE = "KVPO_GOLDEN"


def folder() -> Path:
    return Path(
        os.environ.get(VARIABLE) or Path(__file__).resolve().parents[1] / ".." / "shared" / "golden"
    ).resolve()


def missing(*files: str) -> str | None:
    """Why a test of these files cannot run here; None if it can."""
    lost = [name for name in files if not (folder() / name).is_file()]
    return (
        f"no golden {', '.join(lost)} in {folder()} (set {VARIABLE} to the folder that has it)"
        if lost
        else None
    )


def skip_without(*files: str) -> pytest.MarkDecorator:
    """For a whole test: ``@golden.skip_without("weights.safetensors", ...)``."""
    reason = missing(*files)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


@functools.cache
def read_json(name: str) -> Any:
    return json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def read_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(folder() / f"{name}.safetensors")


def case(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, tensors) of a case, from ``name.json`` and ``name.safetensors``; skips the test
    where it has none."""
    if reason := missing(f"{name}.json", f"{name}.safetensors"):
        pytest.skip(reason)
    return read_json(name), read_tensors(name)


def cases(file: str, key: str) -> list:
    """Parameters for ``pytest.mark.parametrize``: the cases of one list of ``file.json``; one
    skipped case where there is no such list."""
    reason = missing(f"{file}.json")
    found = None if reason else read_json(file).get(key)
    if found is None:
        return [
            pytest.param(
                None,
                marks=pytest.mark.skip(reason=reason or f"golden {file}.json has no list {key}"),
            )
        ]
    listed = found["cases"] if isinstance(found, dict) else found
    return [pytest.param(item, id=f"{key}-{i}") for i, item in enumerate(listed)]
