// Sets the chosen theme before the first paint; app.js has the button. A classic script: modules run later.
"use strict";
{
  let theme = null;
  try {
    theme = localStorage.getItem("specserve-theme");
  } catch {
    // storage may be forbidden; then the system's theme is used
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
