// One answer: its request, what arrives of it, and its place on the page. What arrived is kept with its times, so that
// the answer can be played again beside another one, as it was.
import { ApiError, stream } from "./api.js";
import { duration, el, number, onFrame, replace } from "./dom.js";
import { Meter } from "./meter.js";
import { shareBar } from "./sources.js";
import { TokenView } from "./token_view.js";

export class Answer {
  /** `request`: {path, body, title, note}; `prefix`: the text that a completion goes on from; `onDrawn`: after each frame. */
  constructor(request, card, { prefix = "", onDrawn } = {}) {
    this.request = request;
    this.text = ""; // without thinking and calls
    this.reasoning = "";
    this.toolCalls = [];
    this.finishReason = null;
    this.error = null;
    this.usage = null;
    this.seconds = null; // from the request to the end of its answer
    this.isRunning = false;
    this.played = []; // [milliseconds, tokens] of each event
    this._abort = new AbortController();
    this._tokens = new TokenView(card, onDrawn);
    this._showFigures = onFrame(() => this._figures());
    this._meter = new Meter();
    this._build(prefix);
  }

  get isComplete() {
    return this.error === null && this.finishReason !== null;
  }

  /** All that the model wrote, thinking and calls included. */
  get written() {
    return this.played.flatMap(([, tokens]) => tokens.map((token) => token.text)).join("");
  }

  get meter() {
    return this._meter;
  }

  /** Ask, and show what comes; resolves when it has ended, however. */
  async run() {
    const start = performance.now();
    this.isRunning = true;
    this._setState("running");
    try {
      const { path, body } = this.request;
      for await (const batch of stream(path, { body, signal: this._abort.signal })) {
        const at = performance.now() - start;
        for (const event of batch) this._take(event, at);
      }
    } catch (error) {
      if (error.name === "AbortError") this.finishReason = "stopped";
      else this._fail(error);
    }
    this.seconds = (performance.now() - start) / 1000;
    this.isRunning = false;
    await this._tokens.drawn();
    this._finish();
  }

  stop() {
    this._abort.abort();
  }

  /** Show the answer again as it came; resolves at its end. `isStopped` may end it early, with all of it shown. */
  async replay(isStopped = () => false) {
    const start = performance.now();
    this._tokens.clear();
    this._meter = new Meter();
    this._setState("replaying");
    for (const [at, tokens] of this.played) {
      while (performance.now() - start < at && !isStopped()) await nextFrame();
      this._show(tokens, at);
    }
    while (performance.now() - start < 1000 * this.seconds && !isStopped()) await nextFrame();
    await this._tokens.drawn();
    this._finish();
  }

  _take(event, at) {
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices) {
      const delta = choice.delta ?? { content: choice.text };
      this.text += delta.content ?? "";
      this.reasoning += delta.reasoning_content ?? "";
      for (const call of delta.tool_calls ?? []) this._takeCall(call);
      if (choice.finish_reason) this.finishReason = choice.finish_reason;
      if (choice.trace?.length) {
        this.played.push([at, choice.trace]);
        this._show(choice.trace, at);
      }
    }
  }

  _takeCall(call) {
    const known = (this.toolCalls[call.index ?? 0] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (call.id) known.id = call.id;
    known.function.name += call.function?.name ?? "";
    known.function.arguments += call.function?.arguments ?? "";
  }

  _show(tokens, at) {
    this._meter.add(tokens, at);
    this._tokens.add(tokens);
    this._showFigures();
  }

  _fail(error) {
    this.error = error;
    const label = error instanceof ApiError ? error.label : "";
    if (!(error instanceof ApiError)) console.error(error);
    replace(this._errorBox, label ? el("b", {}, label) : null, el("span", {}, error.message));
    this._errorBox.hidden = false;
  }

  /** What was written into the box for the result of a call. */
  resultOf(idx) {
    return this._calls.querySelectorAll("textarea")[idx]?.value ?? "";
  }

  // -- the page

  _build(prefix) {
    const { title, note } = this.request;
    this._state = el("span", { class: "badge", hidden: true });
    this._figureBoxes = Object.fromEntries(FIGURES.map(({ id }) => [id, el("dd", { data: { figure: id } }, "–")]));
    const figures = FIGURES.map(({ id, name, says }) => el("div", { title: says }, el("dt", {}, name), this._figureBoxes[id]));
    this._errorBox = el("p", { class: "error", role: "alert", hidden: true });
    this._calls = el("div", { class: "calls" });
    this._share = el("div");
    this.actions = el("div", { class: "actions", hidden: true });
    const before = prefix ? [promptBox("prefix", prefix)] : [];
    this.element = el(
      "article",
      { class: "answer", "aria-label": `Answer of ${title}` },
      el("header", {}, el("h2", {}, title), note ? el("span", { class: "badge" }, note) : null, this._state),
      el("dl", { class: "figures" }, ...figures),
      ...before,
      this._tokens.element,
      this._errorBox,
      this._calls,
      this._share,
      this.actions,
    );
  }

  _setState(state) {
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(state !== "done"));
    this._state.hidden = state === "done";
    this._state.textContent = state;
  }

  _figures() {
    for (const { id, of } of FIGURES) {
      const text = of(this._meter, this);
      if (this._figureBoxes[id].textContent !== text) this._figureBoxes[id].textContent = text;
    }
  }

  _finish() {
    this._setState("done");
    this._figures();
    if (this._meter.tokens) replace(this._share, shareBar(this._meter.counts));
    const calls = this.toolCalls.filter(Boolean);
    replace(this._calls, ...calls.map(callBox));
    const reason = { length: "ended at max tokens", stopped: "stopped" }[this.finishReason];
    if (reason) {
      this._state.textContent = reason;
      this._state.hidden = false;
    }
    this.actions.hidden = false;
  }
}

const FIGURES = [
  { id: "rate", name: "tokens/s", says: "tokens a second after the first ones", of: (meter) => number(meter.tokensPerS, meter.tokensPerS < 100 ? 1 : 0) },
  { id: "first", name: "first token", says: "from the request to the first token", of: (meter) => (meter.firstAt === null ? "–" : duration(meter.firstAt / 1000)) },
  { id: "length", name: "tokens/forward", says: "mean accepted length: how many tokens each forward of the model gave", of: (meter) => number(meter.tokensPerForward, 2) },
  { id: "tokens", name: "tokens", says: "tokens of the answer", of: (meter) => number(meter.tokens) },
  { id: "seconds", name: "in all", says: "from the request to the end of the answer", of: (meter, answer) => duration(answer.isRunning ? meter.lastAt / 1000 : answer.seconds) },
];

/** A prompt as it was sent; a long one scrolls, for which the keyboard must reach it. */
export function promptBox(kind, text) {
  return el("div", { class: kind, ...(text.length > 700 ? { tabindex: 0, role: "group", "aria-label": "Prompt" } : {}) }, text);
}

function callBox({ function: { name, arguments: text } }) {
  return el(
    "div",
    { class: "call" },
    el("code", {}, `${name}(${text})`),
    el("label", { class: "field" }, "Its result, sent with your next message", el("textarea", { rows: 2, class: "code", spellcheck: "false" })),
  );
}

function nextFrame() {
  return new Promise((resolve) => (document.hidden ? setTimeout(resolve, 50) : requestAnimationFrame(resolve)));
}
