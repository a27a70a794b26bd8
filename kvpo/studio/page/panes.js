// The panes: one is shown at a time, and only that one asks the server how things stand.

const message = document.getElementById("message");

export function tell(text, note = false) {
  message.textContent = text;
  message.classList.toggle("note", note);
  message.hidden = !text;
}

// Asks the server for JSON; with `what`, asks it for work. What it refuses is an error with its text.
export async function ask(path, what = null) {
  const asked = what === null ? {} : { method: "POST", body: JSON.stringify(what), headers: { "content-type": "application/json" } };
  const answer = await fetch(new URL(path, document.baseURI), asked);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.message ?? `The studio answers ${answer.status}; reload the page.`);
  return found;
}

// A pane that looks again and again while it is shown: look() draws, and gives the
// seconds to the next look, or null for none.
export class Pane {
  constructor(name, look) {
    Object.assign(this, { name, look, timer: null });
    this.element = document.getElementById(`pane-${name}`);
    document.addEventListener("visibilitychange", () => { if (!document.hidden && !this.element.hidden) this.again(0); });
  }

  again(seconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.tick(), seconds * 1000);
  }

  async tick() {
    if (this.element.hidden || document.hidden) return;
    let seconds = 10;
    try { seconds = await this.look(); } catch (error) { tell(error.message); }
    if (seconds !== null) this.again(seconds);
  }

  show(shown) {
    this.element.hidden = !shown;
    if (shown) this.again(0); else clearTimeout(this.timer);
  }
}

// Buttons of the navigation lead to the panes; the address remembers which one is shown.
export function navigate(panes) {
  const buttons = [...document.querySelectorAll("nav [data-pane]")];
  const go = (name) => {
    const there = panes.some((pane) => pane.name === name) ? name : panes[0].name;
    for (const pane of panes) pane.show(pane.name === there);
    for (const button of buttons) {
      if (button.dataset.pane === there) button.setAttribute("aria-current", "page");
      else button.removeAttribute("aria-current");
    }
  };
  for (const button of buttons) button.addEventListener("click", () => { location.hash = button.dataset.pane; });
  addEventListener("hashchange", () => go(location.hash.slice(1)));
  go(location.hash.slice(1));
}
