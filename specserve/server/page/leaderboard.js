// The leaderboard where a key is needed, which a browser does not send by itself: pages are fetched with it and shown in a
// frame that runs no scripts. Links among them become fragments of this page's address, so that back leads back.
import { getBlob } from "./api.js";
import { byId } from "./dom.js";
import { watchKey } from "./key_dialog.js";

const ROOT = "/leaderboard/";
const NAME = /^[\w-][\w.-]*$/;
const frame = byId("shown");
let address = null;

async function show() {
  const named = location.hash.slice(1) || location.pathname.slice(ROOT.length);
  try {
    const page = await getBlob(ROOT + (NAME.test(named) ? named : ""));
    if (address !== null) URL.revokeObjectURL(address);
    address = URL.createObjectURL(page);
    frame.contentWindow.location.replace(address); // a new src would be a step of its own on the way back
    frame.hidden = false;
    byId("failed").hidden = true;
  } catch (error) {
    frame.hidden = true;
    byId("failed").hidden = false;
    byId("failed").textContent = error.message;
  }
}

frame.addEventListener("load", () => {
  const shown = frame.contentDocument;
  document.title = shown.title || "Leaderboard";
  for (const link of shown.querySelectorAll("a[href]")) {
    const to = link.getAttribute("href");
    if (!NAME.test(to)) continue;
    link.target = "_top";
    link.href = new URL(`#${to}`, location.href).href;
  }
});

watchKey(show);
addEventListener("hashchange", show);
show();
