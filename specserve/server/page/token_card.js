// What is known of a run of tokens, beside it: its source, its forward, each token's chance, and drafts that were
// rejected before it. For the pointer, touch and the keyboard; Escape puts it away.
import { byId, el, percent, replace } from "./dom.js";
import { classOf, nameOf, saysOf } from "./sources.js";

const MAX_ROWS = 8;

export class TokenCard {
  constructor() {
    this._card = byId("card");
    this._owner = null;
    this._timer = 0;
    this._card.addEventListener("pointerenter", () => clearTimeout(this._timer));
    this._card.addEventListener("pointerleave", () => this.hideSoon());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    document.addEventListener("pointerdown", (event) => {
      if (this._owner && !event.target.closest?.(".run, .card")) this.hide();
    });
    addEventListener("scroll", () => this._place(), { passive: true, capture: true });
    addEventListener("resize", () => this._place());
  }

  show(span, tokens) {
    clearTimeout(this._timer);
    this._owner?.removeAttribute("aria-describedby");
    this._owner = span;
    span.setAttribute("aria-describedby", "card");
    replace(this._card, ...describe(tokens));
    this._card.hidden = false;
    this._place();
  }

  hideSoon() {
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this.hide(), 180); // time to move the pointer onto the card
  }

  hide() {
    this._owner?.removeAttribute("aria-describedby");
    this._owner = null;
    this._card.hidden = true;
  }

  _place() {
    if (this._owner === null) return;
    const [box] = this._owner.getClientRects();
    if (!box || box.bottom < 0 || box.top > innerHeight) {
      this.hide();
      return;
    }
    const { offsetWidth: width, offsetHeight: height } = this._card;
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
    const fitsBelow = box.bottom + 6 + height < innerHeight;
    const top = fitsBelow ? box.bottom + 6 : Math.max(8, box.top - height - 6);
    this._card.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }
}

function describe(tokens) {
  const [first] = tokens;
  const last = tokens[tokens.length - 1];
  const forwards = first.forward === last.forward ? `forward ${first.forward}` : `forwards ${first.forward} to ${last.forward}`;
  const parts = [
    el("p", { class: "card-head" }, el("span", { class: "swatch", data: { source: classOf(first.source) } }), el("b", {}, nameOf(first.source)), el("span", {}, ` · ${forwards}`)),
    el("p", { class: "muted" }, saysOf(first.source)),
  ];
  if (first.rejected?.length) {
    const rows = first.rejected.slice(0, MAX_ROWS).map((token) => row(token, true));
    parts.push(el("p", { class: "card-part" }, "Rejected here, with the chance that the drafter saw"), el("ol", {}, ...rows, more(first.rejected)));
  }
  const guessed = tokens.filter((token) => typeof token.chance === "number");
  if (guessed.length) {
    const rows = guessed.slice(0, MAX_ROWS).map((token) => row(token, false));
    parts.push(el("p", { class: "card-part" }, "Kept, with the chance that the drafter saw"), el("ol", {}, ...rows, more(guessed)));
  }
  return parts;
}

function row(token, isRejected) {
  const meter = el("span", { class: "meter", "aria-hidden": "true" }, el("span", { data: { source: classOf(token.source) } }));
  meter.firstChild.style.width = `${Math.round(100 * (token.chance ?? 0))}%`;
  const text = el(isRejected ? "del" : "code", {}, visible(token.text));
  const source = isRejected ? el("span", { class: "muted" }, nameOf(token.source)) : null;
  return el("li", {}, text, source, meter, el("span", { class: "figure" }, percent(token.chance)));
}

function more(tokens) {
  return tokens.length > MAX_ROWS ? el("li", { class: "muted" }, `and ${tokens.length - MAX_ROWS} more`) : null;
}

/** A token's text with its spaces and line ends to be seen. */
export function visible(text) {
  if (text === "") return "(part of a character)";
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}
