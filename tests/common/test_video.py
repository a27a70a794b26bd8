"""Videos: what is written comes back, small ones can be watched, and files are whole or absent."""

from __future__ import annotations

import base64
import io
import re
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from PIL import Image

from kvpo.common.files import write_atomic
from kvpo.common.pictures import grid, html_image, html_video, strips
from kvpo.common.rng import stream
from kvpo.common.video import (
    Mp4Writer,
    encode_mp4,
    enlarge,
    read_about,
    read_mp4,
    watchable,
    write_mp4,
)
from kvpo.method.routing import KVRouting
from kvpo.report.routing_map import ROLES, roles, routing_map
from kvpo.types import BranchPlan, Window

GEOMETRY, WINDOW = SimpleNamespace(block=3, sink=3, window=12), Window(7, 3)


def patches(frames: int = 6, side: int = 64) -> torch.Tensor:
    """Random colours in squares of 8 x 8 that change at every frame."""
    cells = torch.randint(
        0, 256, (frames, 3, side // 8, side // 8), generator=stream(0, "patches"), dtype=torch.uint8
    )
    return enlarge(cells, 8)


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).abs()


def test_video_comes_back_enlarged_with_its_colours(tmp_path):
    video = patches()
    back, fps = read_mp4(write_mp4(tmp_path / "new/folder/a.mp4", video, fps=16.0))
    assert back.shape == (6, 3, 256, 256) and back.dtype == torch.uint8 and fps == 16.0
    centres = difference(back, enlarge(video, 4))[..., 16::32, 16::32]
    assert centres.mean() < 2.0 and centres.max() <= 10.0


def test_order_of_channels_and_frames(tmp_path):
    video = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for t, channels in enumerate(([0], [1], [2], [0, 1])):
        video[t, channels] = 255
    back, _ = read_mp4(write_mp4(tmp_path / "a.mp4", video))
    assert difference(back.float().mean(dim=(2, 3)), video.float().mean(dim=(2, 3))).max() < 6.0


@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0, 23.976])
def test_frame_rate_comes_back(tmp_path, fps):
    assert read_mp4(write_mp4(tmp_path / "a.mp4", patches(2), fps=fps))[1] == pytest.approx(
        fps, abs=1e-3
    )


@pytest.mark.parametrize(
    "height, width, factor",
    [(64, 64, 4), (63, 64, 6), (480, 832, 1), (256, 256, 1), (255, 300, 2), (1, 2, 256)],
)
def test_watchable_is_a_whole_factor_with_even_sides(height, width, factor):
    assert watchable(torch.zeros(1, 3, height, width, dtype=torch.uint8)) == factor
    assert factor * height % 2 == 0 and factor * width % 2 == 0


def test_same_video_same_bytes():
    assert encode_mp4(patches()) == encode_mp4(patches())


