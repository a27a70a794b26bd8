// The studio's page: what a person asks goes to the server, what it sends is shown.

import { Fork } from "./fork.js";
import { Learn } from "./learn.js";
import { Link } from "./link.js";
import { navigate, Pane, tell } from "./panes.js";
import { Player } from "./player.js";
import { Runs } from "./runs.js";
import { Store, Strip } from "./strip.js";

const ids = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const link = new Link();
const store = new Store();
let hello = null;
let story = null;
let asked = null;        // when a first frame was asked for, ms
let selected = null;     // the block that is looked at
let draw = 0;
let fresh = false;       // another story was asked for, whose blocks replace all that are there

const player = new Player(ids.screen, (block) => {
  link.saw(block.serial);
  strip.play(block.number);
  ids["fact-block"].textContent = block.number;
  ids.scrub.value = strip.placeOf(block.number);
  ids.screen.setAttribute("aria-label", `Block ${block.number} of the story`);
  if (asked !== null) {
    ids["fact-first"].textContent = `${((performance.now() - asked) / 1000).toFixed(2)} s`;
    asked = null;
  }
});
const strip = new Strip(ids.strip, store, 3, (block) => { select(block); ids.scrub.value = strip.placeOf(block.number); });
const fork = new Fork(link, strip);

function say(text) { if (ids.status.textContent !== text) ids.status.textContent = text; }

function buttons() {
  const [there, forked] = [story !== null, fork.open];
  ids.scrub.disabled = !there || forked;
  ids.pause.disabled = ids.restart.disabled = ids.save.disabled = !there || forked;
  ids.undo.disabled = !there || forked || story.nodes[story.at].parent === null;
  ids.new.disabled = ids.name.disabled = ids.rename.disabled = !there;
  ids.pause.textContent = !there || story.playing ? "Pause" : "Go on";
  ids.go.textContent = there ? "Switch" : "Play";
  ids.go.disabled = forked || hello === null;
  ids.hint.textContent = there ? "Another prompt takes over at the next block that is made." : "Type a prompt and press play.";
}

function show() {
  strip.show(story);
  ids.scrub.max = Math.max(0, strip.frameCount - 1);
}

function begin() {
  const seed = ids.seed.valueAsNumber;
  if (!Number.isInteger(seed)) { tell("The seed is a whole number, 0 or more."); return; }
  fork.end();
  player.clear();
  player.paused = false;
  asked = performance.now();
  fresh = true;
  say("Beginning …");
  link.say("rater", { label: ids.rater.value.trim() || "rater" });
  link.say("begin", { prompt: ids.prompt.value, seed });
}

function select(block, frame = 0) {
  selected = block;
  strip.select(block.number);
  if (!player.paused && story?.playing) { player.paused = true; link.say("pause"); }
  player.still(block, frame);
  ids["fork-form"].hidden = fork.open;
  ids["fork-where"].textContent = `Block ${block.number}`;
  ids["fact-block"].textContent = block.number;
}

function jump() {       // what is on its way was made for another place in the story
  player.clear();
  link.saw(link.received);
}

function askFork() {
  link.say("fork", {
    block: selected.number, by: ids["fork-by"].value, branches: ids["fork-branches"].valueAsNumber,
    window: ids["fork-window"].valueAsNumber, draw,
  });
  say("Forking …");
}

// --- What a person does ---

ids.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  tell("");
  if (!story) { begin(); return; }
  if (!story.playing) { asked = performance.now(); player.paused = false; jump(); }
  link.say("say", { prompt: ids.prompt.value });
  if (!story.playing) link.say("play");
});
ids.scrub.addEventListener("input", () => {
  const found = strip.frameAt(ids.scrub.valueAsNumber);
  if (found) select(...found);
});
ids.new.addEventListener("click", () => { tell(""); begin(); });
ids.pause.addEventListener("click", () => {
  tell("");
  const pausing = story.playing;
  player.paused = pausing;
  if (!pausing) { strip.select(null); ids["fork-form"].hidden = true; }
  link.say(pausing ? "pause" : "play");
});
ids.restart.addEventListener("click", () => {
  tell("");
  jump();
  player.paused = false;
  asked = performance.now();
  link.say("restart");
});
ids.undo.addEventListener("click", () => { tell(""); jump(); link.say("undo"); });
ids.save.addEventListener("click", () => { tell(""); player.paused = true; ids.saved.hidden = true; link.say("save"); });
ids["fork-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  tell("");
  draw = 0;
  jump();
  askFork();
});
ids["fork-by"].addEventListener("change", () => { ids["fork-window"].value = hello.explorers[ids["fork-by"].value]; });
ids.redraw.addEventListener("click", () => { draw += 1; link.say("leave"); askFork(); });
ids.leave.addEventListener("click", () => link.say("leave"));
ids["name-form"].addEventListener("submit", (event) => { event.preventDefault(); tell(""); link.say("name", { name: ids.name.value }); });
ids.rater.addEventListener("change", () => link.say("rater", { label: ids.rater.value.trim() || "rater" }));

// --- What the server says ---

link.addEventListener("hello", ({ detail }) => {
  hello = detail;
  ids.generator.textContent = detail.generator;
  player.fps = fork.fps = detail.fps;
  strip.frames = detail.block;
  if (!ids["fork-by"].options.length) {
    for (const name of Object.keys(detail.explorers)) ids["fork-by"].add(new Option(name.replace("_", " "), name));
    ids["fork-window"].value = Object.values(detail.explorers)[0];
    ids["fork-branches"].value = detail.branches;
    ids["fork-branches"].max = detail.most_branches;
  }
  stories(detail.stories);
  say("Ready");
  link.say("rater", { label: ids.rater.value.trim() || "rater" });
  if (story) { fork.end(); player.clear(); link.say("open", { name: story.name }); say("Going on …"); }
  buttons();
});

