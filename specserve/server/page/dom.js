// Elements without HTML: whatever a server, a model or an adapter says becomes text nodes and attributes, nothing else.

/** An element; `props` are attributes, but `on`: listeners by event, `data`: data attributes. False and null are left out. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function replace(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** Calls `update` with the next frame, or soon where frames are not drawn; several calls before then are one. */
export function onFrame(update) {
  let isWaiting = false;
  const run = () => {
    if (!isWaiting) return;
    isWaiting = false;
    update();
  };
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    if (!document.hidden) requestAnimationFrame(run);
    setTimeout(run, 200); // a tab behind others has no frames, nor has one that is hidden in between
  };
}

/** Puts `text` into the clipboard; false where the browser does not allow it (pages over plain HTTP). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

export const number = (value, digits = 0) =>
  Number.isFinite(value) ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : "–";

export const percent = (value) => (Number.isFinite(value) ? `${Math.round(100 * value)} %` : "–");

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${number(value, value < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 0.0995) return `${number(1000 * seconds, seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 60) return `${number(seconds, seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
