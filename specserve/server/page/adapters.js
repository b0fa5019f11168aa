// The list of adapters: where each lies, how it is used, and the report of its training.
import { getBlob, getJson, hasKey } from "./api.js";
import { bytes, el, percent, replace } from "./dom.js";

// What a report must not do where it is opened from disk; the server's own headers say the same beside a link to it.
const POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'";
const TIERS = { device: "on the device", host: "in main memory", disk: "on disk" };

export function create(element, { use }) {
  const list = el("div", { class: "cards" });
  const state = el("p", { class: "muted", role: "status" });
  replace(
    element,
    el("h1", { id: "adapters-title" }, "Adapters"),
    el("p", { class: "lead" }, "Every adapter that can be named in a request, with the report of its training where its folder has one."),
    state,
    list,
  );
  async function load() {
    try {
      const { data } = await getJson("/v1/adapters");
      replace(list, ...data.map((adapter) => card(adapter, use)));
      state.textContent = data.length ? "" : "There are none. Start the server with --adapters-dir, or load one over the API.";
    } catch (error) {
      state.textContent = error.message;
    }
  }
  return { open: load, close: () => {} };
}

function card(adapter, use) {
  const facts = [
    ["place", TIERS[adapter.tier] ?? adapter.tier],
    ["rank", adapter.max_rank ?? "–"],
    ["size", adapter.size_bytes === null ? "–" : bytes(adapter.size_bytes)],
    ["requests", `${adapter.uses}${adapter.running ? `, ${adapter.running} now` : ""}`],
    ["drafts kept", adapter.acceptance === null ? "–" : percent(adapter.acceptance)],
  ];
  return el(
    "article",
    { class: "panel" },
    el("header", {}, el("h2", {}, adapter.id), adapter.pinned ? el("span", { class: "badge" }, "pinned") : null, adapter.is_loading ? el("span", { class: "badge" }, "loading") : null),
    el("dl", { class: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))))),
    el("div", { class: "actions" }, el("button", { type: "button", class: "primary", on: { click: () => use(adapter.id) } }, "Try it"), adapter.has_report ? report(adapter.id) : el("span", { class: "hint" }, "no training report")),
  );
}

/** A link; where a key is needed, which links do not send, the report is fetched and saved. */
function report(name) {
  const path = `/v1/adapters/${encodeURIComponent(name)}/report`;
  if (!hasKey()) return el("a", { class: "button", href: path, target: "_blank", rel: "noopener" }, "Training report");
  const failed = el("span", { class: "error", role: "alert", hidden: true });
  const save = async () => {
    failed.hidden = true;
    try {
      const head = `<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="${POLICY}">`;
      const url = URL.createObjectURL(new Blob([head, await getBlob(path)], { type: "text/html" }));
      el("a", { href: url, download: `${name}-report.html` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      failed.textContent = error.message;
      failed.hidden = false;
    }
  };
  return el("span", {}, el("button", { type: "button", class: "quiet", on: { click: save } }, "Save training report"), failed);
}
