"""Videos as files.  A video is uint8 [T, 3, H, W], RGB, T pixel frames."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace

from kvpo.common.access import check_readable
from kvpo.common.files import first_line, write_atomic

FPS = 16.0
"""Frames a second of Wan and of the miniature."""
MIN_SIDE = 256
"""Pixels: smaller videos are enlarged by a whole factor until their shorter side reaches this."""
BT709 = 1
ENLARGED = "enlarged"
"""Key of the factor of `enlarge` in what a file says of itself."""
UNEVEN = 0.6
"""Share of a frame's time by which a frame may be off an even grid, or last longer.

Containers round times.
"""


def check_video(video: torch.Tensor, name: str = "video") -> torch.Tensor:
    """``video`` itself.  ValueError unless it is uint8 [T, 3, H, W] with at least one frame."""
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(
            f"{name} is {video.dtype} {tuple(video.shape)}, expected uint8 [T, 3, H, W] with at least one frame; clamp, scale to 0..255 and convert first"
        )
    return video


def enlarge(video: torch.Tensor, factor: int) -> torch.Tensor:
    """Show every pixel as a square of ``factor`` x ``factor``.

    Small videos then stay sharp where a browser would blur them.
    """
    return video.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def watchable(video: torch.Tensor, min_side: int = MIN_SIDE) -> int:
    """The smallest factor that brings the shorter side to ``min_side`` pixels.

    Both sides become even numbers, for yuv420p.
    """
    factor = -(-min_side // min(video.shape[-2:]))
    odd = any(side * factor % 2 for side in video.shape[-2:])
    return factor + 1 if odd else factor


def encode_mp4(
    video: torch.Tensor,
    fps: float = FPS,
    factor: int | None = None,
    crf: int = 16,
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """Encode a video as h264 in yuv420p, which every browser plays.

    ``factor``: enlarge by this, None = `watchable`; ``crf``: lower = better. ``about``: what the
    file says of itself (`read_about`), beside the factor by which it is enlarged.

    Colours lose a level or two; at factor 1 chroma is halved in resolution as well. ValueError for
    odd sides.
    """
    file = io.BytesIO()
    encoder = _Encoder(file, check_video(video), fps, factor, crf, about)
    encoder.write(video)
    encoder.close()
    return file.getvalue()


def write_mp4(
    path: Path,
    video: torch.Tensor,
    fps: float = FPS,
    factor: int | None = None,
    crf: int = 16,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """`encode_mp4` into a file, atomically; makes missing folders."""
    return write_atomic(path, encode_mp4(video, fps, factor, crf, about))


class Mp4Writer:
    """A video file that grows while its frames are made, `encode_mp4` in pieces.

    It is in its place when it is whole, or not at all.
    """

    def __init__(
        self,
        path: Path,
        fps: float = FPS,
        factor: int | None = None,
        crf: int = 16,
        about: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        self.part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
        self.settings = (fps, factor, crf, about)
        self.encoder: _Encoder | None = None
        self.file: BinaryIO | None = None

    def __enter__(self) -> Mp4Writer:
        return self

    def write(self, video: torch.Tensor) -> None:
        """More frames, uint8 [T, 3, H, W]."""
        if self.encoder is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.part.open("wb")
            self.encoder = _Encoder(self.file, check_video(video), *self.settings)
        self.encoder.write(video)

    def __exit__(self, kind, *_) -> None:
        try:
            if self.encoder is not None and self.file is not None:
                self.encoder.close()
                self.file.close()
                if kind is None:
                    os.replace(self.part, self.path)
        finally:
            if self.file is not None:
                self.file.close()
            self.part.unlink(missing_ok=True)


class _Encoder:
    """h264 encoder for frames of the first one's size, into a file object.

    libav takes a colon in a path for a protocol.
    """

    def __init__(
        self,
        file,
        video: torch.Tensor,
        fps: float,
        factor: int | None,
        crf: int,
        about: Mapping[str, Any] | None,
    ):
        self.factor = watchable(video) if factor is None else factor
        height, width = (side * self.factor for side in video.shape[-2:])
        if height % 2 or width % 2:
            raise ValueError(
                f"{width} x {height} pixels cannot be written as yuv420p, which needs even sides; enlarge by 2, or leave the factor to the program"
            )
        self.container = av.open(file, "w", format="mp4")
        if about or self.factor > 1:
            self.container.metadata["comment"] = json.dumps(
                {ENLARGED: self.factor, **(about or {})}
            )
        self.stream = self.container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": str(crf), "preset": "medium"},
        )
        # One thread: the bytes are then the same on every machine, and 64x64 needs no more.
        self.stream.width = width
        self.stream.height = height
        self.stream.pix_fmt = "yuv420p"
        self.stream.thread_count = 1
        # Said, not left to the player's guess: untagged colours differ between browsers.
        context = self.stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709

    def write(self, video: torch.Tensor) -> None:
        for image in (
            enlarge(check_video(video), self.factor).permute(0, 2, 3, 1).contiguous().numpy()
        ):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709
            )
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()


def read_mp4(path: Path, original: bool = False) -> tuple[torch.Tensor, float]:
    """Read a video: (uint8 [T, 3, H, W], frames a second).

    Sides are as stored, that is enlarged, or with ``original`` as they were made.

    Raises PermissionError, FileNotFoundError; ValueError if it is no readable video, or its frames
    do not lie evenly in time.
    """
    check_readable(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; give the path of a video")
    try:
        # A file object: libav would take a colon in the path for a protocol, and %d for a number.
        with Path(path).open("rb") as file, av.open(file) as container:
            fps = float(container.streams.video[0].average_rate or 0.0)
            factor = _about(container.metadata).get(ENLARGED, 1)
            decoded = [
                (frame.time, frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise _unreadable(path, error) from error
    if not decoded:
        raise ValueError(f"{path} holds no frame; write it again")
    fps = _even_rate(path, [time for time, _ in decoded], fps)
    video = (
        torch.from_numpy(np.stack([frame for _, frame in decoded])).permute(0, 3, 1, 2).contiguous()
    )
    return (shrink(video, factor) if original else video), fps


def read_about(path: Path) -> dict[str, Any]:
    """Read what a video file says of itself: prompts, seed, generator, ... as its writer gave them.

    {} for others' files; ValueError if it is no readable video.
    """
    check_readable(path)
    try:
        with Path(path).open("rb") as file, av.open(file) as container:
            return _about(container.metadata)
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error


def shrink(video: torch.Tensor, factor: int) -> torch.Tensor:
    """The opposite of `enlarge`: the mean of every square of ``factor`` x ``factor`` pixels."""
    if type(factor) is not int or factor < 2 or any(side % factor for side in video.shape[-2:]):
        return video
    return torch.cat(
        [
            torch.nn.functional.avg_pool2d(frame[None].float(), factor).round().to(torch.uint8)
            for frame in video
        ]
    )


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get("comment", ""))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a readable video ({_reason(error)}); write it again")


def _reason(error: Exception) -> str:
    """Libav's words without its number."""
    if isinstance(error, IndexError):  # of the list of its video streams
        return "it has no pictures"
    return getattr(error, "strerror", None) or first_line(error)


