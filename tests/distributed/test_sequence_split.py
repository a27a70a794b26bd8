"""One stream over two ranks: the numbers of one rank, half of its cache, and what is refused.

Run by torchrun this file is a rank of the split; as a test it compares with a single process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import environment, launch_python
from tiny import GEOMETRY, new_pipeline, new_rollout, new_stream, story

from kvpo.distributed.process_end import end_by
from kvpo.distributed.ranks import Ranks, leave
from kvpo.generators.sequence_split import OverHeads, check_split

ATOL = 1e-4
"""Largest difference of latents and velocities of order 1: fewer rows in a product, other sums."""


def made(pipeline) -> dict[str, torch.Tensor]:
    """A stream with a prompt switch, and a forked, routed group, by the pipeline as it is."""
    stream = new_stream(pipeline, story(5, 3))
    found = {"stream": torch.cat([stream.advance() for _ in range(5)], dim=1)}
    rollout = new_rollout(pipeline)
    found["group"], found["velocities"] = rollout.latents, rollout.trajectory.velocities
    return found | {"cache": torch.tensor(stream.cache.nbytes)}


def rank_main() -> int:
    """Make the same as `made`, split over all ranks; the first writes it."""
    try:
        ranks = Ranks.join(torch.device("cpu"), 60.0)
        pipeline, split = new_pipeline(), OverHeads(ranks)
        pipeline.generator.share(split)
        found = made(pipeline)
        split.sent = 0
        with torch.no_grad():
            one_pass(pipeline)
        found["sent"] = torch.tensor(split.sent)
        try:
            with torch.enable_grad():
                one_pass(pipeline)
        except ValueError as error:
            found["refused"] = str(error)
        if ranks.first:
            torch.save(found, sys.argv[1])
    finally:
        leave()
    return 0


def one_pass(pipeline) -> None:
    text = pipeline.encode_text(["a red circle rises slowly"])
    x = torch.ones(1, *pipeline.latent_shape(GEOMETRY.block))
    pipeline.generator.velocity(x, 0.5, text, range(GEOMETRY.block))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "made.pt"
    process = launch_python(path.parent, __file__, str(path))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return torch.load(path)


@pytest.fixture(scope="module")
def alone():
    return made(new_pipeline())


@pytest.mark.parametrize("what", ["stream", "group", "velocities"])
def test_two_ranks_make_what_one_makes(split, alone, what):
    assert alone[what].std() > 0.1
    torch.testing.assert_close(split[what], alone[what], rtol=0.0, atol=ATOL)


def test_a_rank_has_half_of_the_cache(split, alone):
    assert 2 * split["cache"] == alone["cache"]


def test_bytes_sent_in_a_pass_are_those_of_the_formula(split):
    """docs/scaling.md counts with it: four exchanges of a rank's tokens in every layer, and the
    output's part to every other rank."""
    layers, width, patch, P = 2, 24, 16, 2
    own = GEOMETRY.block * 4 // P
    counted = (4 * layers * own * width * (P - 1) // P + own * patch * (P - 1)) * 4
    assert split["sent"] == counted


def test_a_pass_with_gradient_is_refused(split):
    """The exchanges would lose it without a word."""
    assert "without gradient only" in split["refused"]


@pytest.mark.parametrize(
    ("heads", "tokens", "bank", "said"),
    [(3, 4, 0, "3 attention heads"), (2, 5, 0, "5 tokens of a frame"), (2, 4, 2, "memory bank")],
)
def test_what_does_not_divide_is_refused(heads, tokens, bank, said):
    with pytest.raises(ValueError, match=said):
        check_split(heads, tokens, bank, 2)
    check_split(4, 4, 0, 2)


def generated(folder: Path, out: Path, processes: int) -> subprocess.CompletedProcess:
    options = ["--prompt", "a red circle rises slowly", "--blocks", "2", "--device", "cpu"]
    options += ["--out", str(out), "--processes", str(processes)]
    command = [sys.executable, "-m", "kvpo", "generate", str(folder), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def test_the_command_writes_one_video_of_two_processes(folder, tmp_path):
    done = generated(folder, tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "000.mp4").stat().st_size > 0
    assert done.stdout.count("frames/s") == 1


def test_the_command_refuses_heads_that_do_not_divide(folder, tmp_path):
    done = generated(folder, tmp_path / "three", 3)
    assert done.returncode == 1
    assert "3 ranks can not share 2 attention heads" in done.stderr
    assert not (tmp_path / "three").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    end_by(rank_main)
