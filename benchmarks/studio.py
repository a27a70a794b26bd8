"""Latencies of the studio: first frame, switch and fork, from a tab's request to its answer.

python benchmarks/studio.py [--generator mini] [--times 5] [--threads 1]

The network and the browser's decoding are not in them. Times on cores that others use mean little:
the load of the machine is printed beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvpo.common.environment import pick_device
from kvpo.method.settings import RolloutConfig
from kvpo.runs.loading import load_generator
from kvpo.studio.images import unpacked
from kvpo.studio.library import Library
from kvpo.studio.live import longest_story
from kvpo.studio.session import Session
from kvpo.studio.shared import Studio, new_worker

FIRST = "a small red circle moves right slowly in the night"
OTHER = "it turns blue"
FORKED = 8
"""Block that is forked; routing needs a past that is longer than the window."""


class Reader:
    """A tab that takes every block at once, and notes when each message came."""

    def __init__(self, studio: Studio):
        self.came: asyncio.Queue[tuple[float, dict[str, Any]]] = asyncio.Queue()
        self.blocks = 0
        self.session = Session(studio, self.json, self.block)

    async def json(self, message: Mapping[str, Any]) -> None:
        if message["is"] == "error":
            raise SystemExit(message["message"])
        self.came.put_nowait((time.perf_counter(), dict(message)))

    async def block(self, message: bytes) -> None:
        self.blocks += 1
        self.came.put_nowait((time.perf_counter(), {"is": "block", **unpacked(message)[0]}))
        self.session.receive({"do": "seen", "blocks": self.blocks})

    def ask(self, do: str, **what: Any) -> float:
        self.session.receive(json.loads(json.dumps({"do": do, **what})))
        return time.perf_counter()

    async def until(self, true: Callable[[dict[str, Any]], bool]) -> float:
        while True:
            at, message = await self.came.get()
            if true(message):
                return at


async def measure(studio: Studio, seed: int) -> dict[str, float]:
    """Seconds of one story: to its first block, to the first one after a switch, to a whole fork."""
    tab = Reader(studio)
    driver = asyncio.create_task(tab.session.drive())
    begun = tab.ask("begin", prompt=FIRST, seed=seed)
    first = await tab.until(lambda m: m["is"] == "block") - begun
    await tab.until(lambda m: m["is"] == "block" and m["number"] >= FORKED)
    tab.ask("pause")
    await tab.until(lambda m: m["is"] == "story" and not m["playing"])
    begun = tab.ask("say", prompt=OTHER)
    tab.ask("play")
    switch = await tab.until(lambda m: m["is"] == "block") - begun
    tab.ask("pause")
    begun = tab.ask(
        "fork", block=FORKED, by="kv_routing", window=3, branches=studio.branches, draw=0
    )
    shown = await tab.until(lambda m: m["is"] == "block" and m["kind"] == "branch") - begun
    whole = await tab.until(lambda m: m["is"] == "forked") - begun
    tab.session.leave()
    await driver
    return {
        "first block": first,
        "switch": switch,
        "fork, first block": shown,
        "fork, whole": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", default="mini")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--branches", type=int, default=RolloutConfig.branches)
    given = parser.parse_args()
    device = pick_device("auto")
    with new_worker(given.threads) as worker, tempfile.TemporaryDirectory() as folder:
        pipeline, label = load_generator(given.generator, device, "float32", None)
        blocks, frames = longest_story(pipeline, 0), RolloutConfig.cache_frames
        library = Library(Path(folder))
        studio = Studio(pipeline, label, library, worker, blocks, frames, 2**28)
        studio.branches = given.branches
        found = [asyncio.run(measure(studio, seed)) for seed in range(given.times)]
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(
        f"{label}, {given.branches} branches, threads {given.threads}, load {load}; median (lowest to highest) of {given.times}:"
    )
    for name in found[0]:
        times = [one[name] for one in found]
        print(f"{name:18} {statistics.median(times):7.3f} s ({min(times):.3f} to {max(times):.3f})")


if __name__ == "__main__":
    main()
