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
  link.download = ['answers', data.study].concat(state.rater.replace(/[^\w-]+/g, '-') || []).join('-') + '.json';
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