def test_wrong_videos_are_refused():
    for video in (
        patches().float(),
        patches()[0],
        patches()[:, :2],
        patches()[:0],
        patches().permute(0, 2, 3, 1),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[T, 3, H, W\]"):
            encode_mp4(video)
    with pytest.raises(ValueError, match="33 x 32 pixels cannot be written"):
        encode_mp4(torch.zeros(1, 3, 32, 33, dtype=torch.uint8), factor=1)


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_unreadable_video_is_named(tmp_path, content):
    path, error, said = tmp_path / "a.mp4", ValueError, "a.mp4 is not a readable video"
    if content is None:
        error, said = FileNotFoundError, "a.mp4 is no file; give the path of a video"
    else:
        path.write_bytes(content)
    with pytest.raises(error, match=said):
        read_mp4(path)


def test_writing_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("kvpo.common.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_html_holds_the_file_itself(tmp_path):
    data = encode_mp4(patches(2))
    text = html_video(data, 'a "quoted" <label>')
    for attribute in (
        "loop",
        "muted",
        "autoplay",
        "playsinline",
        "controls",
        'aria-label="a &quot;quoted&quot; &lt;label&gt;"',
    ):
        assert attribute in text
    assert base64.b64decode(re.search(r"base64,([^\"]+)", text)[1]) == data
    path = tmp_path / "a.png"
    path.write_bytes(strips([("", patches())]))
    assert (
        base64.b64decode(re.search(r"base64,([^\"]+)", html_image(path, "x"))[1])
        == path.read_bytes()
    )


def test_grid_places_clips_and_holds_the_last_frame():
    clips = [
        torch.full((frames, 3, 64, 64), 40 * (i + 1), dtype=torch.uint8)
        for i, frames in enumerate((4, 6, 6))
    ]
    clips[0][-1] = 200
    video = grid(
        clips,
        ["one", "two, with a caption long enough to need a second line", ""],
        columns=2,
    )
    assert (
        video.dtype == torch.uint8
        and video.shape[0] == 6
        and video.shape[2] % 2 == video.shape[3] % 2 == 0
    )
    x, y, cell_x = 8 + 96, 8 + 96, 192 + 8  # tiles of 64 pixels are enlarged by 3
    assert (
        video[:, 0, y, x].tolist() == [40, 40, 40, 200, 200, 200]
        and video[0, 0, y, x + cell_x] == 80
    )
    caption = video[0, 0, 8 + 192 + 4 : 8 + 192 + 30]
    assert (caption[:, 8:200] < 128).any() and (caption[:, 208:400] < 128).any()


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (3, 3), (5, 3), (7, 4), (9, 3)])
def test_grid_leaves_few_tiles_empty(count, columns):
    assert grid([patches(1)] * count, [""] * count).shape[-1] == columns * 200 + 8


def test_grid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 clips, 1 captions; give one of each"):
        grid([patches(), patches()], ["one"])
    with pytest.raises(ValueError, match="differ in size"):
        grid([patches(), patches(side=32)], ["", ""])


def test_strips_show_first_and_last_frame():
    video = torch.arange(0, 90, 10, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 64, 64)
    picture = Image.open(io.BytesIO(strips([("before", video), ("after", video)], frames=3)))
    assert picture.width == 3 * 132
    assert [picture.getpixel((x, 80))[0] for x in (10, 142, 274)] == [0, 40, 80]


def test_roles_of_the_fork_block():
    plan = BranchPlan(frames=(4, 6, 9, 12, 17))
    branch, anchor = roles([plan, BranchPlan()], WINDOW, GEOMETRY, nearest=1)
    assert [i for i, role in enumerate(branch) if role == "routed"] == [4, 6, 9, 12, 17]
    assert [i for i, role in enumerate(branch) if role == "nearest"] == [20]
    assert [i for i, role in enumerate(anchor) if role == "rolling window"] == [
        15,
        16,
        17,
        18,
        19,
        20,
    ]
    for row in (branch, anchor):
        assert (
            row[:3] == ["sink"] * 3
            and row[21:24] == ["current block"] * 3
            and row[24:] == ["later in the window"] * 6
            and len(row) == 30
        )
        read = [role for role in row[:24] if role != "not read"]
        assert len(read) == GEOMETRY.window  # branch and anchor have the same budget
    with pytest.raises(ValueError, match="plan reads frame 21"):
        roles([BranchPlan(frames=(21,))], WINDOW, GEOMETRY, nearest=1)


def test_roles_early_in_a_video():
    """The rolling window is not full yet, and the sink is part of what came before."""
    (anchor,) = roles([BranchPlan()], Window(2, 1), GEOMETRY, nearest=1)
    assert anchor == ["sink"] * 3 + ["rolling window"] * 3 + ["current block"] * 3
    (anchor,) = roles([BranchPlan()], Window(0, 1), GEOMETRY, nearest=1)
    assert anchor == ["current block"] * 3


def test_routing_map_is_a_picture_with_the_roles_colours():
    plans = (*KVRouting().plan(WINDOW, GEOMETRY, 4, stream(0, "plan")), BranchPlan())
    image = Image.open(
        io.BytesIO(routing_map(plans, WINDOW, GEOMETRY, nearest=1, starts=(0, 5)))
    ).convert("RGB")
    colours = {colour for count, colour in image.getcolors(maxcolors=100_000) if count > 200}
    assert all(tuple(bytes.fromhex(colour[1:])) in colours for colour in ROLES.values())


