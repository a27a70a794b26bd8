"""The A/B page: pairs of videos, with four questions each.

Answers are kept in the browser and saved as a file.

It opens from a file without a network: style, script and, up to `EMBED`, the videos are inside it.
What makes it is not told whose video is on which side, so it cannot give it away.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from kvpo.common.files import write_atomic
from kvpo.pages.html import HEAD, STYLE

if TYPE_CHECKING:  # the network's libraries, for which nobody who counts answers should wait
    from kvpo.generators.pipeline import Geometry
    from kvpo.types import Script

EMBED = 48 * 2**20
"""Bytes of video up to which the page is a single file; beyond, the videos lie beside it."""
QUESTIONS = {
    "VQ": "Which picture is better: clean, sharp, free of artefacts?",
    "MQ": "Which motion is better: lively, smooth, plausible?",
    "TA": "Which shows better what the prompts ask, each at its time?",
    "overall": "Which video is better, all in all?",
}


def write_page(page: Path, study: str, scripts: Sequence[Script], geometry: Geometry) -> None:
    """Write page/index.html from page/000-left.mp4, page/000-right.mp4 and so on.

    There is a pair for every script. Videos that went into the page are removed.
    """
    videos = list(page.glob("*.mp4"))
    embed = sum(video.stat().st_size for video in videos) <= EMBED
    shown = {
        "study": study,
        "questions": QUESTIONS,
        "pairs": [
            _shown(number, script, page, embed, geometry) for number, script in enumerate(scripts)
        ],
    }
    data = json.dumps(shown).replace("<", "\\u003c")  # a prompt may hold </script>
    write_atomic(
        page / "index.html",
        PAGE.substitute(
            title="Which video is better?", style=STYLE + EXTRA_STYLE, data=data, script=SCRIPT
        ),
    )
    for video in videos:
        if embed:
            video.unlink()
        else:
            # one generator made all of its videos before the other: times would tell
            os.utime(video, (0, 0))


def _shown(number: int, script: Script, page: Path, embed: bool, geometry: Geometry) -> dict:
    """Content of a pair for a rater: two videos, the prompts, and each prompt's first second."""
    paths = {side: page / f"{number:03d}-{side}.mp4" for side in ("left", "right")}
    videos = {
        side: f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
        if embed
        else path.name
        for side, path in paths.items()
    }
    at = [
        round(geometry.pixel_frames(start * geometry.block) / geometry.fps, 3)
        for start in script.starts
    ]
    return {**videos, "prompts": script.texts, "at": at}


PAGE = Template(
    HEAD
    + """<body>
<header><h1>Which video is better?</h1>
<p class="facts">Watch both as often as you like, then answer from top to bottom. Keys: <kbd>1</kbd> left, <kbd>2</kbd> same, <kbd>3</kbd> right,
<kbd>Backspace</kbd> the pair before, <kbd>Enter</kbd> the next, <kbd>Space</kbd> pause. Your answers stay in this browser until you save them as a file.</p></header>
<main>
<p id="progress" role="status"></p>
<p id="warning" class="warnings" role="alert" hidden></p>
<div class="pair"><div class="sides">
<figure><figcaption>Left</figcaption><video id="left" loop muted playsinline aria-label="left video"></video></figure>
<figure><figcaption>Right</figcaption><video id="right" loop muted playsinline aria-label="right video"></video></figure>
</div><ol id="prompts"></ol></div>
<div id="questions"></div>
<nav><button id="back">Pair before</button><button id="next">Next pair</button><button id="again">From the start</button>
<label>Your name or initials <input id="rater" autocomplete="off"></label><button id="save">Save answers</button></nav>
</main>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
"""
)

EXTRA_STYLE = """
main { padding-bottom: 40px; } #progress { font-weight: 600; } video { image-rendering: auto; } .pair { margin-bottom: 18px; } .sides video { max-height: 56vh; object-fit: contain; }
.question { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; padding: 7px 12px; border-left: 3px solid transparent; }
.question.asked { border-color: var(--accent); background: var(--card); } .question span { flex: 1 1 300px; }
button, input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: 5px 14px; }
button { cursor: pointer; } button:hover { border-color: var(--accent); } button[aria-pressed=true] { background: var(--accent); color: var(--paper); border-color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin-top: 20px; } kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; font-size: 12.5px; }
"""

