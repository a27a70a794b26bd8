"""The routing map: which past frames each branch of a group reads, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvpo.method.explorers import Geometry
from kvpo.types import BranchPlan, Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    from matplotlib.figure import Figure

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
    _draw_frames(axes, values, [labels[i] for i in order], geometry.block)
    for segment, start in enumerate(starts):
        if segment and start < window.stop:
            _draw_switch(axes, segment, start * geometry.block)
    _draw_legend(figure, [name for name in names if names.index(name) in values])
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw_frames(axes: Axes, values: np.ndarray, labels: Sequence[str], block: int) -> None:
    """Draw a square for every row and frame; ``values``: numbers of their roles."""
    from matplotlib.colors import ListedColormap

    rows, frames = values.shape
    axes.pcolormesh(
        np.arange(frames + 1),
        np.arange(rows + 1),
        values,
        edgecolors="white",
        linewidth=1.0,
        cmap=ListedColormap(list(ROLES.values())),
        vmin=-0.5,
        vmax=len(ROLES) - 0.5,
    )
    axes.set_ylim(rows, 0)
    axes.set_yticks(np.arange(rows) + 0.5, labels)
    every = block * max(1, round(frames / block / 24))
    axes.set_xticks(np.arange(0, frames, every) + 0.5, np.arange(0, frames, every))
    axes.set_xlabel("latent frame")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_switch(axes: Axes, segment: int, frame: int) -> None:
    """Draw a line where a prompt takes over, and its number."""
    axes.axvline(frame, color="#c0392b", linewidth=1.6)
    axes.annotate(
        f"prompt {segment + 1}",
        (frame, 0),
        xytext=(3, 3),
        textcoords="offset points",
        color="#c0392b",
        fontsize=8,
    )


def _draw_legend(figure: Figure, used: Sequence[str]) -> None:
    """Draw the colours of the roles that there are, below the map."""
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(facecolor=ROLES[name], label=name) for name in used],
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=8,
        handlelength=1.0,
    )
