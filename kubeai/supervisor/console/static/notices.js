// Short messages: visible ones at the corner of the page, and announcements for screen readers.

import { h, iconButton, ICONS, setText } from "./dom.js";

const SHOWN_MAX = 4;
const SUCCESS_S = 6;

const region = document.getElementById("notices");
const polite = document.getElementById("announcements");

/** Show that something was done. It goes away by itself. */
export function say(text) {
  const notice = show("done", text);
  setTimeout(() => notice.remove(), SUCCESS_S * 1000);
}

/** Show an error until it is dismissed. */
export function complain(text) {
  show("failed", text);
}

/** Have a screen reader say something that the page shows elsewhere. */
export function announce(text) {
  setText(polite, text);
}

function show(kind, text) {
  const notice = h("div", { class: `notice ${kind}`, role: kind === "failed" ? "alert" : "status" },
    h("p", {}, text), iconButton("Dismiss", ICONS.close, () => notice.remove()));
  region.append(notice);
  while (region.childElementCount > SHOWN_MAX) region.firstElementChild.remove();
  return notice;
}