SCRIPT = """
var data = JSON.parse(document.getElementById('data').textContent), slot = 'kvpo-ab-' + data.study, names = Object.keys(data.questions);
var sides = ['left', 'same', 'right'], element = function (id) { return document.getElementById(id); }, videos = [element('left'), element('right')];
var state = kept() || { pair: 0, rater: '', answers: data.pairs.map(function () { return {}; }) };

function kept() { try { return JSON.parse(localStorage.getItem(slot)); } catch (error) { return null; } }
function keep() { try { localStorage.setItem(slot, JSON.stringify(state)); } catch (error) { warn('This browser keeps nothing between visits: save your answers before you close the page.'); } }
function warn(text) { element('warning').textContent = text; element('warning').hidden = false; }
function complete(answer) { return names.every(function (name) { return answer[name]; }); }
function pending() { return names.find(function (name) { return !state.answers[state.pair][name]; }); }

function answer(name, side) {
  var given = state.answers[state.pair], before = complete(given);
  given[name] = side;
  if (!before && complete(given) && state.pair + 1 < data.pairs.length) show(state.pair + 1); else { keep(); paint(); }
}

function show(number) {
  state.pair = Math.max(0, Math.min(data.pairs.length - 1, number));
  var pair = data.pairs[state.pair];
  videos.forEach(function (video) { video.src = pair[video.id]; });
  restart();
  element('prompts').replaceChildren.apply(element('prompts'), pair.prompts.map(function (text, i) {
    var item = document.createElement('li');
    item.textContent = text + (i ? ' (from ' + pair.at[i].toFixed(1) + ' s)' : '');
    return item;
  }));
  keep(); paint();
}

function paint() {
  var done = state.answers.filter(complete).length, asked = pending();
  element('progress').textContent = 'Pair ' + (state.pair + 1) + ' of ' + data.pairs.length + ', ' + done + ' answered' + (done === data.pairs.length ? '. All done: please save your answers.' : '');
  document.querySelectorAll('.question').forEach(function (row) {
    row.classList.toggle('asked', row.dataset.name === asked);
    row.querySelectorAll('button').forEach(function (button) { button.setAttribute('aria-pressed', state.answers[state.pair][row.dataset.name] === button.value); });
  });
}

function play() { videos.forEach(function (video) { video.play().catch(function () {}); }); }  // refused while the page is hidden; Space starts it
function restart() { videos.forEach(function (video) { video.currentTime = 0; }); play(); }

function save() {
  var answers = state.answers.map(function (given, pair) { return Object.assign({ pair: pair }, given); });
  var file = new Blob([JSON.stringify({ study: data.study, rater: state.rater, answers: answers }, null, 1)], { type: 'application/json' });
  var link = document.createElement('a');
  link.href = URL.createObjectURL(file);
  link.download = ['answers', data.study].concat(state.rater.replace(/[^\\w-]+/g, '-') || []).join('-') + '.json';
  link.click();
}

element('questions').replaceChildren.apply(element('questions'), names.map(function (name) {
  var row = document.createElement('div'), text = document.createElement('span');
  row.className = 'question'; row.dataset.name = name; text.textContent = data.questions[name];
  row.append(text);
  sides.forEach(function (side) {
    var button = document.createElement('button');
    button.value = side; button.textContent = side[0].toUpperCase() + side.slice(1);
    button.onclick = function () { answer(name, side); button.blur(); };
    row.append(button);
  });
  return row;
}));
element('back').onclick = function () { show(state.pair - 1); };
element('next').onclick = function () { show(state.pair + 1); };
element('again').onclick = restart;
element('save').onclick = save;
element('rater').value = state.rater;
element('rater').oninput = function () { state.rater = element('rater').value.trim(); keep(); };
videos.forEach(function (video) { video.onerror = function () { warn('This browser cannot play the videos (H.264 in MP4); please open the page in a current Chrome, Edge, Firefox or Safari.'); }; });
videos[0].ontimeupdate = function () {
  if (Math.abs(videos[1].currentTime - videos[0].currentTime) > 0.12) videos[1].currentTime = videos[0].currentTime;
  var at = data.pairs[state.pair].at;
  element('prompts').querySelectorAll('li').forEach(function (item, i) { item.classList.toggle('now', videos[0].currentTime >= at[i] && !(videos[0].currentTime >= at[i + 1])); });
};
document.onkeydown = function (event) {
  if (event.target.tagName === 'INPUT' || event.ctrlKey || event.altKey || event.metaKey) return;
  var side = sides['123'.indexOf(event.key)], asked = pending();
  if (side && asked) answer(asked, side);
  else if (event.key === 'Backspace') show(state.pair - 1);
  else if (event.key === 'Enter') show(state.pair + 1);
  else if (event.key === ' ') { if (videos[0].paused) play(); else videos.forEach(function (video) { video.pause(); }); }
  else return;
  event.preventDefault();
};
show(state.pair);
"""
