// The blind comparison: two videos of equal noise, start and trained, in an order that only the server knows.

import { ask, tell } from "./panes.js";

const KEYS = { ArrowLeft: "left", ArrowRight: "right", s: "same", S: "same" };

export class Blind {
  constructor(onState) {
    this.onState = onState;
    this.ids = Object.fromEntries(["blind", "blind-hint", "blind-left", "blind-right", "blind-result", "rater"].map((id) => [id, document.getElementById(id)]));
    this.asked = "";      // the pair that is shown
    this.busy = false;
    for (const video of this.videos) video.addEventListener("error", () => {
      if (video.hasAttribute("src")) tell("A video of this pair can not be shown: its file is gone, or this browser plays no H.264. Reload the page, or make the videos again.");
    });
    for (const button of this.ids.blind.querySelectorAll("[data-answer]")) button.addEventListener("click", () => this.answer(button.dataset.answer));
    this.ids.blind.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === " " && event.target === this.ids.blind) { this.pause(); event.preventDefault(); return; }
      const answer = KEYS[event.key];
      if (answer) { this.answer(answer); event.preventDefault(); }
    });
  }

  get videos() { return [this.ids["blind-left"], this.ids["blind-right"]]; }

  show(state) {
    this.state = state;
    const asking = state !== null && state.ready && state.answered < state.pairs;
    this.ids.blind.hidden = !asking;
    this.result(state?.result ?? null);
    if (!asking) { this.asked = ""; for (const video of this.videos) video.removeAttribute("src"); return; }
    const pair = `${state.name}/${state.answered}`;
    if (pair === this.asked) return;
    const first = this.asked === "";
    this.asked = pair;
    this.videos.forEach((video, i) => { video.src = `blind/${pair}/${i ? "right" : "left"}.mp4`; });
    Promise.all(this.videos.map((video) => video.play())).catch(() => {});   // paused, or another pair came
    this.ids["blind-hint"].textContent = `Which is better? Pair ${state.answered + 1} of ${state.pairs}. Keys: left arrow, right arrow, S for the same, space to pause.`;
    if (!first) this.ids.blind.focus({ preventScroll: true });
  }

  pause() {
    const playing = this.videos.some((video) => !video.paused);
    for (const video of this.videos) if (playing) video.pause(); else video.play().catch(() => {});
  }

  async answer(answer) {
    if (this.busy || this.ids.blind.hidden) return;
    this.busy = true;
    tell("");
    const { name, answered } = this.state;
    try {
      this.onState(await ask("learn/answer", { name, place: answered, answer, rater: this.ids.rater.value.trim() || "rater" }));
      if (this.ids.blind.hidden) this.ids["blind-result"].focus();
    } catch (error) { tell(error.message); } finally { this.busy = false; }
  }

  result(found) {
    this.ids["blind-result"].hidden = found === null;
    if (found === null) return;
    const [low, high] = found.interval.map((share) => `${Math.round(share * 100)}\u00a0%`);
    const verdict = found.interval[0] > 0.5 ? "You prefer the trained weights." : found.interval[1] < 0.5 ? "You prefer the start." : "Neither is clearly better: the interval holds 50\u00a0%.";
    const text = `The trained weights won ${found.trained} of ${found.answers} pairs, the start ${found.start}, ${found.same} were the same: win rate ${Math.round(found.win_rate * 100)}\u00a0%, 95\u00a0% interval ${low} to ${high}. ${verdict}`;
    if (this.ids["blind-result"].textContent !== text) this.ids["blind-result"].textContent = text;
  }
}
