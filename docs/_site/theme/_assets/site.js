// Tables that are wider than the page scroll in a box that the theme adds; let the keyboard reach it.
window.addEventListener("load", () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) box.tabIndex = 0
})
