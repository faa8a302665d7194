// A Model's state in a word, and why.

import { h, setAttribute, setText } from "./dom.js";

const KINDS = {
  Ready: "ok",
  Starting: "busy",
  "Scaled to zero": "idle",
  Degraded: "warn",
  Failed: "bad",
  Deleting: "idle",
};

/** `{root, update(model)}`: the state, with reason and message under it. */
export function stateBadge() {
  const word = h("span", { class: "badge" });
  const why = h("span", { class: "why" });
  function update(model) {
    setText(word, model.state);
    setAttribute(word, "data-kind", KINDS[model.state] ?? "idle");
    const text = reasonText(model);
    setText(why, text);
    setAttribute(why, "title", text || null);
  }
  return { root: h("div", { class: "state" }, word, why), update };
}

/** Why a Model is in its state; nothing where the state and the replicas say it all. */
function reasonText({ state, reason, message, replicas }) {
  if (state === "Ready" && replicas.ready >= replicas.desired) return "";
  const same = reason.toLowerCase() === state.replaceAll(" ", "").toLowerCase();
  return [same ? "" : reason, message].filter(Boolean).join(": ");
}
