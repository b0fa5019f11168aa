// Starts the page: which view is shown, the theme, the key, and whether the server serves.
import { byId } from "./dom.js";
import { watchKey } from "./key_dialog.js";
import { Playground } from "./playground.js";

const POLL_MS = 5000;
const THEMES = ["system", "light", "dark"];

const playground = new Playground();
const views = { playground: null, board: () => import("./board.js"), adapters: () => import("./adapters.js") };
const opened = {};

async function show() {
  const name = location.hash.slice(1) in views ? location.hash.slice(1) : "playground";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const view of Object.keys(views)) byId(`view-${view}`).hidden = view !== name;
  for (const [other, view] of Object.entries(opened)) if (other !== name) view.close();
  document.title = name === "playground" ? "specserve" : `${name === "board" ? "Live board" : "Adapters"} · specserve`;
  if (views[name] === null) return;
  const module = await views[name]();
  opened[name] ??= module.create(byId(`view-${name}`), { use: useModel });
  if (!byId(`view-${name}`).hidden) opened[name].open();
}

function useModel(model) {
  location.hash = "#playground";
  playground.choose(model);
}

// -- theme

function nameTheme(theme) {
  byId("theme-name").textContent = theme;
  byId("theme-button").setAttribute("aria-label", `Theme: ${theme}`);
}

let theme = document.documentElement.dataset.choice;
nameTheme(theme);
byId("theme-button").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  document.dispatchEvent(new CustomEvent("theme-chosen", { detail: theme }));
  nameTheme(theme);
});

// -- key

watchKey(() => {
  load();
  show();
});

// -- whether the server serves

let isLoaded = false;
let state = "unknown";

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("/health", { cache: "no-store" });
      state = (await response.json()).status;
    } catch {
      state = "not reached";
    }
    const box = byId("state");
    if (box.dataset.state !== state) {
      box.dataset.state = state;
      box.textContent = state === "ok" ? "serving" : state;
      if (state === "ok" && !isLoaded) load();
    }
  }
  setTimeout(poll, POLL_MS);
}

/** The models, again after a key was given or the server was away. */
async function load() {
  try {
    await playground.settings.load();
    isLoaded = true;
  } catch {
    isLoaded = false; // the state or the dialog for the key says why
  }
}

addEventListener("hashchange", show);
addEventListener("focus", () => isLoaded && load()); // adapters come and go
load();
poll();
show();
