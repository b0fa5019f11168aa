// The playground: a conversation of turns, each with one answer or two beside each other. Two models answer at the same
// time; in a race the answer without drafts is asked for when the first one has ended, which is played again beside it,
// so that neither slows the other.
import { hasKey } from "./api.js";
import { Answer, promptBox } from "./answer.js";
import { showCode } from "./code_dialog.js";
import { byId, copyText, duration, el, number, replace } from "./dom.js";
import { SettingError, fieldsOf, newSeed, traced, undrafted } from "./request.js";
import { RACE, Settings } from "./settings.js";
import { legend } from "./sources.js";
import { TokenCard } from "./token_card.js";

export class Playground {
  constructor() {
    this._card = new TokenCard();
    this._turns = [];
    this._running = []; // answers that a stop ends
    this._isStopped = false;
    this._isAtEnd = true;
    this.settings = new Settings({ onExample: (example) => this._useExample(example), onKind: () => this._clear() });
    replace(byId("legend"), ...legend());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      const sends = this.settings.isChat ? !event.shiftKey : event.ctrlKey || event.metaKey;
      if (event.key !== "Enter" || !sends || event.isComposing) return;
      event.preventDefault();
      this._send();
    });
    addEventListener("scroll", () => {
      this._isAtEnd = document.documentElement.scrollHeight - innerHeight - scrollY < 60;
    }, { passive: true });
    byId("stop").addEventListener("click", () => this._stop());
    byId("new").addEventListener("click", () => this._clear());
    this._clear();
  }

  get isBusy() {
    return !byId("stop").hidden;
  }

  /** Choose a model, as the list of adapters does. */
  choose(model) {
    this.settings.setModel(model);
    byId("prompt").focus();
  }

  _clear() {
    this._stop();
    this._turns = [];
    const isChat = this.settings.isChat;
    replace(byId("turns"), el("p", { class: "empty" }, "Each token is shaded by where it came from. Choose an example below, or write a prompt."));
    byId("prompt").placeholder = isChat ? "Write a message" : "Write a text to go on from";
    byId("prompt-hint").textContent = isChat ? "Enter sends, Shift + Enter is a new line" : "Ctrl + Enter sends";
    byId("new").textContent = isChat ? "New conversation" : "Clear";
    this._say("");
  }

  _useExample(example) {
    this.settings.setKind(example.messages ? "chat" : "completion");
    const messages = example.messages ?? [];
    const system = messages.find((message) => message.role === "system");
    if (system) this.settings.setSystem(system.content);
    if (this._turns.length) this._clear();
    byId("prompt").value = example.prompt ?? messages.filter((message) => message.role === "user").at(-1)?.content ?? "";
    byId("prompt").focus();
  }

  _stop() {
    this._isStopped = true;
    for (const answer of this._running) answer.stop();
  }

  async _send() {
    const text = byId("prompt").value;
    const calls = this._openCalls();
    if (this.isBusy || (text.trim() === "" && calls.length === 0)) return;
    let requests;
    try {
      requests = this._requests(text, calls);
      this._showError("");
    } catch (error) {
      if (!(error instanceof SettingError)) throw error;
      this._showError(error.message);
      return;
    }
    byId("prompt").value = "";
    if (this._turns.length === 0 || !this.settings.isChat) replace(byId("turns"));
    await this._runTurn({ text, calls, answers: [], isRace: requests.isRace }, requests.list);
  }

  async _runTurn(turn, requests) {
    this._turns.push(turn);
    this._isAtEnd = true;
    turn.place = el("div", { class: "pair" });
    const results = turn.calls.map((call) => el("div", { class: "user" }, el("b", {}, `Result of ${call.function.name}`), ` ${call.result}`));
    turn.element = el("section", { class: "turn" }, ...results, this.settings.isChat && turn.text ? promptBox("user", turn.text) : null, turn.place);
    byId("turns").append(turn.element);
    const first = requests.map((request) => this._addAnswer(turn, request));
    await this._whileBusy(first, async () => {
      await Promise.all(first.map((answer) => answer.run()));
      if (turn.isRace && first[0].isComplete && !this._isStopped) await this._race(turn);
    });
    this._say(turn.answers.map(spoken).join(" "));
  }

  /** The answer without drafts, beside the first one as it came. */
  async _race(turn) {
    const [drafted] = turn.answers;
    const { path, body } = drafted.request;
    const plain = this._addAnswer(turn, { path, body: traced(undrafted(body)), title: drafted.request.title, note: "no drafts" });
    this._running.push(plain);
    await Promise.all([plain.run(), drafted.replay(() => this._isStopped)]);
    if (plain.isComplete) turn.element.append(verdict(drafted, plain));
    this._follow();
  }

  async _whileBusy(answers, work) {
    this._isStopped = false;
    this._running = [...answers];
    byId("send").hidden = true;
    byId("stop").hidden = false;
    try {
      await work();
    } finally {
      this._running = [];
      byId("send").hidden = false;
      byId("stop").hidden = true;
      this._offerRaces();
      this._follow();
    }
  }

  /** Keep the end in view while the reader is there. */
  _follow() {
    if (this._isAtEnd) scrollTo(0, document.documentElement.scrollHeight);
  }

  _addAnswer(turn, request) {
    const answer = new Answer(request, this._card, { prefix: this.settings.isChat ? "" : turn.text, onDrawn: () => this._follow() });
    const { path, body } = request;
    const copied = el("button", { type: "button", class: "quiet" }, "Copy text");
    copied.addEventListener("click", async () => {
      copied.textContent = (await copyText(answer.written)) ? "Copied" : "Not allowed here";
    });
    const code = (kind) => el("button", { type: "button", class: "quiet", on: { click: () => showCode(kind, path, body, hasKey()) } }, kind);
    answer.actions.append(copied, code("curl"), code("Python"));
    turn.answers.push(answer);
    turn.place.append(answer.element);
    turn.place.classList.toggle("two", turn.answers.length > 1);
    this._follow();
    return answer;
  }

  /** A button under each single answer that has a mate without drafts to be raced against. */
  _offerRaces() {
    for (const turn of this._turns) {
      turn.raceButton?.remove();
      const [answer] = turn.answers;
      if (turn.answers.length !== 1 || !answer.isComplete || answer.request.body.speculation.mode === "off") continue;
      turn.raceButton = el("button", { type: "button", class: "quiet" }, "Race without drafts");
      turn.raceButton.addEventListener("click", () => this.isBusy || this._whileBusy([], () => this._race(turn)));
      answer.actions.append(turn.raceButton);
    }
  }

  // -- requests

  _requests(text, calls) {
    const values = this.settings.values;
    const isChat = this.settings.isChat;
    const isRace = values.beside === RACE;
    const fields = { seed: newSeed(), ...fieldsOf(values, isChat) };
    const models = [values.model, ...(values.beside && !isRace ? [values.beside] : [])];
    const list = models.map((model, lane) => {
      const prompt = isChat ? { messages: this._messages(lane, text, calls, values.system) } : { prompt: text };
      const note = values.mode === "off" ? "no drafts" : "";
      return { path: isChat ? "/v1/chat/completions" : "/v1/completions", body: traced({ model, ...prompt, ...fields }), title: model, note };
    });
    return { list, isRace: isRace && values.mode !== "off" };
  }

  /** The conversation as the answers of one side had it. */
  _messages(lane, text, calls, system) {
    const messages = system.trim() ? [{ role: "system", content: system }] : [];
    const say = (turn) => {
      for (const call of turn.calls) messages.push({ role: "tool", tool_call_id: call.id, content: call.result });
      if (turn.text) messages.push({ role: "user", content: turn.text });
    };
    for (const turn of this._turns) {
      const answer = turn.answers[lane] ?? turn.answers[0];
      if (answer.error !== null) continue;
      say(turn);
      const message = { role: "assistant", content: answer.text };
      if (answer.toolCalls.length) message.tool_calls = answer.toolCalls;
      messages.push(message);
    }
    say({ text, calls });
    return messages;
  }

  /** Calls of the last answer with the results that were written for them. */
  _openCalls() {
    const answer = this._turns.at(-1)?.answers[0];
    if (!this.settings.isChat || !answer?.isComplete) return [];
    return answer.toolCalls.filter(Boolean).map((call, idx) => ({ ...call, result: answer.resultOf(idx) }));
  }

  _showError(message) {
    byId("composer-error").textContent = message;
    byId("composer-error").hidden = message === "";
  }

  _say(text) {
    byId("spoken").textContent = text;
  }
}

function spoken(answer) {
  if (answer.error !== null) return `${answer.request.title}: error. ${answer.error.message}`;
  const { tokens, tokensPerS } = answer.meter;
  return `${answer.request.title}: ${tokens} tokens, ${number(tokensPerS)} a second.`;
}

function verdict(drafted, plain) {
  const ratio = drafted.meter.tokensPerS / plain.meter.tokensPerS;
  const same = drafted.written === plain.written;
  const times = ratio >= 1 ? `${number(ratio, 1)} times the tokens a second` : `${number(1 / ratio, 1)} times slower`;
  return el(
    "p",
    { class: "verdict", data: { same: String(same) } },
    el("b", {}, Number.isFinite(ratio) ? `With drafts: ${times}.` : "Too short to compare."),
    ` ${duration(drafted.seconds)} with, ${duration(plain.seconds)} without. `,
    same ? "Both wrote the same text." : "The texts differ: on this device a row's last bits depend on what shares its step.",
  );
}
