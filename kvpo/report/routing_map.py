"""The routing map: which past frames each branch of a group reads, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from kvpo.method.explorers import Geometry
from kvpo.types import BranchPlan, Window

ROLES = {
    "not read": "#f1f3f5",
    "sink": "#5b4b8a",
    "rolling window": "#8fb8de",
    "routed": "#e07b39",
    "nearest": "#2f8a5b",
    "current block": "#2b2f33",
    "later in the window": "#b9bec4",
}
"""Role -> colour; told apart in grey as well."""


def roles(
    plans: Sequence[BranchPlan], window: Window, geometry: Geometry, nearest: int
) -> list[list[str]]:
    """Role of every frame before the window's end, plan by plan, as the fork block reads them.

    In later blocks of the window `nearest` moves along and the routed frames stay. A plan without
    routed frames (the anchor's, or a noise branch's) reads the rolling window.
    """
    fork, stop = window.fork * geometry.block, window.stop * geometry.block
    table = []
    for plan in plans:
        row = (
            ["not read"] * fork
            + ["current block"] * geometry.block
            + ["later in the window"] * (stop - fork - geometry.block)
        )
        rolling = range(max(0, fork + geometry.block + geometry.sink - geometry.window), fork)
        close = range(max(0, fork - nearest), fork) if plan.frames else ()
        for frames, role in (
            (plan.frames or rolling, "routed" if plan.frames else "rolling window"),
            (close, "nearest"),
            (range(min(geometry.sink, fork)), "sink"),
        ):
            for frame in frames:
                if not 0 <= frame < fork:
                    raise ValueError(
                        f"plan reads frame {frame}, but the fork at block {window.fork} has only frames 0 to {fork - 1} before it"
                    )
                row[frame] = role
        table.append(row)
    return table


def routing_map(
    plans: Sequence[BranchPlan],
    window: Window,
    geometry: Geometry,
    nearest: int,
    starts: Sequence[int] = (0,),
) -> bytes:
    """Draw the routing map as a PNG; colour = role.

    Rows = anchor, then branches; columns = latent frames up to the window's end.

    ``plans``: branches, then the anchor's, as in `kvpo.types.Rollout`; ``starts``: first block of
    every prompt segment, drawn as lines.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = [*(f"branch {g}" for g in range(len(plans) - 1)), "anchor"]
    order = [len(plans) - 1, *range(len(plans) - 1)]
    table = roles(plans, window, geometry, nearest)
    names = list(ROLES)
    values = np.array([[names.index(role) for role in table[i]] for i in order])
    rows, frames = values.shape
    figure = Figure(
        figsize=(min(14.0, max(6.0, 2.2 + 0.24 * frames)), 1.5 + 0.27 * rows),
        dpi=130,
        layout="constrained",
    )
    axes = figure.subplots()
    axes.pcolormesh(
        np.arange(frames + 1),
        np.arange(rows + 1),
        values,
        edgecolors="white",
        linewidth=1.0,
        cmap=ListedColormap(list(ROLES.values())),
        vmin=-0.5,
        vmax=len(names) - 0.5,
    )
    axes.set_ylim(rows, 0)
    axes.set_yticks(np.arange(rows) + 0.5, [labels[i] for i in order])
    every = geometry.block * max(1, round(frames / geometry.block / 24))
    axes.set_xticks(np.arange(0, frames, every) + 0.5, np.arange(0, frames, every))
    axes.set_xlabel("latent frame")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for segment, start in enumerate(starts):
        if segment and start < window.stop:
            axes.axvline(start * geometry.block, color="#c0392b", linewidth=1.6)
            axes.annotate(
                f"prompt {segment + 1}",
                (start * geometry.block, 0),
                xytext=(3, 3),
                textcoords="offset points",
                color="#c0392b",
                fontsize=8,
            )
    used = [name for name in names if names.index(name) in values]
    handles = [Patch(facecolor=ROLES[name], label=name) for name in used]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=8,
        handlelength=1.0,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
