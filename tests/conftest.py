"""Tests run stricter than production: deterministic algorithms only, uninitialised memory is
NaN, one thread, no network."""

from __future__ import annotations

import os
from collections import Counter

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

LONG_FILES = (
    "test_faults",
    "test_distributed",
    "test_branch_parallel",
    "test_sharding",
    "test_inner_updates",
    "test_before_work",
    "test_container",
    "test_benchmarks",
    "test_start_up",
    "test_page",
    "test_panes_page",
)
"""Files whose few tests start processes or browsers: begun last, they leave a core without work."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long files first, then those of many tests; within a file the order stays."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG_FILES, -sizes[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def strict_torch():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def pipeline():
    """The tiny random generator. Shared: a test that trains it, or changes its weights, takes
    `own_pipeline`."""
    from tiny import new_pipeline

    return new_pipeline()


@pytest.fixture
def own_pipeline():
    from tiny import new_pipeline

    return new_pipeline()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny generator as a pipeline folder.  Shared: copy it before breaking it."""
    from tiny import save_pipeline

    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def no_curves(monkeypatch):
    """Charts of reports stay empty: to draw them takes longer than all else of a page."""
    monkeypatch.setattr("kvpo.report.curves.svg", lambda picture, label: "<svg></svg>")
