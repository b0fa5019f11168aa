// The live board: what the engine does now, what drafts bring, and what the budget chose. Numbers come from stats_feed.
import { Chart, axisOf, bars, decades, fromZero, line, timeAxis, timeSeries } from "./charts.js";
import { acceptanceTable, replicaTable, sourceTable } from "./board_tables.js";
import { bytes, duration, el, number, percent, replace } from "./dom.js";
import { StatsFeed, lately } from "./stats_feed.js";

const NO_DATA = "nothing yet";

export function create(element) {
  const board = new Board(element);
  const feed = new StatsFeed({ onSample: (samples) => board.show(samples), onState: (text) => board.setState(text) });
  let isOpen = false;
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) feed.close(); // a tab that nobody sees keeps no connection
    else if (isOpen) feed.open();
  });
  return {
    open: () => {
      isOpen = true;
      feed.open();
    },
    close: () => {
      isOpen = false;
      feed.close();
    },
  };
}

class Board {
  constructor(element) {
    this._state = el("p", { class: "error", role: "status", hidden: true });
    this._engine = el("p", { class: "lead", id: "board-engine" }, "Waiting for the first numbers.");
    this._tiles = Object.fromEntries(TILES.map(({ id }) => [id, { value: el("span", { class: "value", data: { tile: id } }, "–"), note: el("span", { class: "hint" }, "") }]));
    const tiles = TILES.map(({ id, name }) => el("div", { class: "panel tile" }, el("dt", {}, name), el("dd", {}, this._tiles[id].value, this._tiles[id].note)));
    this._memory = el("div", { class: "meters" });
    this._adapters = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Drafts by adapter" });
    this._sources = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Drafts by source" });
    this._replicas = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Replicas" });
    this._replicaPanel = el("div", { class: "panel", hidden: true }, el("h2", {}, "Replicas"), el("p", { class: "hint" }, "All other figures are of all replicas together."), this._replicas);
    this._makeCharts();
    replace(
      element,
      el("h1", { id: "board-title" }, "Live board"),
      this._engine,
      this._state,
      el("dl", { class: "tiles" }, ...tiles),
      this._replicaPanel,
      el("div", { class: "charts" }, this._rate.element, this._requests.element),
      el("div", { class: "panel" }, el("h2", {}, "Drafts by adapter"), el("p", { class: "hint" }, "Since each was loaded. At each position: in how many of all verifications a draft was kept there, those that drafted less or nothing included."), this._adapters),
      el("div", { class: "charts" }, this._positions.element, el("div", { class: "panel" }, el("h2", {}, "Drafts by source"), el("p", { class: "hint" }, "Since the engine started."), this._sources)),
      el("div", { class: "charts" }, this._cost.element, this._choices.element),
      el("div", { class: "panel" }, el("h2", {}, "Memory"), this._memory),
    );
  }

  setState(text) {
    this._state.textContent = text;
    this._state.hidden = text === "";
  }

  show(samples) {
    const { snapshot } = samples.at(-1);
    const { engine, requests } = snapshot;
    this._engine.textContent = `${snapshot.model}, ${engine.status} on ${[engine.device, engine.dtype, `${engine.kernels} kernels`].join(", ")}, for ${duration(engine.uptime_s)}${engine.num_restarts ? `, ${engine.num_restarts} restarts` : ""}. specserve ${snapshot.version}.`;
    const recent = lately(samples);
    for (const { id, of } of TILES) {
      const [value, note] = of(snapshot, recent);
      this._tiles[id].value.textContent = value;
      this._tiles[id].note.textContent = note;
    }
    const times = samples.map((sample) => sample.snapshot.time_s);
    const rates = (name) => samples.map((sample) => sample.rates?.[name] ?? null);
    this._rate.show([times, rates("generated"), rates("undrafted")], recent ? `${number(recent.generated)} tokens a second, ${number(recent.undrafted)} estimated without drafts` : NO_DATA);
    const of = (name) => samples.map((sample) => sample.snapshot.requests[name]);
    this._requests.show([times, of("running"), of("waiting")], `${requests.running} running, ${requests.waiting} waiting`);
    this._replicaPanel.hidden = !snapshot.replicas.length;
    replace(this._replicas, replicaTable(snapshot.replicas));
    replace(this._adapters, acceptanceTable(snapshot.speculation));
    replace(this._sources, sourceTable(snapshot.speculation.by_source));
    this._showPositions(snapshot.speculation);
    this._showSteps(snapshot);
    this._showMemory(snapshot);
  }

