"""The A/B page: in a real browser its videos play and its answers are what was clicked; it does
not say whose a video is; unblinding by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from base64 import b64decode
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from test_align import settings, write_recipe
from tiny import BLUE, GEOMETRY, RED, SMALL, save_pipeline, story

from kvpo.commands.ab import Ab
from kvpo.commands.unblind import Unblind
from kvpo.common.video import read_mp4, write_mp4
from kvpo.evaluation.ab_answers import judge, left_share, read_answers, sign_test, table, wilson
from kvpo.evaluation.ab_pairs import check_alike, draw_pairs
from kvpo.generators import generate as generating
from kvpo.pages.ab import QUESTIONS, write_page

NAMES = list(QUESTIONS)


# --- A browser, spoken to over a pipe ---


def browser() -> str | None:
    found = (
        shutil.which(name)
        for name in (
            "chromium",
            "chromium-browser",
            "google-chrome",
            "chromium-headless-shell",
            "chrome-headless-shell",
        )
    )
    return os.environ.get("KVPO_CHROMIUM") or next(filter(None, found), None)


class Page:
    """A page in headless Chromium; speaks the DevTools protocol: JSON messages that end with a
    zero byte, in by file 3, out by file 4."""

    def __init__(self, profile: Path):
        (read, self.send), (self.receive, write) = os.pipe(), os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", browser(), *options]
        self.process = subprocess.Popen(
            shell, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read), os.close(write)
        self.ids, self.buffer, self.session, self.answers = count(1), b"", None, {}

    def open(self, path: Path, downloads: Path) -> None:
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Page.enable")
        self("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState === 'complete' && !!document.querySelector('.question')")

    def __call__(self, method: str, **params):
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            *whole, self.buffer = self.buffer.split(b"\0")
            self.answers |= {m["id"]: m for m in map(json.loads, whole) if "id" in m}
            if number in self.answers:
                assert "error" not in self.answers[number], self.answers[number]
                return self.answers.pop(number)["result"]
            got = os.read(self.receive, 1 << 16)
            assert got, f"the browser ended, status {self.process.wait()}"
            self.buffer += got

    def run(self, script: str):
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 20.0):
        stop = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < stop, condition
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                text=key if len(key) == 1 and kind == "keyDown" else "",
            )

    def click(self, question: str, side: str) -> None:
        self.run(
            f"document.querySelector('.question[data-name={question}] button[value={side}]').click()"
        )

    def close(self) -> None:
        self("Browser.close")
        self.process.wait(20)
        os.close(self.send), os.close(self.receive)


@pytest.fixture
def visit(tmp_path):
    """Opens pages in one browser profile, one after the other."""
    if browser() is None:
        pytest.skip("no Chromium in PATH or KVPO_CHROMIUM: apt-get install chromium-headless-shell")
    pages = []

    def visit(path: Path) -> Page:
        for page in pages:
            page.close()
        pages[:] = [Page(tmp_path / "profile")]
        pages[0].open(path, tmp_path)
        return pages[0]

    yield visit
    for page in pages:
        page.close()


def clip(colour: tuple[int, int, int], frames: int = 16) -> torch.Tensor:
    video = torch.zeros(frames, 3, 64, 64, dtype=torch.uint8)
    for t in range(frames):
        video[t, :, 8:24, 2 * t : 2 * t + 16] = torch.tensor(colour, dtype=torch.uint8)[
            :, None, None
        ]
    return video


RED_OF_A, BLUE_OF_B = (230, 20, 20), (20, 20, 230)


@pytest.fixture
def study(tmp_path):
    """Three scripts; A's videos are red, B's blue."""
    pairs = draw_pairs(
        [
            story(id="one"),
            story(6, 3, id="two"),
            story(texts=("</script><b>bold & sly</b>",), id="three"),
        ],
        [0],
        5,
    )
    folder = tmp_path / "study"
    for number, pair in enumerate(pairs):
        for name, colour in (("a", RED_OF_A), ("b", BLUE_OF_B)):
            write_mp4(folder / "page" / f"{number:03d}-{pair.side(name)}.mp4", clip(colour))
    write_page(folder / "page", "c0ffee", [pair.script for pair in pairs], GEOMETRY)
    return folder, pairs


# --- The page ---


def test_the_page_in_a_browser(study, visit, tmp_path):
    """A rater's way through: everything is shown, plays, advances, survives a reload and is
    saved as it was clicked."""
    folder, pairs = study
    page = visit(folder / "page" / "index.html")
    facts = page.until(
        "[...document.querySelectorAll('video')].every(v => v.readyState >= 2) && [...document.querySelectorAll('video')].map(v => [v.error, v.duration, v.videoWidth])"
    )
    assert facts == [[None, 1.0, 256]] * 2
    page.until("[...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0)")
    assert (
        page.run("document.querySelectorAll('.question').length") == 4
        and page.run("document.querySelectorAll('b').length") == 0
    )
    assert page.run(
        "[...document.querySelectorAll('#prompts li')].map(x => x.textContent.split(' (from')[0])"
    ) == list(pairs[0].script.texts)

    for name, side in zip(NAMES[:3], ("left", "same", "right")):
        page.click(name, side)
    assert (
        page.run("document.querySelector('.question.asked').dataset.name") == "overall"
        and page.run("state.pair") == 0
    )
    page.press("3")
    assert (
        page.run("state.pair") == 1
        and page.run("document.getElementById('progress').textContent") == "Pair 2 of 3, 1 answered"
    )
    page.press("1")
    page.run(
        "document.getElementById('rater').value = 'Ann Lee'; document.getElementById('rater').oninput()"
    )

    page = visit(folder / "page" / "index.html")  # another day
    assert (
        page.run("state.pair") == 1
        and page.run("document.querySelector('[data-name=VQ] [aria-pressed=true]').value") == "left"
    )
    page.press("Backspace")
    page.click("MQ", "left")  # a second thought does not jump on
    assert page.run("state.pair") == 0
    page.run("document.getElementById('save').click()")
    stop = time.monotonic() + 20
    while not (saved := list(tmp_path.glob("answers-*.json"))):
        assert time.monotonic() < stop, "nothing was downloaded"
        time.sleep(0.05)
    content = json.loads(saved[0].read_text())
    assert saved[0].name == "answers-c0ffee-Ann-Lee.json"
    assert content == {
        "study": "c0ffee",
        "rater": "Ann Lee",
        "answers": [
            {"pair": 0, "VQ": "left", "MQ": "left", "TA": "right", "overall": "right"},
            {"pair": 1, "VQ": "left"},
            {"pair": 2},
        ],
    }


def test_videos_are_shown_on_the_side_the_key_says(study, visit):
    """A's videos are red: the browser's own pixels are asked."""
    folder, pairs = study
    page = visit(folder / "page" / "index.html")
    colours = """new Promise(function (done) { var v = document.getElementById('left'), c = document.createElement('canvas'); c.width = 256; c.height = 256;
        v.pause(); v.onseeked = function () { var x = c.getContext('2d'); x.drawImage(v, 0, 0); done(Array.from(x.getImageData(32, 64, 1, 1).data)); }; v.currentTime = 0; })"""
    for number, pair in enumerate(pairs):
        page.run(f"show({number})")
        page.until(f"state.pair === {number} && videos[0].readyState >= 2")
        red, _, blue, _ = page.run(colours)
        assert (red > 150 > 80 > blue) if pair.left == "a" else (blue > 150 > 80 > red), (
            number,
            pair.left,
            red,
            blue,
        )


def shown(folder: Path) -> dict:
    """The data in a page."""
    return json.loads(
        re.search(
            r'id="data">(.*?)</script>', (folder / "page" / "index.html").read_text(), flags=re.S
        )[1]
    )


def test_the_page_is_a_single_file_that_needs_no_network(study):
    folder, pairs = study
    assert [p.name for p in (folder / "page").iterdir()] == ["index.html"]
    text = (folder / "page" / "index.html").read_text()
    assert not re.search(r"https?:|@import|<link[^>]+href=\"(?!data:)|src=\"(?!data:)", text)
    assert set(shown(folder)) == {"study", "questions", "pairs"} and [
        set(p) for p in shown(folder)["pairs"]
    ] == [{"left", "right", "prompts", "at"}] * len(pairs)


def test_prompt_times_by_hand(study):
    """Blocks of 2 latent frames: block 3 begins at pixel frame 4 * 6 - 3 = 21, at 16 a second."""
    folder, pairs = study
    (at,) = [p["at"] for p, pair in zip(shown(folder)["pairs"], pairs) if pair.script.id == "two"]
    assert at == [0.0, round(21 / 16, 3)]


def test_big_studies_keep_their_videos_beside_the_page(study, visit, monkeypatch):
    folder, pairs = study
    monkeypatch.setattr("kvpo.pages.ab.EMBED", 0)
    for number in range(len(pairs)):
        for side in ("left", "right"):
            write_mp4(folder / "page" / f"{number:03d}-{side}.mp4", clip(RED_OF_A))
    write_page(folder / "page", "c0ffee", [pair.script for pair in pairs], GEOMETRY)
    assert (folder / "page" / "index.html").stat().st_size < 32768 and len(
        list((folder / "page").glob("*.mp4"))
    ) == 6
    assert {v.stat().st_mtime for v in (folder / "page").glob("*.mp4")} == {0}, (
        "times would tell which generator came first"
    )
    page = visit(folder / "page" / "index.html")
    assert page.until("videos.every(v => v.readyState >= 2) && videos.map(v => v.error)") == [
        None,
        None,
    ]


def test_a_video_that_cannot_be_played_is_said(study, visit):
    folder, _ = study
    index = folder / "page" / "index.html"
    index.write_text(
        re.sub(r"data:video/mp4;base64,[^\"]+", "data:video/mp4;base64,AAAA", index.read_text())
    )
    page = visit(index)
    assert "cannot play" in page.until(
        "!document.getElementById('warning').hidden && document.getElementById('warning').textContent"
    )


# --- The draw ---


def test_sides_are_balanced_and_drawn():
    scripts = [story(id=str(i)) for i in range(10)]
    pairs = draw_pairs(scripts, [0, 1], 7)
    assert sorted((p.script.id, p.seed) for p in pairs) == sorted(
        (s.id, seed) for s in scripts for seed in (0, 1)
    )
    assert [p.left for p in pairs].count("a") == 10 and pairs == draw_pairs(scripts, [0, 1], 7)
    assert len({tuple(p.left for p in draw_pairs(scripts, [0, 1], seed)) for seed in range(8)}) == 8
    assert {draw_pairs(scripts[:1], [0], seed)[0].left for seed in range(12)} == {"a", "b"}, (
        "a single pair has no side of its own"
    )


@pytest.fixture
def command(tmp_path, folder):
    """The command for two generators that read other pasts, on two scripts."""
    (tmp_path / "p.txt").write_text(f"{RED}\n{BLUE}\n{SMALL}\n")
    other = save_pipeline(tmp_path / "other", window=5, sink=0)
    return Ab(
        str(folder),
        str(other),
        write_recipe(tmp_path / "r.yaml", settings(folder)),
        str(tmp_path / "p.txt"),
        scripts=2,
        seeds=(3,),
        out=tmp_path / "ab",
        device="cpu",
    )


def test_the_command(command, tmp_path, capsys):
    """The noise is shared, so the pair's first frames are equal and its last are not; what an
    interrupted call left is not made again."""
    seen, write = [], generating.write_video

    def stop_at_third(*args):
        seen.append(args[4])
        if len(seen) == 3:
            raise KeyboardInterrupt
        write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generating, "write_video", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            command()
        assert len(list((command.out / "page").iterdir())) == 2
        with pytest.raises(ValueError, match="holds another study: its key.json differs in pairs"):
            replace(command, seeds=(4,))()
        command()
    assert len(seen) == len(set(seen)) + 1 == 5, "only the one that was stopped comes twice"
    assert "2 pairs" in capsys.readouterr().out
    key = json.loads((command.out / "key.json").read_text())
    assert (key["a"], key["b"]) == (command.a, command.b) and sorted(
        (p["script"], p["seed"]) for p in key["pairs"]
    ) == [("p.txt:1", 3), ("p.txt:2", 3)]
    text = (command.out / "page" / "index.html").read_text()
    assert key["study"] == shown(command.out)["study"] in text and not [
        secret for secret in (command.a, command.b, "p.txt", '"seed"') if secret in text
    ]
    videos = []
    for side in ("left", "right"):
        (tmp_path / "v.mp4").write_bytes(
            b64decode(shown(command.out)["pairs"][0][side].partition(",")[2])
        )
        videos.append(read_mp4(tmp_path / "v.mp4")[0])
    assert (
        len(videos[0]) == GEOMETRY.pixel_frames(12)
        and torch.equal(videos[0][0], videos[1][0])
        and not torch.equal(videos[0][-1], videos[1][-1])
    )
    with pytest.raises(ValueError, match="index.html is there already"):
        command()


def test_generators_of_different_size_are_refused(command, tmp_path):
    """Before the second one makes its videos."""
    check_alike(GEOMETRY, replace(GEOMETRY, window=9))
    with pytest.raises(ValueError, match="not blind"):
        replace(command, b=str(save_pipeline(tmp_path / "faster", fps=24)))()
    assert len(list((command.out / "page").glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "at least one"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"scripts": 1}, "scripts = 1"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        Ab("mini", "mini", out=tmp_path / "ab", device="cpu", **options)()
    assert not (tmp_path / "ab").exists()


# --- Unblinding ---

KEY = {
    "study": "s",
    "a": "new",
    "b": "old",
    "pairs": [
        {"script": "x", "seed": 0, "left": "a"},
        {"script": "x", "seed": 1, "left": "b"},
        {"script": "y", "seed": 0, "left": "b"},
    ],
}


def write_study(folder: Path, *raters: tuple[str, list[dict]]) -> list[Path]:
    (folder / "key.json").write_text(json.dumps(KEY))
    paths = [folder / f"answers{i}.json" for i in range(len(raters))]
    for path, (rater, answers) in zip(paths, raters):
        path.write_text(json.dumps({"study": "s", "rater": rater, "answers": answers}))
    return paths


def test_unblinding_by_hand():
    """x: A won on the left, lost on the right's mirror, a tie by Bo -> (1 + 0 + 1/2) / 3; y: A
    won on the right -> 1."""
    given = {
        "ann": [{"pair": 0, "VQ": "left"}, {"pair": 1, "VQ": "left"}, {"pair": 2, "VQ": "right"}],
        "bo": [{"pair": 0, "VQ": "same"}, {"pair": 1, "TA": "right"}],
    }
    row = judge("VQ", KEY, given)
    assert (
        (row["a"], row["same"], row["b"], row["scripts"]) == (2, 1, 1, 2)
        and row["win"] == pytest.approx((0.5 + 1.0) / 2)
        and row["p"] == 1.0
    )
    assert judge("TA", KEY, given)["win"] == 1.0, "right of a pair whose left is B"
    assert judge("MQ", KEY, given) == {
        "question": "MQ",
        "a": 0,
        "same": 0,
        "b": 0,
        "scripts": 0,
        "win": None,
        "low": None,
        "high": None,
        "p": None,
    }
    assert left_share(given) == pytest.approx(2 / 4)
    assert "nobody answered" in table([judge("MQ", KEY, given)])


def test_exchanging_generators_mirrors_the_result():
    given = {"": [{"pair": 0, "VQ": "left"}, {"pair": 1, "VQ": "same"}, {"pair": 2, "VQ": "left"}]}
    other = KEY | {"pairs": [p | {"left": "b" if p["left"] == "a" else "a"} for p in KEY["pairs"]]}
    one, two = judge("VQ", KEY, given), judge("VQ", other, given)
    assert (
        one["win"] == pytest.approx(1 - two["win"])
        and one["low"] == pytest.approx(1 - two["high"])
        and one["p"] == two["p"]
    )


def test_intervals_and_p_of_textbooks():
    """Wilson of 8 in 10: [0.4902, 0.9433]; of 10 in 10 still open: 1 / (1 + z^2 / 10); sign test
    8 to 2: 2 (1 + 10 + 45) / 1024."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (
        wilson(1.0, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))
        and wilson(0.0, 10)[0] == 0.0
    )
    assert (
        sign_test(8, 2) == pytest.approx(112 / 1024)
        and sign_test(2, 8) == sign_test(8, 2)
        and sign_test(3, 3) == 1.0
        and sign_test(0, 0) == 1.0
    )


