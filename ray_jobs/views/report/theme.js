"use strict";

const root = document.documentElement;
const byId = (id) => document.getElementById(id);

// The theme: the system's, until the button is pressed.
const theme = byId("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const showTheme = () => theme.setAttribute("aria-pressed", String((root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark"));
theme.addEventListener("click", () => {
  root.dataset.theme = theme.getAttribute("aria-pressed") === "true" ? "light" : "dark";
  showTheme();
});
system.addEventListener("change", showTheme);
theme.hidden = false;
showTheme();