  _showPositions({ drafted_per_pos: drafted, accepted_per_pos: accepted }) {
    const shares = drafted.map((num, pos) => (num ? (100 * (accepted[pos] ?? 0)) / num : null));
    const words = shares.map((share, pos) => `position ${pos + 1} ${number(share)} %`).join(", ");
    this._positions.show([shares.map((_, pos) => pos + 1), shares], words || NO_DATA);
  }

  _showSteps({ cost_table: table, steps }) {
    // One x axis for the table and for the steps that were: uPlot joins what has no value at an x.
    const rows = [...new Set([...table.rows, ...steps.recent.map((step) => step.num_rows)])].sort((a, b) => a - b);
    const known = new Map(table.rows.map((num, idx) => [num, 1000 * table.seconds[idx]]));
    const taken = new Map();
    for (const step of steps.recent) taken.set(step.num_rows, [...(taken.get(step.num_rows) ?? []), 1000 * step.seconds]);
    const mean = (values) => (values ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
    this._cost.show([rows, rows.map((num) => known.get(num)), rows.map((num) => mean(taken.get(num)))], table.rows.map((num, idx) => `${num} rows ${duration(table.seconds[idx])}`).join(", ") || NO_DATA);
    const recent = steps.recent;
    const drafts = recent.reduce((sum, step) => sum + step.num_drafts, 0);
    this._choices.show([recent.map((_, idx) => idx - recent.length + 1), recent.map((step) => step.num_rows), recent.map((step) => step.num_rows - step.num_drafts)], recent.length ? `${number(drafts / recent.length, 1)} drafts a step in the last ${recent.length} steps` : NO_DATA);
  }

  _showMemory({ kv, adapters }) {
    const tier = (name, { num, bytes: used, max_bytes: max }) => (max ? meter(name, used / max, `${num} adapters, ${bytes(used)} of ${bytes(max)}`) : null);
    replace(
      this._memory,
      meter("KV cache", kv.used_ratio, `${number(kv.blocks - kv.free_blocks)} of ${number(kv.blocks)} blocks of ${kv.block_size} tokens`),
      tier("Adapters on the device", adapters.device),
      tier("Adapters in main memory", adapters.host),
      el("p", { class: "hint" }, `${adapters.pinned} pinned, ${adapters.loads} loads, ${adapters.evictions} made room, ${adapters.waiting_loads} wait for room`),
    );
  }

  _makeCharts() {
    this._rate = new Chart("Tokens a second", "Of all requests; dashed: what the cost table estimates for the same requests without drafts.", (colour) => ({
      scales: { y: { range: fromZero } },
      axes: [timeAxis(), axisOf("tokens/s")],
      series: [timeSeries(), line("with drafts", colour("--accent"), { fill: `${colour("--accent")}1f` }), line("estimate without", colour("--ngram-line"), { dash: [6, 5] })],
    }));
    this._requests = new Chart("Requests", "Sequences that run, and those that wait for their turn.", (colour) => ({
      scales: { y: { range: fromZero } },
      axes: [timeAxis(), axisOf("sequences")],
      series: [timeSeries(), line("running", colour("--accent"), { fill: `${colour("--accent")}1f` }), line("waiting", colour("--prediction-line"), { dash: [2, 4] })],
    }));
    this._positions = new Chart("Acceptance by draft position", "Of all drafts at each position, those that were kept: also a draft behind a wrong one counts, as not kept. The table above divides by all verifications instead.", (colour) => ({
      scales: { x: { time: false, range: (_, low, high) => [0.4, (high ?? 1) + 0.6] }, y: { range: () => [0, 100] } },
      axes: [axisOf("position in the draft", { size: 34, incrs: [1, 2, 4] }), axisOf("kept, %")],
      legend: { live: false },
      series: [{ label: "position" }, bars("kept, %", colour("--accent"))],
    }));
    this._cost = new Chart("Cost of a step", "Line: the cost table; points: the latest steps. Where the line is flat, drafts are nearly free. Both axes are logarithmic.", (colour) => ({
      scales: { x: { time: false, distr: 3, log: 2 }, y: { distr: 3, range: (_, low, high) => [(low || 1) / 1.5, (high || 10) * 1.5] } },
      axes: [axisOf("rows", { size: 34 }), axisOf("milliseconds", { size: 62, splits: decades, filter: (_, splits) => splits, values: (_, ticks) => ticks.map((value) => number(value, value < 1 ? 2 : 0)) })],
      legend: { live: false },
      series: [
        { label: "rows" },
        line("cost table, ms", colour("--accent"), { spanGaps: true }),
        { ...line("latest steps, ms", colour("--ngram-line")), paths: () => null, points: { show: true, size: 7, fill: colour("--ngram-line") } },
      ],
    }));
    this._choices = new Chart("What the budget chose", "Rows of the latest steps: prompts and newest tokens, and drafts on top.", (colour) => ({
      scales: { x: { time: false, range: (_, low) => [(low ?? 0) - 0.6, 0.6] }, y: { range: fromZero } },
      axes: [axisOf("steps ago", { size: 34, incrs: [1, 2, 5, 10, 20, 50], values: (_, ticks) => ticks.map(Math.abs) }), axisOf("rows")],
      legend: { live: false },
      series: [{ label: "step" }, bars("drafts", colour("--head-line")), bars("prompts and newest tokens", colour("--muted"))],
    }));
  }
}

const TILES = [
  { id: "rate", name: "Tokens a second", of: (_, recent) => [recent ? number(recent.generated) : "0", recent ? "mean of the last seconds with work" : "idle"] },
  { id: "gain", name: "Gain of drafts", of: (_, recent) => (recent?.undrafted ? [`${number(recent.generated / recent.undrafted, 2)} ×`, `over ${number(recent.undrafted)} tokens/s estimated without`] : ["–", ""]) },
  { id: "running", name: "Running", of: ({ requests }) => [number(requests.running), `of ${requests.max_running}`] },
  { id: "waiting", name: "Waiting", of: ({ requests }) => [number(requests.waiting), requests.waiting ? `about ${duration(requests.wait_estimate_s)} for a new one` : "nobody"] },
  { id: "kept", name: "Drafts kept", of: ({ tokens }) => [tokens.drafted ? percent(tokens.accepted / tokens.drafted) : "–", `${number(tokens.accepted)} of ${number(tokens.drafted)}`] },
  { id: "kv", name: "KV cache", of: ({ kv }) => [percent(kv.used_ratio), `${number(kv.free_blocks)} blocks free`] },
  { id: "cached", name: "Prompt from the cache", of: ({ tokens }) => [tokens.prompt ? percent(tokens.cached_prompt / tokens.prompt) : "–", `${number(tokens.prompt)} tokens of prompts`] },
  { id: "done", name: "Finished", of: ({ requests: { finished } }) => [number(Object.values(finished).reduce((sum, num) => sum + num, 0)), `${number(finished.abort)} given up`] },
];

function meter(name, ratio, text) {
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span"));
  bar.firstChild.style.width = `${Math.min(100, 100 * (ratio || 0))}%`;
  return el("div", {}, el("div", { class: "meter-line" }, el("b", {}, name), el("span", { class: "muted" }, `${text} (${percent(ratio)})`)), bar);
}
