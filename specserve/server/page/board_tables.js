// Tables of the board: replicas, drafts by adapter and position, and by source.
import { duration, el, number, percent } from "./dom.js";
import { classOf, nameOf } from "./sources.js";

const MAX_POSITIONS = 12;

/** A row for each adapter, the busiest first; a cell's shade is its number. */
export function acceptanceTable({ by_adapter: models, num_others: numOthers }) {
  if (!models.some((model) => model.generated)) return el("p", { class: "muted" }, "Nothing was generated yet.");
  const numPositions = Math.min(MAX_POSITIONS, Math.max(0, ...models.map((model) => model.accepted_per_pos.length)));
  const positions = Array.from({ length: numPositions }, (_, pos) => pos);
  const head = el(
    "tr",
    {},
    ...["Model", "Tokens", "Tokens/verification", "Drafts kept", "Price of a row"].map((name) => el("th", { scope: "col" }, name)),
    ...positions.map((pos) => el("th", { scope: "col", class: "pos" }, el("span", { class: "hidden" }, "Position "), String(pos + 1))),
  );
  const body = models.map((model) =>
    el(
      "tr",
      { data: { model: model.model } },
      el("th", { scope: "row" }, model.model),
      el("td", {}, number(model.generated)),
      el("td", {}, model.verifications ? number(model.generated / model.verifications, 2) : "–"),
      el("td", {}, model.drafted ? percent(model.accepted / model.drafted) : "–"),
      el("td", { title: "what the budget asks of a draft row: tokens that it must be expected to bring" }, number(model.row_price, 2)),
      ...positions.map((pos) => cell(model.verifications ? (model.accepted_per_pos[pos] ?? 0) / model.verifications : null)),
    ),
  );
  const others = numOthers ? el("caption", {}, `${numOthers} more are not shown`) : null;
  return el("table", {}, others, el("thead", {}, head), el("tbody", {}, ...body));
}

function cell(share) {
  const element = el("td", { class: "pos" }, share === null ? "–" : number(100 * share));
  element.style.setProperty("--share", `${Math.round(40 * Math.min(1, share ?? 0))}%`);
  return element;
}

export function sourceTable(bySource) {
  const entries = Object.entries(bySource).sort(([, a], [, b]) => b.accepted - a.accepted);
  if (!entries.length) return el("p", { class: "muted" }, "Nothing was drafted yet.");
  const most = Math.max(1, ...entries.map(([, { drafted }]) => drafted));
  const rows = entries.map(([source, { drafted, accepted }]) => {
    const bar = el("span", { class: "bar two", data: { source: classOf(source) }, "aria-hidden": "true" }, el("span"), el("span"));
    bar.firstChild.style.width = `${(100 * accepted) / most}%`;
    bar.lastChild.style.width = `${(100 * (drafted - accepted)) / most}%`;
    return el("tr", { data: { by: source } }, el("th", { scope: "row" }, nameOf(source)), el("td", {}, number(drafted)), el("td", {}, number(accepted)), el("td", {}, drafted ? percent(accepted / drafted) : "–"), el("td", { class: "wide-cell" }, bar));
  });
  const head = ["Source", "Drafted", "Kept", "Share", ""].map((name) => (name ? el("th", { scope: "col" }, name) : el("td", {})));
  return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}

/** A row for each of several engines. */
export function replicaTable(replicas) {
  const head = ["Replica", "Running", "Waiting", "Tokens owed", "Tokens", "Adapters", "KV cache", "For"];
  const rows = replicas.map((replica) =>
    el(
      "tr",
      { data: { replica: replica.name } },
      el("th", { scope: "row" }, replica.name),
      ...[replica.running, replica.waiting, replica.owed_tokens, replica.generated, replica.adapters].map((value) => el("td", {}, number(value))),
      el("td", {}, percent(replica.kv_used_ratio)),
      el("td", {}, duration(replica.uptime_s)),
    ),
  );
  return el("table", {}, el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows));
}
