"""Pictures of videos: captioned grids and strips, PNG, and what a page shows inline."""

from __future__ import annotations

import base64
import functools
import html
import importlib.util
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from kvpo.common.extras import require_extra
from kvpo.common.video import check_video, enlarge

INK, PAPER = (28, 32, 36), (255, 255, 255)


def html_video(mp4: Path | bytes, label: str) -> str:
    """A `<video>` that holds its own file, in a loop without sound wherever the page is opened.

    ``label`` is read aloud.
    """
    data = mp4 if isinstance(mp4, bytes) else Path(mp4).read_bytes()
    source = base64.b64encode(data).decode()
    return f'<video loop muted autoplay playsinline controls aria-label="{html.escape(label)}" src="data:video/mp4;base64,{source}"></video>'


def html_image(png: Path | bytes, label: str) -> str:
    data = png if isinstance(png, bytes) else Path(png).read_bytes()
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: there on every machine, with Greek letters and arrows."""
    require_extra("writing on a picture", "report", ("matplotlib",))
    # Found without importing it: that takes long, and fails where a user has no folder to write to.
    found = importlib.util.find_spec("matplotlib")
    assert found is not None and found.origin is not None, "matplotlib is a package on disk"
    fonts = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def _captioned(text: str, width: int, lines: int, size: int) -> Image.Image:
    """Draw ``text`` wrapped to ``width`` pixels in exactly ``lines`` lines.

    Its end is cut by an ellipsis if need be.
    """
    image = Image.new("RGB", (width, lines * (size + 4) + 8), PAPER)
    ImageDraw.Draw(image).multiline_text(
        (2, 3), "\n".join(_wrapped(text, width, size)[:lines]), fill=INK, font=font(size), spacing=3
    )
    return image


def _wrapped(text: str, width: int, size: int) -> list[str]:
    columns = max(4, int((width - 4) / (0.6 * size)))
    return [line for part in text.split("\n") for line in textwrap.wrap(part, columns) or [""]]


def _columns(count: int) -> int:
    """Number of columns of a grid, from square to four times as wide as high.

    The one that leaves fewest tiles empty, the widest of those.
    """
    side = max(1, round(count**0.5))
    return min(
        range(side, min(count, 2 * side) + 1), key=lambda columns: (-count % columns, -columns)
    )


def grid(
    clips: Sequence[torch.Tensor],
    captions: Sequence[str],
    columns: int | None = None,
    tile: int = 160,
) -> torch.Tensor:
    """Clips side by side, a caption under each, as one video.

    ``tile``: pixels that a clip's shorter side at least gets; ``columns``: None = chosen, see
    `_columns`. A shorter clip holds its last frame.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(
            f"{len(clips)} clips, {len(captions)} captions; give one of each for each of at least one clip"
        )
    clips = [
        enlarge(check_video(clip, f"clip {i}"), -(-tile // min(clip.shape[-2:])))
        for i, clip in enumerate(clips)
    ]
    if len({clip.shape[-2:] for clip in clips}) > 1:
        raise ValueError(
            f"clips differ in size: {sorted({tuple(clip.shape[-2:]) for clip in clips})}; give clips of one size"
        )
    steps, (height, width) = max(len(clip) for clip in clips), clips[0].shape[-2:]
    columns = columns or _columns(len(clips))
    lines = max(len(_wrapped(text, width, 13)) for text in captions)
    footers = [_captioned(text, width, lines, 13) for text in captions]
    gap, cell = 8, (height + 4 + footers[0].height, width)
    rows = -(-len(clips) // columns)
    size = [count * (length + gap) + gap for count, length in zip((rows, columns), cell)]
    canvas = torch.full(
        (steps, size[0] + size[0] % 2, size[1] + size[1] % 2, 3), 255, dtype=torch.uint8
    )
    for i, (clip, footer) in enumerate(zip(clips, footers)):
        y, x = gap + i // columns * (cell[0] + gap), gap + i % columns * (width + gap)
        canvas[:, y : y + height, x : x + width] = clip[
            torch.arange(steps).clamp(max=len(clip) - 1)
        ].permute(0, 2, 3, 1)
        canvas[:, y + height + 4 : y + cell[0], x : x + width] = torch.from_numpy(np.array(footer))
    return canvas.permute(0, 3, 1, 2).contiguous()


def strips(rows: Sequence[tuple[str, torch.Tensor]], frames: int = 8, tile: int = 112) -> bytes:
    """PNG of labelled videos as strips of ``frames`` frames at even times.

    First and last frame are included: it is the still form of a grid.
    """
    if not rows or frames < 1:
        raise ValueError(f"{len(rows)} videos, {frames} frames; give at least one of each")
    images = []
    for label, video in rows:
        at = torch.linspace(0, len(check_video(video, label)) - 1, frames).round().long()
        shown = enlarge(video[at], -(-tile // min(video.shape[-2:])))
        images += [
            Image.fromarray(
                np.concatenate(
                    [
                        np.pad(f, ((0, 0), (0, 4), (0, 0)), constant_values=255)
                        for f in shown.permute(0, 2, 3, 1).numpy()
                    ],
                    axis=1,
                )
            )
        ]
    width = max(image.width for image in images)
    labels = [_captioned(label, width, len(_wrapped(label, width, 14)), 14) for label, _ in rows]
    picture = Image.new(
        "RGB",
        (width, sum(label.height + image.height + 6 for label, image in zip(labels, images))),
        PAPER,
    )
    y = 0
    for label, image in zip(labels, images):
        picture.paste(label, (0, y))
        picture.paste(image, (0, y + label.height))
        y += label.height + image.height + 6
    return png(picture)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
