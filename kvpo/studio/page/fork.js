// The fork: all branches and the anchor in step, what each reads, the choice, and pairs.

import { paint } from "./player.js";

const WIDEST = 320;   // pixels of a branch's picture

export function ranges(frames) {
  const found = [];
  for (const frame of frames) {
    const last = found.at(-1);
    if (last && frame === last[1] + 1) last[1] = frame; else found.push([frame, frame]);
  }
  return found.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}

export class Fork {
  constructor(link, strip) {
    Object.assign(this, { link, strip });
    this.ids = Object.fromEntries(["fork", "fork-hint", "branches", "compare", "pair", "pair-left", "pair-right", "pair-hint"].map((id) => [id, document.getElementById(id)]));
    this.facts = null;
    this.blocks = [];      // of the window, each with a picture a row
    this.pointed = null;
    this.pairs = [];
    this.fps = 16;
    link.addEventListener("scored", ({ detail }) => this.scored(detail));
    this.ids.compare.addEventListener("click", () => this.beginPairs());
    document.getElementById("pair-end").addEventListener("click", () => this.endPairs());
    for (const button of this.ids.pair.querySelectorAll("[data-answer]"))
      button.addEventListener("click", () => this.answer(button.dataset.answer));
    this.ids.pair.addEventListener("keydown", (event) => {
      const answer = { ArrowLeft: "left", ArrowRight: "right", s: "same", S: "same" }[event.key];
      if (answer) { this.answer(answer); event.preventDefault(); }
    });
    requestAnimationFrame((now) => this.tick(now));
  }

  get open() { return this.facts !== null; }

  begin(facts) {
    this.end();
    this.facts = facts;
    this.ids.fork.hidden = false;
    this.ids["fork-hint"].textContent = `Block ${facts.block}, ${facts.by.replace("_", " ")}: the branches are being made …`;
    this.ids.branches.replaceChildren(...Array.from({ length: facts.rows }, (_, row) => this.tile(row)));
    this.ids.fork.scrollIntoView({ block: "nearest" });
  }

  name(row) { return row === this.facts.rows - 1 ? "Anchor" : `Branch ${row + 1}`; }

  tile(row) {
    const figure = document.createElement("figure");
    figure.className = "branch";
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", this.name(row));
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = row === this.facts.rows - 1 ? "Choose anchor" : `Choose branch ${row + 1}`;
    button.disabled = true;
    button.addEventListener("click", () => this.choose(row));
    const reads = document.createElement("p");
    reads.id = `reads-${row}`;
    reads.textContent = `${this.name(row)} reads frames ${ranges(this.facts.reads[row][0])}`;
    const scores = document.createElement("p");
    scores.id = `scores-${row}`;
    scores.className = "scores";
    button.setAttribute("aria-describedby", `${reads.id} ${scores.id}`);
    figure.append(canvas, button, reads, scores);
    for (const event of ["pointerenter", "focusin"]) figure.addEventListener(event, () => this.point(row));
    for (const event of ["pointerleave", "focusout"]) figure.addEventListener(event, () => this.point(null));
    return figure;
  }

  point(row) {
    this.pointed = row;
    [...this.ids.branches.children].forEach((tile, i) => tile.classList.toggle("shown", i === row));
    this.light();
  }

  light() {
    const at = Math.min(this.at ?? 0, this.facts ? this.facts.reads[0].length - 1 : 0);
    this.strip.light(this.pointed === null || !this.facts ? [] : this.facts.reads[this.pointed][at]);
  }

  async push(block) {
    const width = Math.min(block.width, WIDEST);
    const pictures = await Promise.all(block.strips.map((s) => createImageBitmap(s, { resizeWidth: width })));
    if (!this.open) { pictures.forEach((p) => p.close()); return; }
    this.blocks.push({ block, pictures });
    this.blocks.sort((a, b) => a.block.number - b.block.number);
    if (this.blocks.length === 1) this.begun = performance.now();
  }

  whole() {
    this.ids["fork-hint"].textContent = `Block ${this.facts.block}: point at a branch to see in the story what it reads, choose one to go on from it.`;
    for (const button of this.ids.branches.querySelectorAll("button")) button.disabled = false;
    this.ids.compare.disabled = document.getElementById("redraw").disabled = false;
    this.ids.branches.querySelector("button").focus({ preventScroll: true });
  }

  // What the recipe's rewards say of each row; the best one is marked.
  scored({ names, rows, best }) {
    if (!this.open) return;
    [...this.ids.branches.children].forEach((tile, row) => {
      const said = names.map((name, i) => `${name} ${rows[row][i] === null ? "–" : rows[row][i].toFixed(3)}`).join(" · ");
      tile.classList.toggle("best", row === best);
      tile.querySelector(".scores").textContent = row === best ? `★ Best: ${said}` : said;
    });
  }

  choose(row) {
    for (const button of this.ids.branches.querySelectorAll("button")) button.disabled = true;
    this.link.say("choose", { row });
  }

  // Gives the chosen row's blocks as those of a node, for the strip.
  taken(node, row) {
    return this.blocks.map(({ block }) => ({ ...block, node, strips: [block.strips[row]], sizes: [block.sizes[row]] }));
  }

  end() {
    this.endPairs();
    for (const { pictures } of this.blocks) pictures.forEach((p) => p.close());
    this.blocks = [];
    this.pointed = this.facts = null;
    this.strip.light([]);
    this.ids.fork.hidden = true;
    this.ids.compare.disabled = document.getElementById("redraw").disabled = true;
  }

  tick(now) {
    requestAnimationFrame((later) => this.tick(later));
    const total = this.blocks.reduce((sum, { block }) => sum + block.frames, 0);
    if (!total) return;
    let frame = Math.floor((now - this.begun) * this.fps / 1000) % total;
    let at = 0;
    while (frame >= this.blocks[at].block.frames) { frame -= this.blocks[at].block.frames; at += 1; }
    if (at !== this.at) { this.at = at; this.light(); }
    const { block, pictures } = this.blocks[at];
    [...this.ids.branches.children].forEach((tile, row) => paint(tile.firstChild, block, pictures[row], frame));
    if (this.pair) {
      paint(this.ids["pair-left"], block, pictures[this.pair[0]], frame);
      paint(this.ids["pair-right"], block, pictures[this.pair[1]], frame);
    }
  }

  // --- Pairs: in any order, sides drawn, nothing says which branch is which ---

  beginPairs() {
    const rows = this.facts.rows;
    this.pairs = [];
    for (let a = 0; a < rows; a += 1)
      for (let b = 0; b < a; b += 1) this.pairs.push(Math.random() < 0.5 ? [a, b] : [b, a]);
    this.pairs = this.pairs.map((pair) => [Math.random(), pair]).sort((x, y) => x[0] - y[0]).map(([, pair]) => pair);
    this.asked = 0;
    this.ids.branches.hidden = true;
    this.ids.pair.hidden = false;
    this.nextPair();
    this.ids.pair.focus();
  }

  nextPair() {
    this.pair = this.pairs.pop() ?? null;
    if (!this.pair) { this.endPairs(); return; }
    this.ids["pair-hint"].textContent = `Which is better? Pair ${this.asked + 1} of ${this.asked + 1 + this.pairs.length}. Keys: left arrow, right arrow, S for the same.`;
  }

  answer(answer) {
    if (!this.pair) return;
    this.link.say("pair", { left: this.pair[0], right: this.pair[1], answer });
    this.asked += 1;
    this.nextPair();
  }

  endPairs() {
    this.pair = null;
    this.ids.pair.hidden = true;
    this.ids.branches.hidden = false;
  }
}
