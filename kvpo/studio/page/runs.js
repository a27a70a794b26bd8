// The pane of runs: a list, and the curves of one or two of them, while they are trained.

import { figure, rangeOf } from "./curves.js";
import { ask, Pane } from "./panes.js";

const [MOST, EVERY] = [2, 3];   // runs side by side; seconds between looks

export function ago(seconds) {
  if (seconds < 90) return `${seconds} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

export class Runs extends Pane {
  constructor() {
    super("runs", () => this.draw());
    [this.list, this.none, this.sides] = ["run-list", "run-none", "run-sides"].map((id) => document.getElementById(id));
    this.lines = new Map();   // name -> its line in the list
    this.chosen = [];
    this.drawn = "";
  }

  async draw() {
    const runs = await ask("runs");
    this.none.hidden = runs.length > 0;
    const names = runs.map((run) => run.name);
    for (const name of this.lines.keys()) if (!names.includes(name)) { this.lines.get(name).remove(); this.lines.delete(name); }
    const whole = runs.filter((run) => !run.fault).map((run) => run.name);
    this.chosen = this.chosen.filter((name) => whole.includes(name));
    const fresh = this.lines.size === 0;
    for (const run of runs) this.line(run);
    if (!this.list.contains(document.activeElement)) this.list.append(...names.map((name) => this.lines.get(name)));   // the focus stays where it is
    if (fresh && whole.length) this.choose(whole[0]);
    await this.curves();
    return EVERY;
  }

  line(run) {
    if (!this.lines.has(run.name)) {
      const [line, button, facts] = [document.createElement("li"), document.createElement("button"), document.createElement("span")];
      button.type = "button";
      button.textContent = run.name;
      button.addEventListener("click", () => { this.choose(run.name); this.again(0); });
      facts.className = "hint";
      line.append(button, facts);
      this.lines.set(run.name, line);
      this.list.append(line);
    }
    const [button, facts] = this.lines.get(run.name).children;
    button.disabled = Boolean(run.fault);
    button.setAttribute("aria-pressed", String(this.chosen.includes(run.name)));
    facts.textContent = run.fault ?? `step ${run.step}${run.steps ? ` of ${run.steps}` : ""}, ${run.method}, written ${ago(run.seconds_ago)}`;
  }

  // A second one stands beside the first, a third takes the place of the one chosen longest ago.
  choose(name) {
    this.chosen = this.chosen.includes(name) ? this.chosen.filter((other) => other !== name) : [...this.chosen, name].slice(-MOST);
    for (const [other, line] of this.lines) line.firstElementChild.setAttribute("aria-pressed", String(this.chosen.includes(other)));
  }

  async curves() {
    const runs = await Promise.all(this.chosen.map((name) => ask(`runs/${encodeURIComponent(name)}/curves`)));
    const facts = JSON.stringify(runs.map(({ seconds_ago: _, ...rest }) => rest));
    if (facts === this.drawn) return;
    this.drawn = facts;
    this.sides.replaceChildren(...runs.map((run) => side(run, runs)));
  }
}

function side(run, runs) {
  const [found, head, facts] = [document.createElement("section"), document.createElement("h3"), document.createElement("p")];
  head.textContent = run.name;
  facts.className = "hint";
  facts.textContent = `${run.method}; trained on ${run.rewards.join(", ") || "unknown rewards"}. `;
  if (run.report) facts.append(reportLink(run.name));
  found.setAttribute("aria-label", `Run ${run.name}`);
  found.append(head, facts, charts(run, runs));
  return found;
}

export function reportLink(name) {
  const link = document.createElement("a");
  link.href = `runs/${encodeURIComponent(name)}/report.html`;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.textContent = "Report (opens a new tab)";
  return link;
}

// Charts of a run; those of the same title have the same scale in all runs that are shown.
export function charts(run, runs = [run]) {
  const found = document.createElement("div");
  found.className = "charts";
  for (const chart of run.charts) {
    const alike = runs.flatMap((other) => other.charts.filter(({ title }) => title === chart.title));
    found.append(figure(chart, rangeOf(alike)));
  }
  if (!run.charts.length) {
    const none = document.createElement("p");
    none.className = "hint";
    none.textContent = "Nothing has been logged yet; the first step takes longest.";
    found.append(none);
  }
  return found;
}
