// The theme, before the first paint: "light" or "dark" if it was chosen, otherwise the system's.
// This is a classic script in the head, so that the page does not flash in the other theme.
(() => {
  const key = "kubeai-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  function stored() {
    try {
      const value = localStorage.getItem(key);
      return value === "light" || value === "dark" ? value : null;
    } catch {
      return null; // storage is blocked
    }
  }

  function show() {
    const theme = stored() ?? (system.matches ? "dark" : "light");
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    button?.setAttribute("aria-pressed", String(theme === "dark"));
  }

  function toggle() {
    const next = root.dataset.theme === "dark" ? "light" : "dark";
    const systems = system.matches ? "dark" : "light";
    try {
      // The system's theme needs no entry; the page then follows the system again.
      if (next === systems) localStorage.removeItem(key);
      else localStorage.setItem(key, next);
    } catch {
      // The choice then lasts until the page is loaded again.
    }
    root.dataset.theme = next;
    document.getElementById("theme").setAttribute("aria-pressed", String(next === "dark"));
  }

  show();
  system.addEventListener("change", show);
  addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", toggle);
  });
})();
