// The settings' form: its values, the models to choose from, and which fields a kind of prompt has.
import { getJson } from "./api.js";
import { byId, el, replace } from "./dom.js";

export const NOTHING = "";
export const RACE = " race"; // no model's name begins with a space

const BASE_EXAMPLES = [
  { title: "Count", messages: [{ role: "user", content: "Count from 1 to 30, with commas between the numbers." }] },
  { title: "List of planets", messages: [{ role: "user", content: "List the planets of the solar system, one a line, with one fact for each." }] },
  { title: "Explain", messages: [{ role: "user", content: "What is a bicycle? Answer in three sentences." }] },
];

export class Settings {
  /** `onExample` gets an example that was chosen; `onKind` is called when the kind of prompt changes. */
  constructor({ onExample, onKind }) {
    this._form = byId("settings");
    this._onExample = onExample;
    this._examples = new Map(); // model -> its examples
    this.baseName = "";
    this._form.addEventListener("submit", (event) => event.preventDefault());
    this._form.addEventListener("change", ({ target }) => {
      if (target.name === "kind") onKind(this.isChat);
      if (target.name === "kind") this._showFields();
      if (target.name === "model") this._showExamples();
    });
    if (matchMedia("(max-width: 860px)").matches) byId("settings-box").open = false;
    replace(this._form.elements.beside, el("option", { value: NOTHING }, "nothing"));
  }

  get values() {
    return Object.fromEntries(new FormData(this._form));
  }

  get isChat() {
    return this.values.kind === "chat";
  }

  setKind(kind) {
    if (this.values.kind === kind) return;
    this._form.elements.kind.value = kind;
    this._form.elements.kind[0].dispatchEvent(new Event("change", { bubbles: true }));
  }

  setModel(model) {
    this._form.elements.model.value = model;
    this._showExamples();
  }

  setSystem(text) {
    this._form.elements.system.value = text;
  }

  /** Read the models again, keeping what is chosen where it is still there. Raises `ApiError`. */
  async load() {
    const { data } = await getJson("/v1/models");
    this.baseName = data.find((model) => model.parent === null)?.id ?? "";
    const names = data.map((model) => model.id);
    const label = (name) => (name === this.baseName ? `${name} (base model)` : name);
    const options = () => names.map((name) => el("option", { value: name }, label(name)));
    const { model, beside } = this._form.elements;
    const chosen = [model.value, beside.value];
    replace(model, ...options());
    replace(
      beside,
      el("option", { value: NOTHING }, "nothing"),
      el("option", { value: RACE }, "the same without drafts (race)"),
      el("optgroup", { label: "Another model, same prompt" }, ...options()),
    );
    if (names.includes(chosen[0])) model.value = chosen[0];
    if (chosen[1] === RACE || names.includes(chosen[1])) beside.value = chosen[1];
    this._examples.clear();
    await this._showExamples();
    return names;
  }

  _showFields() {
    for (const field of this._form.querySelectorAll("[data-for]")) field.hidden = field.dataset.for !== this.values.kind;
  }

  async _showExamples() {
    const { model } = this.values;
    if (!model) return;
    if (!this._examples.has(model)) this._examples.set(model, await this._examplesOf(model));
    if (this.values.model !== model) return; // another was chosen meanwhile
    const buttons = this._examples.get(model).map((example) =>
      el("button", { type: "button", class: "chip", on: { click: () => this._onExample(example) } }, example.title),
    );
    replace(byId("examples"), ...(buttons.length ? [el("span", { class: "muted" }, "Try"), ...buttons] : []));
  }

  async _examplesOf(model) {
    if (model === this.baseName) return BASE_EXAMPLES;
    try {
      return (await getJson(`/v1/adapters/${encodeURIComponent(model)}/examples`)).data;
    } catch {
      return []; // the adapter has gone, or its disk; asking it for an answer says so
    }
  }
}
