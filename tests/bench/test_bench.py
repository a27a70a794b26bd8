"""`kvpo bench`: the table of a tiny size on a CPU, and what it counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvpo.bench.measure import Bench, group
from kvpo.bench.sizes import NAMED, Load, named_sizes, new_parts, script_of, settings_of
from kvpo.bench.work import PassShape, matmul_rate, operations, watched
from kvpo.commands import main as cli
from kvpo.common.timing import Phases

LOAD = Load(branches=2, window_blocks=2, rank=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    return new_parts(settings_of(LOAD, "float32"), NAMED["tiny"], CPU)


def test_the_command_gives_a_table_and_json(capsys, tmp_path):
    """Every phase in both schedules, which agree about the energies."""
    out = tmp_path / "bench.json"
    argv = ["bench", "tiny", "--device", "cpu", "--branches", "2", "--window-blocks", "2"]
    assert cli.main([*argv, "--rank", "4", "--out", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "branches and anchor" in said and "pixel frames a second" in said
    batched, single = found["schedules"]["batched"], found["schedules"]["one-by-one"]
    for measured in (batched, single):
        work, seconds = measured["TFLOP"], measured["seconds"]
        assert set(work) == {"prefix", "branches", "decode", "replay", "replay_grad"}
        assert set(work) <= set(seconds) and min(seconds.values()) > 0.0 < min(work.values())
        assert set(measured["utilisation"]) == set(work)
    assert "update" in single["seconds"] and single["calls"] > 2 * batched["calls"]
    assert found["largest difference of energies, relative"] < 1e-4
    assert min(single["energy"]) > 0.0 and not found["left out"]
    # the same numbers are the same work, but what branches share is made once, and text is read
    # once a pass
    for phase, most in {"prefix": 1.0, "branches": 1.2, "replay": 1.3}.items():
        assert 1.0 <= single["TFLOP"][phase] / batched["TFLOP"][phase] <= most


def test_every_pass_is_seen_once(parts):
    """With gradient checkpointing the first block runs twice, and is one pass all the same."""
    script, fork = script_of(LOAD, NAMED["tiny"].geometry)
    log = group(parts, "batched", script, fork, update=False)["log"]
    calls = group(parts, "batched", script, fork, update=False)["calls"]
    assert log.checkpointing
    assert sum(n // (2 if s.gradient else 1) for (_, s), n in log.found.items()) == calls


def test_operations_by_hand(parts):
    """Linear maps and attention of one pass, and that its backward pass is not free."""
    sizes, model = NAMED["tiny"], parts.pipeline.generator
    g, dim = sizes.geometry, 32
    with watched(model, Phases()) as log:
        pass
    shapes = [PassShape(2, 3, 6, 1, gradient) for gradient in (False, True)]
    log.found.update({("x", shape): 1 for shape in shapes})
    free, paid = (operations(parts.config, sizes, log)[shape] for shape in shapes)
    tokens, text, adapter = 3 * 4, g.text_length, 2 * 4 * (32 + 32)
    maps = 2 * tokens * (6 * (2 * dim * dim + adapter) + 2 * (2 * dim * 32 + adapter))
    maps += text * 2 * (2 * dim * dim + adapter)
    attention = 2 * 4 * tokens * dim * (tokens + 6 * 4 + text)
    embedding = 2 * tokens * 2 * (2 * 64 * dim)
    times = 2 * 3 * (2 * 16 * dim + 2 * dim * dim + 2 * dim * 6 * dim)
    words = text * (2 * 32 * dim + 2 * dim * dim)
    assert free == maps + attention + embedding + times + words
    assert 2.5 < paid / free < 4.5


def test_no_part_is_begun_after_the_budget():
    found = Bench(NAMED["tiny"], LOAD, CPU, "float32", False, 0.0, lambda doing: None)()
    assert found["left out"] == ["batched", "one-by-one", "stream"] and not found["schedules"]


def test_a_shape_is_that_of_a_generator(folder):
    sizes = named_sizes(str(folder))
    assert sizes.transformer["num_layers"] == 2 and sizes.geometry.block == 2
    with pytest.raises(FileNotFoundError, match="is no size and .* give one of tiny, wan-1.3b"):
        named_sizes("nothing")


def test_a_fork_that_can_not_be_is_refused():
    with pytest.raises(ValueError, match="block 1 can not be a fork .* give 4 or a later one"):
        script_of(replace(LOAD, fork=1), NAMED["tiny"].geometry)


def test_the_rate_of_a_product_is_a_rate():
    assert 1e8 < matmul_rate(CPU, torch.float32, seconds=0.05) < 1e14
