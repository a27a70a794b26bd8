// The strip: a thumbnail of every block of the story as it is told now, under a lane of prompts.

import { paint } from "./player.js";

export const MOST = 240;   // blocks whose frames are kept in the page

export class Store {
  constructor() { this.blocks = new Map(); }   // "node:number" -> block; the oldest first

  put(block) {
    const key = `${block.node}:${block.number}`;
    this.blocks.delete(key);
    this.blocks.set(key, block);
    while (this.blocks.size > MOST) this.blocks.delete(this.blocks.keys().next().value);
    return block;
  }

  get(node, number) { return this.blocks.get(`${node}:${number}`); }
  clear() { this.blocks.clear(); }
}

export class Strip {
  constructor(element, store, frames, onSelect) {
    Object.assign(this, { element, store, frames, onSelect });
    this.story = null;
    this.selected = null;
    this.playing = null;
    element.addEventListener("keydown", (event) => this.step(event));
  }

  // Node that a block of the present path belongs to.
  owner(number) {
    const { path, nodes } = this.story;
    let found = path[0];
    for (const node of path) if (nodes[node].first <= number) found = node;
    return found;
  }

  numbers() {
    const found = [];
    for (const block of this.store.blocks.values())
      if (this.owner(block.number) === block.node) found.push(block.number);
    return found.sort((a, b) => a - b);
  }

  // Frames of the present path that the page has, and the block and frame at a place among them.
  get frameCount() { return this.path().reduce((sum, block) => sum + block.frames, 0); }

  path() { return this.numbers().map((number) => this.store.get(this.owner(number), number)); }

  frameAt(place) {
    for (const block of this.path()) {
      if (place < block.frames) return [block, place];
      place -= block.frames;
    }
    return null;
  }

  placeOf(number) { return this.path().reduce((sum, block) => sum + (block.number < number ? block.frames : 0), 0); }

  show(story) {
    this.story = story;
    const numbers = this.numbers();
    const there = new Map([...this.element.querySelectorAll(".block")].map((e) => [e.dataset.key, e]));
    this.element.replaceChildren();
    const first = numbers[0] ?? 0;
    numbers.forEach((number) => {
      const block = this.store.get(this.owner(number), number);
      const key = `${block.node}:${number}:${block.serial}`;
      const tile = there.get(key) ?? this.tile(block, key);
      tile.style.gridColumn = String(number - first + 1);
      this.element.append(tile);
    });
    this.prompts(first, numbers.at(-1) ?? -1);
    this.mark();
  }

  prompts(first, last) {
    const starts = Object.keys(this.story.prompts).map(Number).sort((a, b) => a - b);
    starts.forEach((start, i) => {
      const [from, stop] = [Math.max(start, first), Math.min(starts[i + 1] ?? Infinity, last + 1)];
      if (from >= stop) return;
      const lane = document.createElement("div");
      lane.className = "prompt";
      lane.title = this.story.prompts[start];
      lane.append(Object.assign(document.createElement("span"), { textContent: lane.title }));
      lane.style.gridColumn = `${from - first + 1} / ${stop - first + 1}`;
      this.element.prepend(lane);
    });
  }

  tile(block, key) {
    const tile = document.createElement("button");
    tile.type = "button";
    tile.className = "block";
    tile.dataset.key = key;
    tile.dataset.number = block.number;
    tile.setAttribute("aria-label", `Block ${block.number}`);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    createImageBitmap(block.strips[0], { resizeWidth: Math.min(block.width, 96), resizeQuality: "pixelated" })
      .then((picture) => { paint(canvas, block, picture, 0); picture.close(); });
    const ticks = document.createElement("span");
    ticks.className = "ticks";
    for (let i = 0; i < this.frames; i += 1) ticks.append(document.createElement("i"));
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = block.number;
    tile.append(canvas, ticks, number);
    tile.addEventListener("click", () => this.onSelect(block));
    return tile;
  }

  select(number) { this.selected = number; this.mark(); }

  play(number) {
    this.playing = number;
    this.mark();
    if (!this.element.contains(document.activeElement)) {
      const tile = this.element.querySelector(".block.playing");
      if (tile) this.element.scrollLeft = tile.offsetLeft - this.element.clientWidth + 2 * tile.offsetWidth;
    }
  }

  mark() {
    const forks = new Set(this.story?.path.filter((n) => this.story.nodes[n].fork).map((n) => this.story.nodes[n].first));
    for (const tile of this.element.querySelectorAll(".block")) {
      const number = Number(tile.dataset.number);
      tile.setAttribute("aria-pressed", String(number === this.selected));
      tile.classList.toggle("playing", number === this.playing);
      tile.classList.toggle("chosen", forks.has(number));
    }
  }

  // Lights the latent frames that a branch reads.
  light(frames) {
    const lit = new Set(frames);
    for (const tile of this.element.querySelectorAll(".block")) {
      const first = Number(tile.dataset.number) * this.frames;
      [...tile.querySelectorAll("i")].forEach((tick, i) => tick.classList.toggle("lit", lit.has(first + i)));
    }
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const tiles = [...this.element.querySelectorAll(".block")];
    const next = tiles[tiles.indexOf(document.activeElement) + by];
    if (next) { next.focus(); event.preventDefault(); }
  }
}