def test_the_unblind_command(tmp_path, capsys):
    paths = write_study(
        tmp_path,
        ("ann", [{"pair": 0, "overall": "left"}, {"pair": 2, "overall": "right"}]),
        ("bo", [{"pair": 2, "overall": "same"}]),
    )
    Unblind(tuple(paths), tmp_path / "key.json")()
    result = json.loads((tmp_path / "result.json").read_text())
    (overall,) = [r for r in result["rows"] if r["question"] == "overall"]
    assert (
        result["raters"] == ["ann", "bo"]
        and overall["win"] == pytest.approx((1.0 + 0.75) / 2)
        and overall["p"] == 0.5
        and result["left"] == 0.5
    )
    assert "A = new, B = old" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"study": "t"}, "answers study 't'"),
        (lambda c: c | {"answers": [{"pair": 3}]}, "pairs 0 to 2"),
        (lambda c: c | {"answers": [{"pair": 0, "VQ": "up"}]}, "is no answer"),
        (lambda c: c | {"answers": [{"pair": 0, "beauty": "left"}]}, "is no answer"),
    ],
)
def test_answers_that_do_not_fit_are_refused(tmp_path, change, message):
    (path,) = write_study(tmp_path, ("ann", []))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        Unblind((path,), tmp_path / "key.json")()
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"study": "s", "rater": "ann", "answers": ["left", "right"]}',
            """answer 1 is "left"; it must be an object whose "pair" is a whole number""",
        ),
        (
            '{"study": "s", "rater": "ann", "answers": [{"pair": true, "VQ": "left"}]}',
            "answer 1 is .*true",
        ),
        (
            '{"study": "s", "rater": "ann", "answers": [{"pair": 0}, {"pair": 1.0, "VQ": "left"}]}',
            "answer 2 is .*1.0",
        ),
        ('{"study": "s", "rater": "ann", "answers": [{"pair": "0", "VQ": "left"}]}', "answer 1 is"),
        ('{"study": "s", "rater": "ann", "answers": [{"VQ": "left"}]}', "answer 1 is"),
        (
            '{"study": "s", "rater": "ann", "answers": [{"pair": 0, "VQ": ["left"]}]}',
            "is no answer",
        ),
        (
            '{"study": "s", "rater": "ann", "answers": [{"pair": 0}, {"pair": 0}]}',
            "answers pair 0 twice",
        ),
        ('{"study": "s", "rater": "ann", "answers": {"0": "left"}}', 'has no list "answers"'),
        ('{"study": "s", "rater": "ann"}', 'has no list "answers"'),
        ('{"study": "s", "rater": ["ann"], "answers": []}', "it must be a name"),
        ('[{"pair": 0, "VQ": "left"}]', "is not one object"),
        ('"left"', "is not one object"),
        ("", "must hold one JSON object"),
        ('{"study": "s",\n "answers": [}', "line 2: not JSON"),
        ('{"study": "s", "study": "s"}', "the key 'study' stands there twice"),
    ],
)
def test_answers_that_were_edited_by_hand_are_one_line(tmp_path, text, message):
    """A list, a pair that is a text or a number with a point, an answer without its braces: each
    was a traceback."""
    (path,) = write_study(tmp_path, ("ann", []))
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Unblind((path,), tmp_path / "key.json")()
    assert "answers0.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_answers_and_keys_with_a_byte_order_mark_are_read(tmp_path, encoding):
    """Editors of Windows write one; it was said to be no JSON."""
    (path,) = write_study(tmp_path, ("ann", [{"pair": 0, "VQ": "left"}]))
    for file in (path, tmp_path / "key.json"):
        file.write_bytes(file.read_text().encode(encoding))
    Unblind((path,), tmp_path / "key.json")()
    assert json.loads((tmp_path / "result.json").read_text())["raters"] == ["ann"]


