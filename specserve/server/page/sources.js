// Where a token may come from, in the order in which they are listed everywhere; colours and underlines are in base.css.
import { el } from "./dom.js";

export const SOURCES = {
  target: { name: "model", says: "drawn by the model itself, without a draft" },
  head: { name: "lookahead head", says: "guessed by the network that was trained with the LoRA" },
  history: { name: "task history", says: "guessed from what the adapter wrote before" },
  ngram: { name: "n-gram", says: "guessed from what stands before in prompt and output" },
  prediction: { name: "prediction", says: "taken from the expected output" },
  grammar: { name: "grammar", says: "all that the grammar leaves room for" },
};

/** A source that this page does not know is shown as the model's, under its own name. */
export const classOf = (source) => (source in SOURCES ? source : "target");
export const nameOf = (source) => SOURCES[source]?.name ?? source;
export const saysOf = (source) => SOURCES[source]?.says ?? "";

export function legend() {
  const items = Object.entries(SOURCES).map(([source, { name, says }]) =>
    el("span", { class: "key", title: says }, el("span", { class: "run", data: { source } }, name)),
  );
  const rejected = el("span", { class: "key" }, el("span", { class: "run struck", data: { source: "target" } }, "draft rejected here"));
  return [...items, rejected];
}

/** A bar of shares with its numbers below: `counts` by source. */
export function shareBar(counts) {
  const sources = [...Object.keys(SOURCES), ...Object.keys(counts).filter((source) => !(source in SOURCES))];
  const present = sources.filter((source) => counts[source]);
  const total = present.reduce((sum, source) => sum + counts[source], 0);
  const bar = el("div", { class: "shares", "aria-hidden": "true" });
  for (const source of present) {
    const part = el("span", { data: { source: classOf(source) } });
    part.style.flexGrow = String(counts[source]);
    bar.append(part);
  }
  const texts = present.map((source) =>
    el(
      "li",
      {},
      el("span", { class: "swatch", data: { source: classOf(source) }, "aria-hidden": "true" }),
      `${nameOf(source)} ${counts[source]} (${Math.round((100 * counts[source]) / total)} %)`,
    ),
  );
  return el("div", { class: "share" }, bar, el("ul", {}, ...texts));
}
