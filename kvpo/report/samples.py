"""Pictures of a run for people to look at: the branches of a group, and videos of fixed scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kvpo.common.files import write_atomic
from kvpo.common.pictures import grid, strips
from kvpo.common.video import read_mp4, write_mp4
from kvpo.generators.pipeline import Pipeline
from kvpo.method.advantages import Advantage
from kvpo.method.explorers import Explorer
from kvpo.method.update import GroupUpdate
from kvpo.report.read_run import read_samples
from kvpo.report.routing_map import routing_map
from kvpo.types import RewardTable, Rollout, Script


def show_group(
    out: Path,
    step: int,
    pipeline: Pipeline,
    rollout: Rollout,
    pixels: torch.Tensor,
    rewards: RewardTable,
    advantage: Advantage,
    update: GroupUpdate,
    explorer: Explorer,
) -> Path:
    """Write groups/step-.../: anchor and branches as one video, the routing map, the numbers.

    ``pixels``: uint8 [B, T, 3, H, W] from the fork on.
    """
    folder = out / "groups" / f"step-{step:06d}"
    order = [len(rollout.plans) - 1, *range(rollout.num_branches)]
    write_mp4(
        folder / "grid.mp4",
        grid([pixels[i] for i in order], [_caption(i, rewards, advantage) for i in order]),
        pipeline.geometry.fps,
        factor=1,
    )
    write_atomic(
        folder / "routing.png",
        routing_map(
            rollout.plans,
            rollout.window,
            pipeline.geometry,
            explorer.nearest,
            rollout.script.starts,
        ),
    )
    record = group_record(rollout, rewards, update.energy, advantage.values, update.pi)
    write_atomic(folder / "group.json", json.dumps(record, indent=1) + "\n")
    return folder


def _caption(row: int, rewards: RewardTable, advantage: Advantage) -> str:
    numbers = "  ".join(
        f"{name.removeprefix('world_')}\u00a0{float(r):.2f}"
        for name, r in zip(rewards.components, rewards.local[:, row])
    )
    return (
        f"anchor\n{numbers}"
        if row == rewards.local.shape[1] - 1
        else f"branch {row}  A {float(advantage.values[row]):+.2f}\n{numbers}"
    )


def show_samples(
    out: Path,
    step: int,
    which: str,
    scripts: Sequence[Script],
    videos: Sequence[torch.Tensor],
    seed: int,
    fps: float = 16.0,
) -> None:
    """samples/step-.../: one file per script, and the index that says what they show."""
    folder, entries = out / "samples" / f"step-{step:06d}", []
    index = folder / "index.json"
    for i, (script, video) in enumerate(zip(scripts, videos)):
        name = f"{which}-{i:02d}.mp4"
        write_mp4(folder / name, video, fps)
        entries.append(
            {
                "file": name,
                "script_id": script.id,
                "texts": script.texts,
                "starts": script.starts,
                "blocks": script.blocks,
                "seed": seed,
                "which": which,
            }
        )
    others = (
        [e for e in json.loads(index.read_text()) if e["which"] != which] if index.exists() else []
    )
    write_atomic(index, json.dumps(others + entries, indent=1) + "\n")


def shown_videos(run: Path, kind: Literal["groups", "samples"], step: int) -> dict[str, Path]:
    """Name -> file of the videos that a step has left: a group's branches, or the samples."""
    folder = run / kind / f"step-{step:06d}"
    return {f"{kind}/{path.stem}": path for path in sorted(folder.glob("*.mp4"))}


def before_after(run: Path, stories: int = 3, frames: int = 12) -> bytes:
    """PNG with the first stories' videos by the start weights and by the last ones, as strips.

    Raises `Missing` where the run has none.
    """
    samples = read_samples(run)
    last = max(s.step for s in samples)
    before = {s.script_id: s for s in samples if s.which == "start"}
    after = {s.script_id: s for s in samples if s.step == last and s.which == "ema"}
    rows = []
    for script_id in [i for i in before if i in after][:stories]:
        story = " | ".join(before[script_id].texts)
        # Samples are stored enlarged, for the page: half of that is enough for a strip.
        rows += [
            (f"{name}: {story}", read_mp4(which[script_id].path)[0][..., ::2, ::2])
            for name, which in (("before", before), ("after", after))
        ]
    return strips(rows, frames)


def group_record(
    rollout: Rollout,
    table: RewardTable,
    energy_G: torch.Tensor,
    advantage_G: torch.Tensor,
    pi_G: torch.Tensor,
) -> dict[str, Any]:
    """Content of group.json: numbers of the rows in the order branches, anchor.

    It is JSON-ready, NaN as null.
    """

    def numbers(x: torch.Tensor) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in x.double().flatten().tolist()]

    def rewards(r_KB: torch.Tensor) -> dict[str, list[float | None]]:
        return {name: numbers(r_B) for name, r_B in zip(table.components, r_KB)}

    script, window = rollout.script, rollout.window
    return {
        "script_id": script.id,
        "texts": list(script.texts),
        "starts": list(script.starts),
        "blocks": script.blocks,
        "fork": window.fork,
        "window_blocks": window.blocks,
        "plans": [list(plan.frames) for plan in rollout.plans],
        "noise_mix": [plan.noise_mix for plan in rollout.plans],
        "differ": rollout.plans[0].differ,
        "rewards": {"local": rewards(table.local), "global": rewards(table.global_)},
        "energies": numbers(energy_G),
        "advantages": numbers(advantage_G),
        "pi": numbers(pi_G),
    }
