// The theme of the page: `data-theme` of the root is light or dark, `data-choice` may be system, too. Chosen by the event
// "theme-chosen" (app.js has the button), told of by "theme-changed". A classic script: it runs before the first paint.
"use strict";
{
  const THEMES = ["system", "light", "dark"];
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");

  const show = () => {
    const { choice } = root.dataset;
    root.dataset.theme = choice === "system" ? (systemDark.matches ? "dark" : "light") : choice;
    document.dispatchEvent(new CustomEvent("theme-changed"));
  };

  root.dataset.choice = "system";
  try {
    const kept = localStorage.getItem("specserve-theme");
    if (THEMES.includes(kept)) root.dataset.choice = kept;
  } catch {
    // storage may be forbidden; then the system's theme is used
  }
  show();
  systemDark.addEventListener("change", show);
  document.addEventListener("theme-chosen", ({ detail: theme }) => {
    root.dataset.choice = theme;
    try {
      localStorage.setItem("specserve-theme", theme);
    } catch {
      // as above; then the choice ends with the page
    }
    show();
  });
}
