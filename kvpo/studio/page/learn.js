// The pane of learning: a preference fitted to the choices, a run aligned to it, a blind comparison.

import { Blind } from "./blind.js";
import { shown } from "./curves.js";
import { ask, Pane, tell } from "./panes.js";
import { charts, reportLink } from "./runs.js";

const IDS = ["learn-answers", "fit-go", "fit-stop", "fit-said", "taste", "taste-facts", "taste-bins", "taste-raters", "align-go", "align-stop", "align-resume",
  "align-said", "align-step", "align-bar", "align-report", "align-charts", "compare-go", "compare-stop", "compare-said", "learn-recipe", "fit-far", "align-far", "compare-far"];
const SAID = {
  fit: { working: "Fitting: clips are measured, then the model is judged on stories it has not seen …", stopped: "Stopped.", failed: "No preference: ", done: "", none: "" },
  align: { working: "Training …", stopped: "Stopped; what was trained is saved.", failed: "The training ended: ", done: "Trained.", none: "" },
  compare: { working: "The videos are being made …", stopped: "Stopped; the videos that are there stay.", failed: "No comparison: ", done: "", none: "" },
};
const percent = (share) => `${Math.round(share * 100)}\u00a0%`;

export class Learn extends Pane {
  constructor() {
    super("learn", async () => { this.take(await ask("learn")); return this.state.working ? 2 : 10; });
    this.ids = Object.fromEntries(IDS.map((id) => [id, document.getElementById(id)]));
    this.blind = new Blind((state) => this.take(state));
    this.drawn = {};
    for (const kind of ["fit", "align", "compare"]) {
      this.ids[`${kind}-go`].addEventListener("click", () => this.do(kind));
      this.ids[`${kind}-stop`].addEventListener("click", () => this.do("stop", { kind }));
    }
    this.ids["align-resume"].addEventListener("click", () => this.do("resume"));
  }

  async do(what, facts = {}) {
    tell("");
    try { this.take(await ask(`learn/${what}`, facts)); } catch (error) { tell(error.message); }
    this.again(1);
  }

  take(state) {
    this.state = state;
    const { working, fit, align, compare, taste, run } = state;
    this.answers(state.answers);
    for (const [kind, work] of Object.entries({ fit, align, compare })) {
      this.ids[`${kind}-go`].disabled = working !== "";
      this.ids[`${kind}-stop`].hidden = work.state !== "working";
      this.say(`${kind}-said`, SAID[kind][work.state] + (work.state === "failed" ? work.said : ""));
      this.say(`${kind}-far`, work.far.startsWith("step") ? "" : work.far);   // no status, and steps are told below
    }
    this.ids["fit-go"].disabled ||= !state.answers?.answers;
    this.ids["align-go"].disabled ||= taste === null;
    this.ids["align-resume"].hidden = align.state !== "stopped";
    this.ids["align-resume"].disabled = working !== "";
    this.ids["compare-go"].disabled ||= !["done", "stopped"].includes(align.state);
    this.ids["learn-recipe"].textContent = state.recipe;
    if (state.faults.length) tell(state.faults.join("; "));
    this.once("taste", taste, () => this.taste(taste));
    this.progress(align, run);
    this.blind.show(state.blind);
  }

  say(id, text) { if (this.ids[id].textContent !== text) this.ids[id].textContent = text; }

  // Draws only what has changed, so that focus and reading are not disturbed.
  once(name, facts, draw) {
    const text = JSON.stringify(facts);
    if (this.drawn[name] === text) return;
    this.drawn[name] = text;
    draw();
  }

  answers(found) {
    if (found === null) return;
    const raters = Object.entries(found.by_rater).map(([name, count]) => `${name} ${count}`).join(", ");
    this.say("learn-answers", found.answers ? `${found.answers} answers in ${found.stories} stories: ${raters}.` : "No answers yet: fork a story, choose a branch or compare in pairs, in several stories.");
  }

  taste(found) {
    this.ids.taste.hidden = found === null;
    if (found === null) return;
    const numbers = found.numbers;
    const both = numbers.agreement;
    const facts = {
      "Accuracy, unseen stories": `${percent(numbers.accuracy)} (95 % interval ${numbers.interval.map(percent).join(" to ")})`,
      "Answers": `${numbers.answers} in ${numbers.stories} stories, ${numbers.ties} ties`,
      "Log loss": `${shown(numbers.log_loss)} (chance ${shown(numbers.chance_log_loss)})`,
      "Features": found.sets.join(", "),
      "Agreement of raters": both?.compared ? `${percent(both.same)} of ${both.compared} shared answers` : "nobody answered a pair that another one did",
    };
    this.ids["taste-facts"].replaceChildren(...Object.entries(facts).map(([name, value]) => {
      const [entry, term, text] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
      term.textContent = name;
      text.textContent = value;
      entry.append(term, text);
      return entry;
    }));
    rows(this.ids["taste-raters"], Object.entries(numbers.by_rater).map(([name, row]) => [name, row.answers, percent(row.accuracy)]));
    rows(this.ids["taste-bins"], numbers.bins.filter((row) => row.comparisons).map((row) => [percent(row.sure), percent(row.right), row.comparisons]));
  }

  progress(align, run) {
    this.ids["align-bar"].hidden = run === null || align.state === "none";
    if (run === null) return;
    const { step, steps } = run;
    Object.assign(this.ids["align-bar"], { max: steps || 1, value: step });
    const early = align.state === "done" && step < steps ? "; it ended early, and the report says why" : "";
    this.say("align-step", align.state === "none" ? "" : `Step ${step} of ${steps ?? "?"}${early}`);   // no status: it would be read out at every look
    this.once("run", { ...run, seconds_ago: 0 }, () => {
      this.ids["align-charts"].replaceChildren(charts(run));
      this.ids["align-report"].replaceChildren(...(run.report ? [reportLink(run.name)] : []));
    });
  }
}

function rows(body, found) {
  body.replaceChildren(...found.map((cells) => {
    const line = document.createElement("tr");
    cells.forEach((text, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      cell.textContent = text;
      line.append(cell);
    });
    return line;
  }));
  body.closest("table").hidden = !found.length;
}