link.addEventListener("block", ({ detail: block }) => {
  if (block.kind === "branch") { link.saw(block.serial); fork.push(block); return; }
  store.put(block);
  if (story) show();
  if (block.kind === "live") {
    player.push(block);
    ids["fact-rate"].textContent = `${(block.frames / block.seconds).toFixed(1)} frames/s`;
    say("Playing");
  } else {
    link.saw(block.serial);
    player.still(block, block.frames - 1);
    strip.play(block.number);
    ids["fact-block"].textContent = block.number;
    ids.scrub.value = strip.placeOf(block.number) + block.frames - 1;
    say(`Telling block ${block.number} again`);
  }
});

link.addEventListener("story", ({ detail }) => {
  if (fresh && (detail.name !== story?.name || detail.block === 0)) {
    store.clear();
    selected = null;
    fresh = false;
    ids["fork-form"].hidden = ids.saved.hidden = true;
  }
  story = detail;
  show();
  ids["fact-seed"].textContent = story.seed;
  if (!ids.name.matches(":focus")) ids.name.value = story.name;
  if (fork.open && !detail.playing && fork.blocks.length === 0) fork.end();
  if (!story.playing) say(fork.open ? "Choose a branch" : "Paused");
  tree();
  buttons();
});

link.addEventListener("queue", ({ detail: { before, behind } }) => {
  if (before) say(`The generator is busy: ${before} before you`);
  else if (behind) say(`Playing; ${behind} waiting for the generator`);
});

link.addEventListener("fork", ({ detail }) => { player.paused = true; fork.begin(detail); ids["fork-form"].hidden = true; buttons(); });
link.addEventListener("forked", () => { fork.whole(); say("Choose a branch"); });
link.addEventListener("left", () => { fork.end(); ids["fork-form"].hidden = selected === null; buttons(); });
link.addEventListener("chosen", ({ detail: { node, row } }) => {
  const blocks = fork.taken(node, row);
  fork.end();
  selected = null;
  strip.select(null);
  jump();
  player.paused = false;
  for (const block of blocks) { store.put(block); player.push(block); }
  say("Going on from your choice");
});
link.addEventListener("rated", ({ detail }) => say(`Recorded: ${detail.answer}`));
link.addEventListener("error", ({ detail }) => { fresh = false; tell(detail.message); if (fork.open && fork.facts && !ids.branches.querySelector("button:enabled") && fork.blocks.length) fork.whole(); });
link.addEventListener("note", ({ detail }) => tell(detail.message, true));
link.addEventListener("opened", ({ detail: { blocks, same } }) => {
  tell(same === blocks ? `All ${blocks} blocks came out as before, bit for bit.` : `${blocks - same} of ${blocks} blocks came out otherwise than before: another machine, precision or number of threads.`, true);
});
link.addEventListener("saving", ({ detail: { block, of } }) => say(`Saving: block ${block} of ${of}`));
link.addEventListener("saved", ({ detail }) => {
  Object.assign(ids.saved, { href: detail.file, textContent: detail.name, hidden: false });
  ids.saved.download = detail.name;
  say("Saved");
});
link.addEventListener("stories", ({ detail }) => stories(detail.stories));
link.addEventListener("lost", ({ detail: { again, wait } }) => {
  say(again ? `The studio can not be reached; trying again in ${wait / 1000} s` : "The studio has closed this tab");
});

// --- Lists ---

function item(text, current, act) {
  const [line, button] = [document.createElement("li"), document.createElement("button")];
  button.type = "button";
  button.textContent = text;
  if (current) button.setAttribute("aria-current", "true");
  button.addEventListener("click", act);
  line.append(button);
  return line;
}

function about(node) {
  const [own] = Object.values(node.prompts);
  if (node.parent === null) return `${own}`;
  if (!node.fork) return `block ${node.first}: “${own}”`;
  const row = node.chosen === node.fork.branches ? "anchor" : `branch ${node.chosen + 1}`;
  return `block ${node.first}: ${row} of ${node.fork.branches}, ${node.fork.by.replace("_", " ")}`;
}

function tree() {
  const lists = new Map();
  const top = document.createElement("ul");
  story.nodes.forEach((node, number) => {
    const line = item(about(node), number === story.at, () => {
      tell("");
      jump();
      link.say("go", { node: number, block: node.stop });
    });
    (node.parent === null ? top : lists.get(node.parent)).append(line);
    const below = document.createElement("ul");
    line.append(below);
    lists.set(number, below);
  });
  ids.tree.replaceChildren(...top.children);
}

function stories(names) {
  const lines = names.map((name) => item(name, name === story?.name, () => {
    tell("");
    fork.end();
    fresh = true;
    jump();
    link.say("open", { name });
  }));
  if (!lines.length) {
    const none = document.createElement("li");
    none.className = "hint";
    none.textContent = "Stories that were told are listed here; they are saved by themselves.";
    lines.push(none);
  }
  ids.stories.replaceChildren(...lines);
}

buttons();
navigate([new Pane("tell", async () => null), new Learn(), new Runs()]);
link.open();