# --- Files as people have them ---


@pytest.mark.parametrize(
    "name",
    [
        "12:30.mp4",
        "2026-01-01T12:30/v.mp4",
        "file:v.mp4",
        "pipe:1.mp4",
        "v%03d.mp4",
        "concat:a|b.mp4",
        "s\udcff.mp4",
    ],
)
def test_odd_characters_in_a_path_are_the_path_s(tmp_path, monkeypatch, name):
    """libav takes what stands before a colon for a protocol, and %d for a number: such videos
    could not be written, or read."""
    monkeypatch.chdir(tmp_path)
    video = patches(3)
    write_mp4(Path(name), video)
    assert len(read_mp4(Path(name))[0]) == 3
    with Mp4Writer(Path(name)) as writer:
        writer.write(video)
        writer.write(video)
    assert len(read_mp4(Path(name))[0]) == 6 and read_about(Path(name)) == {"enlarged": 4}


def test_a_video_says_what_it_is(tmp_path):
    about = {"prompts": ["a cat; at night = 1", '\u732b\n"quoted"'], "seed": 7, "generator": "mini"}
    path = write_mp4(tmp_path / "a.mp4", patches(2), about=about)
    assert read_about(path) == {"enlarged": 4} | about
    assert read_about(write_mp4(tmp_path / "b.mp4", patches(2), factor=1)) == {}


def test_the_factor_of_enlarging_is_undone(tmp_path):
    """The miniature's rewards refused the miniature's own videos, which are enlarged when they
    are written."""
    video = patches(3)
    back, _ = read_mp4(write_mp4(tmp_path / "a.mp4", video), original=True)
    assert back.shape == video.shape and (back.float() - video.float()).abs().mean() < 3


def even_and_uneven(folder: Path, *times: int) -> Path:
    """A video whose frames are shown from these times on, in 1/1000 s."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, image in zip(
            times, patches(len(times))[:, :, :64, :64].permute(0, 2, 3, 1).contiguous().numpy()
        ):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / "v.mkv").write_bytes(file.getvalue())
    return folder / "v.mkv"


def test_times_that_a_container_rounds_are_even(tmp_path):
    """30 frames a second in milliseconds: 33 and 34 ms."""
    video, fps = read_mp4(even_and_uneven(tmp_path, *(round(1000 * k / 30) for k in range(30))))
    assert len(video) == 30 and fps == pytest.approx(30, rel=0.02)


@pytest.mark.parametrize(
    "times",
    [
        (0, 62, 125, 375, 437, 500),
        tuple(range(0, 900, 62)) + tuple(range(900, 2000, 124)),
        tuple(round(20 * k**1.3) for k in range(30)),
    ],
)
def test_a_variable_frame_rate_is_refused(tmp_path, times):
    """One pan got 0.89 with even frames and 0.25 with uneven ones: rewards count frames, not
    seconds."""
    with pytest.raises(
        ValueError,
        match="v.mkv has a variable frame rate: a frame is shown for .* ms, but rewards count frames; make it even first",
    ):
        read_mp4(even_and_uneven(tmp_path, *times))


def test_what_is_no_video_is_named_for_what_it_is(tmp_path):
    """A missing file was `not a readable video; write it again`, one with sound alone
    `tuple index out of range`, and what a text says of itself was libav's own error."""
    text, sound, missing = (tmp_path / name for name in ("t.mp4", "s.wav", "none.mp4"))
    text.write_text("a cat")
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    for read in (read_mp4, read_about):
        with pytest.raises(ValueError, match="t.mp4 is not a readable video"):
            read(text)
        with pytest.raises(FileNotFoundError, match="none.mp4"):
            read(missing)
    with pytest.raises(ValueError, match="s.wav is not a readable video .it has no pictures"):
        read_mp4(sound)
