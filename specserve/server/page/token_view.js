// The text of an answer with each token's source. Tokens wait in a queue and are drawn with the next frame, for a few
// milliseconds a frame, so that a fast answer never holds up the page. Neighbours of one source and forward are one
// element; so are those that the model drew alone. Owns what is drawn and which of it has the keyboard's focus.
import { el, onFrame } from "./dom.js";
import { classOf } from "./sources.js";

const FRAME_MS = 7;
const MAX_RUNS = 6000; // beyond, neighbours of one source are one element whatever their forwards
const BLOCK_RUNS = 300; // a block ends with the first line's end after so many: a browser lays out a block as a whole

export class TokenView {
  /** `card` shows a run's details; `onDrawn` is called after each frame that drew something. */
  constructor(card, onDrawn = () => {}) {
    this.element = el("div", { class: "output", role: "group", "aria-label": "Output; arrow keys go through its parts" });
    this._card = card;
    this._onDrawn = onDrawn;
    this._draw = onFrame(() => this._drawSome());
    this._listen();
    this.clear();
  }

  clear() {
    this._queue = [];
    this._next = 0;
    this._waiting = [];
    this._runs = new Map();
    this._run = null;
    this._block = null;
    this._endsLine = false;
    this._focused = null;
    this.element.replaceChildren();
  }

  /** Draw `tokens` (entries of a trace) after what is there. */
  add(tokens) {
    for (const token of tokens) this._queue.push(token);
    this._draw();
  }

  /** Resolves when everything that was added has been drawn. */
  drawn() {
    if (this._next >= this._queue.length) return Promise.resolve();
    return new Promise((resolve) => this._waiting.push(resolve));
  }

  get numElements() {
    return this._runs.size;
  }

  _drawSome() {
    const until = performance.now() + FRAME_MS;
    while (this._next < this._queue.length) {
      const last = Math.min(this._next + 50, this._queue.length);
      while (this._next < last) this._append(this._queue[this._next++]);
      if (performance.now() > until) break;
    }
    this._write();
    this._onDrawn();
    if (this._next < this._queue.length) {
      this._draw();
      return;
    }
    this._queue = [];
    this._next = 0;
    for (const resolve of this._waiting.splice(0)) resolve();
  }

  _append(token) {
    if (this._run !== null && this._joins(token)) {
      this._run.tokens.push(token);
      this._run.unwritten += token.text;
      return;
    }
    this._write();
    const source = classOf(token.source);
    const span = el("span", { class: token.rejected?.length ? "run struck" : "run", data: { source } }, "");
    if (token.rejected?.length) span.setAttribute("aria-description", `${token.rejected.length} drafts rejected before this`);
    span.tabIndex = this._focused === null ? 0 : -1;
    this._focused ??= span;
    this._run = { span, tokens: [token], node: span.appendChild(document.createTextNode("")), unwritten: token.text };
    this._runs.set(span, this._run);
    this._blockFor().append(span);
  }

  _joins(token) {
    const last = this._run.tokens[this._run.tokens.length - 1];
    if (this._runs.size >= 2 * MAX_RUNS) return true;
    if (token.rejected?.length || last.source !== token.source) return false;
    if (last.forward === token.forward || this._runs.size >= MAX_RUNS) return true;
    if (this._run.tokens.every((part) => part.text === "")) return true; // parts of one character, which comes with the last
    return token.source === "target" && !this._run.tokens[0].rejected?.length;
  }

  _write() {
    if (!this._run?.unwritten) return;
    this._run.node.appendData(this._run.unwritten);
    this._endsLine = this._run.unwritten.endsWith("\n");
    this._run.unwritten = "";
  }

  _blockFor() {
    const block = this._block;
    if (block === null || (block.num >= BLOCK_RUNS && this._endsLine)) {
      this._block = { element: el("div", { class: "block" }), num: 0 };
      this.element.append(this._block.element);
    }
    this._block.num += 1;
    return this._block.element;
  }

  // -- pointer, touch and keys

  _listen() {
    const runOf = (event) => this._runs.get(event.target.closest?.(".run"));
    const show = (event) => {
      const run = runOf(event);
      if (run) this._card.show(run.span, run.tokens);
    };
    this.element.addEventListener("pointerover", (event) => event.pointerType === "mouse" && show(event));
    this.element.addEventListener("pointerout", (event) => event.pointerType === "mouse" && this._card.hideSoon());
    this.element.addEventListener("click", show);
    this.element.addEventListener("focusin", (event) => {
      const run = runOf(event);
      if (run) this._setFocused(run.span);
      if (run && event.target.matches(":focus-visible")) show(event);
    });
    this.element.addEventListener("focusout", () => this._card.hideSoon());
    this.element.addEventListener("keydown", (event) => this._onKey(event, runOf(event)));
  }

  _setFocused(span) {
    if (this._focused !== null) this._focused.tabIndex = -1;
    this._focused = span;
    span.tabIndex = 0;
  }

  _onKey(event, run) {
    if (!run || event.altKey || event.ctrlKey || event.metaKey) return;
    const spans = [...this._runs.keys()];
    const at = spans.indexOf(run.span);
    const next = (from, step) => {
      if (!event.shiftKey) return spans[from + step];
      for (let i = from + step; i >= 0 && i < spans.length; i += step) if (spans[i].classList.contains("struck")) return spans[i];
      return undefined;
    };
    const targets = {
      ArrowRight: () => next(at, 1),
      ArrowLeft: () => next(at, -1),
      Home: () => spans[0],
      End: () => spans[spans.length - 1],
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    targets[event.key]()?.focus();
  }
}
