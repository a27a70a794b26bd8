"""Run by torchrun for `test_sharding`: two ranks, sharded and whole, do unequal work; what they
come to is left in files for the test to judge.

torchrun --nproc-per-node 2 tests/policy/sharded_ranks.py FOLDER
"""

from __future__ import annotations

import errno
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_sharding import CASES, Trained

from kvpo.distributed.process_end import end_by
from kvpo.distributed.ranks import Ranks, leave
from kvpo.policy import checkpoint as module
from kvpo.policy.checkpoint import Snapshot, load_checkpoint, save_checkpoint


def main(folder: Path) -> int:
    warnings.simplefilter("error")
    torch.use_deterministic_algorithms(True)
    ranks, facts = Ranks.join(torch.device("cpu"), 600.0), {}
    for case in CASES:
        whole, sharded = Trained(case, ranks, shard=False), Trained(case, ranks, shard=True)
        for run in (whole, sharded):
            for step in range(3):
                run.step(step, [0, 2] if ranks.first else [1])
        weights = {
            f"{kind}.{i}": w
            for kind, run in (("whole", whole), ("sharded", sharded))
            for i, w in enumerate(run.everything())
        }
        facts[case] = {
            "drift": (whole.policy.drift(), sharded.policy.drift()),
            "held": ranks.gather(sum(w.numel() for w in sharded.policy.parameters)),
        }
        facts[case]["trained"] = sharded.policy.num_trainable
        path = save_checkpoint(
            folder / case, Snapshot.of(3, sharded.policy, sharded.optimizer, {}), 2, ranks=ranks
        )
        again = Trained(case, ranks, shard=True)
        load_checkpoint(path, again.policy, again.optimizer)
        weights |= {f"again.{i}": w for i, w in enumerate(again.everything())}
        from_one = Trained(case, ranks, shard=True)
        load_checkpoint(folder / f"one-{case}" / "step-000003", from_one.policy, from_one.optimizer)
        weights |= {f"from_one.{i}": w for i, w in enumerate(from_one.everything())}
        for run in (sharded, again):
            run.step(3, [0] if ranks.first else [1, 2])
        weights |= {
            f"later.{kind}.{i}": w
            for kind, run in (("straight", sharded), ("resumed", again))
            for i, w in enumerate(run.everything())
        }
        facts[case] |= {
            "full disk": full_disk(folder / "full" / case, sharded, ranks),
            "not finite": not_finite(sharded, ranks),
        }
        if ranks.first:
            save_file(
                {name: w.contiguous().clone() for name, w in weights.items()},
                folder / f"{case}.safetensors",
            )
    if ranks.first:  # and the other does not come
        try:
            sharded.policy.layout.total(torch.zeros(1))
        except ConnectionError as error:
            facts["alone"] = str(error)
        (folder / "facts.json").write_text(json.dumps(facts))
    leave()
    return 0


def full_disk(folder: Path, run: Trained, ranks: Ranks) -> list[str]:
    """What every rank says when the second one's disk is full, and what is left."""
    save_checkpoint(folder, Snapshot.of(1, run.policy, run.optimizer, {}), 2, ranks=ranks)
    write, said = module.HuggingFaceStorageWriter.write_data, ""

    def full(*args):
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    module.HuggingFaceStorageWriter.write_data = full
    try:
        save_checkpoint(folder, Snapshot.of(2, run.policy, run.optimizer, {}), 2, ranks=ranks)
    except OSError as error:
        said = str(error)
    finally:
        module.HuggingFaceStorageWriter.write_data = write
    heard = ranks.gather(said)  # and all have tidied up
    return [*heard, *sorted(p.name for p in folder.iterdir())]


def not_finite(run: Trained, ranks: Ranks) -> list[str]:
    """What every rank says of a gradient that is not finite on one of them."""
    said = ""
    run.accumulate(4, [0])
    if ranks.rank == 1:
        run.policy.layout.collecting[3].grad.fill_(float("nan"))
    try:
        run.update()
    except FloatingPointError as error:
        said = str(error)
    return ranks.gather(said)


if __name__ == "__main__":
    end_by(lambda: main(Path(sys.argv[1])))
