"""kill -9 at random instants of a short run, each time resumed.

The final weights must equal the uninterrupted run's, bit for bit.

python benchmarks/kill.py [--times 20] [--pipeline mini]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from kvpo.common.environment import environment
from kvpo.common.rng import stream
from kvpo.policy.checkpoint import checkpoints, read_tensors


def command(out: Path, pipeline: str, steps: int, resume: bool) -> list[str]:
    options = [
        "--steps",
        steps,
        "--groups",
        1,
        "--checkpoint.every",
        1,
        "--evaluate.scripts",
        2,
        "--evaluate.videos",
        0,
        "--show-every",
        0,
        "--data.blocks",
        9,
        "--rollout.branches",
        4,
    ]
    return [
        sys.executable,
        "-m",
        "kvpo",
        "align",
        "mini",
        "--pipeline",
        pipeline,
        *map(str, options),
        "--out",
        str(out),
        *(["--resume"] if resume else []),
    ]


def run(out: Path, pipeline: str, steps: int, resume: bool, seconds: float | None = None) -> bool:
    """True if the run ended by itself; after ``seconds`` it is killed."""
    process = subprocess.Popen(
        command(out, pipeline, steps, resume), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"the run failed by itself: {errors.decode()[-2000:]}")
    return True


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoints(out / "checkpoints")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pipeline", default="mini")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        run(Path(folder) / "whole", args.pipeline, args.steps, resume=False)
        whole, length = weights(Path(folder) / "whole"), time.perf_counter() - begin
        print(f"uninterrupted: {length:.1f} s", flush=True)
        instants, rows = torch.rand(args.times, generator=stream(0, "kill")).tolist(), []
        for i, share in enumerate(instants):
            out, resumed = Path(folder) / str(i), False
            ended = run(out, args.pipeline, args.steps, resume=False, seconds=share * length)
            before = [p.name for p in checkpoints(out / "checkpoints")]
            if not ended:
                resumed = (out / "config.resolved.yaml").exists()
                run(out, args.pipeline, args.steps, resume=resumed)
            after = weights(out)
            worst = max(float((whole[name] - after[name]).abs().max()) for name in whole)
            rows.append(
                {
                    "killed after": share * length,
                    "checkpoints then": before,
                    "resumed": resumed,
                    "ended before": ended,
                    "largest difference": worst,
                }
            )
            print(
                f"{i + 1}/{args.times}: killed after {share * length:.1f} s with {before or 'no checkpoint'}: largest difference {worst}",
                flush=True,
            )
    record = {
        "environment": environment(torch.device("cpu")),
        "steps": args.steps,
        "seconds": length,
        "kills": rows,
        "all equal": all(r["largest difference"] == 0.0 for r in rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("all equal" if record["all equal"] else "NOT all equal")


if __name__ == "__main__":
    main()
