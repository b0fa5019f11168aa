// Charts with uPlot (vendor/), in the page's colours of either theme, as wide as their place; each has its numbers in
// words for those who cannot see it.
import { el } from "./dom.js";

const HEIGHT = 210;
const charts = new Set();

/** A figure with a caption and a chart; `draw({colour, size})` gives uPlot's options, without a size. */
export class Chart {
  constructor(title, note, draw) {
    this._draw = draw;
    this._plot = null;
    this._data = null;
    this._place = el("div", { class: "plot", role: "img", "aria-label": title });
    this._title = title;
    this.element = el("figure", { class: "panel" }, el("figcaption", {}, el("h2", {}, title), el("p", { class: "hint" }, note)), this._place);
    charts.add(this);
    new ResizeObserver(() => this._resize()).observe(this._place);
  }

  /** `data` as uPlot takes it; `words` say the same. */
  show(data, words) {
    this._data = data;
    this._place.setAttribute("aria-label", `${this._title}: ${words}`);
    if (this._plot === null) this._make();
    else this._plot.setData(data);
    if (this._plot?.legend.live && this._plot.cursor.idx == null) this._plot.setLegend({ idx: data[0].length - 1 });
  }

  _make() {
    this._plot?.destroy();
    this._plot = null;
    const width = this._place.clientWidth;
    if (width === 0 || this._data === null) return; // not shown now
    const options = this._draw(colour);
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    options.axes = options.axes.map((own) => ({ ...axis, ...own }));
    options.cursor = { drag: { x: false, y: false }, points: { size: 7 } };
    options.legend ??= { live: true }; // with the newest values while nothing is pointed at
    this._plot = new uPlot({ width, height: HEIGHT, padding: [12, 22, 0, 0], ...options }, this._data, this._place);
  }

  _resize() {
    const width = this._place.clientWidth;
    if (this._plot === null) this._make();
    else if (width > 0 && width !== this._plot.width) this._plot.setSize({ width, height: HEIGHT });
  }
}

document.addEventListener("theme-changed", () => {
  for (const chart of charts) if (chart._plot !== null) chart._make();
});

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// -- parts of options

const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString("en-GB");
export const axisOf = (label, more = {}) => ({ label, labelSize: 18, labelFont: "12px system-ui, sans-serif", size: 48, ...more });
export const timeAxis = () => ({ values: (_, ticks) => ticks.map(clock), space: 90, size: 30 });
export const timeSeries = () => ({ label: "time", value: (_, value) => (value === null ? "–" : clock(value)) });
export const line = (label, stroke, more = {}) => ({ label, stroke, width: 2, points: { show: false }, value: (_, value) => figure(value), ...more });
export const fromZero = (_, low, high) => [0, Number.isFinite(high) && high > 0 ? 1.08 * high : 1];
export const decades = (_, axis, low, high) => {
  const first = Math.floor(Math.log10(low));
  const powers = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, idx) => 10 ** (first + idx));
  const splits = high / low > 100 ? powers : powers.flatMap((power) => [power, 2 * power, 5 * power]);
  return splits.filter((value) => value >= low && value <= high);
};
export const bars = (label, fill, more = {}) => ({ label, fill, stroke: fill, width: 0, points: { show: false }, paths: uPlot.paths.bars({ size: [0.72, 64] }), value: (_, value) => figure(value), ...more });

function figure(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}
