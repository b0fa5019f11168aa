// The dialog that asks for the key: whenever the server wants one, and by the button that names it.
import { hasKey, setKey } from "./api.js";
import { byId, el } from "./dom.js";

/** Makes the dialog; `use` is called when a key was given, or an empty one that forgets it. */
export function watchKey(use) {
  const reason = el("p", { id: "key-reason" });
  const input = el("input", { id: "key-input", type: "password", autocomplete: "off", spellcheck: "false" });
  const dialog = el("dialog", { id: "key-dialog", "aria-labelledby": "key-title" },
    el("form", { method: "dialog" },
      el("h2", { id: "key-title" }, "API key"),
      reason,
      el("label", { class: "field" }, "Key", input),
      el("div", { class: "actions" },
        el("button", { type: "submit", class: "primary", value: "use" }, "Use it"),
        el("button", { type: "submit", class: "quiet", value: "cancel" }, "Cancel"))));
  document.body.append(dialog);

  function ask(why) {
    byId("key-button").hidden = false;
    if (dialog.open) return;
    reason.textContent = `${why} The key is kept in this tab until it is closed.`;
    input.value = "";
    dialog.returnValue = ""; // Escape leaves what the last close has set
    dialog.showModal();
  }

  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "use") return;
    setKey(input.value);
    input.value = "";
    use();
  });
  byId("key-button").hidden = !hasKey();
  byId("key-button").addEventListener("click", () => ask(hasKey() ? "A key is in use; an empty one forgets it." : ""));
  document.addEventListener("key-needed", () => ask(hasKey() ? "The server does not take this key." : "The server wants a key."));
}