@pytest.mark.parametrize(
    "pairs", [{}, [], ["x"], [{"script": "x", "left": "left"}], [{"script": ["x"], "left": "a"}]]
)
def test_a_key_that_was_edited_by_hand_is_one_line(tmp_path, pairs):
    (path,) = write_study(tmp_path, ("ann", []))
    (tmp_path / "key.json").write_text(json.dumps(KEY | {"pairs": pairs}))
    with pytest.raises(ValueError, match="key.json: its pairs must be a list of objects"):
        Unblind((path,), tmp_path / "key.json")()


def test_files_that_are_something_else_are_refused(tmp_path):
    first, second = write_study(tmp_path, ("ann", []), ("ann", []))
    with pytest.raises(ValueError, match="a file by rater 'ann' is given already"):
        Unblind((first, second), tmp_path / "key.json")()
    with pytest.raises(ValueError, match="is no key of an A/B page"):
        Unblind((first,), first)()
    with pytest.raises(ValueError, match="no answers"):
        Unblind((), tmp_path / "key.json")()
    first.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Unblind((first,), tmp_path / "key.json")()


def test_a_broken_file_of_answers_is_not_told_about_prompts(tmp_path):
    """Its reader is the prompt files': `correct it, or write one prompt a line` was the way out."""
    (tmp_path / "a.json").write_text('{"study": "s", "answers": [')
    with pytest.raises(ValueError, match="line 1: not JSON") as refused:
        read_answers([tmp_path / "a.json"], {"study": "s", "pairs": []})
    assert "prompt" not in str(refused.value) and "the page" in str(refused.value)