def _even_rate(path: Path, shown: Sequence[float | None], rate: float) -> float:
    """Frames a second, by the times at which the frames are shown.

    ``rate``: what the file says, kept where it agrees.

    ValueError where frames are shown for different times: whoever counts frames, as every reward
    does, sees another motion.
    """
    times = [time for time in shown if time is not None]
    if len(times) < 2 or len(times) < len(shown):
        return rate or FPS
    lasts = (times[-1] - times[0]) / (len(times) - 1)
    steps = [b - a for a, b in itertools.pairwise(times)]
    usual = sorted(steps)[len(steps) // 2]
    late = max(abs(time - times[0] - k * lasts) for k, time in enumerate(times))
    if (
        lasts <= 0.0
        or late > UNEVEN * lasts
        or max(abs(step - usual) for step in steps) > UNEVEN * usual
    ):
        raise ValueError(
            f"{path} has a variable frame rate: a frame is shown for {1000 * min(steps):.0f} to {1000 * max(steps):.0f} ms, but rewards count frames; "
            f"make it even first, e.g. ffmpeg -i IN -fps_mode cfr -r {max(1, round(1 / max(lasts, 1e-3)))} OUT"
        )
    return rate if rate and abs(rate * lasts - 1) < 0.01 else 1 / lasts
