// The control that shows and changes a Model's replicas.

import { change } from "./api.js";
import { h, iconButton, ICONS, setAttribute, setText } from "./dom.js";
import { announce, complain } from "./notices.js";
import { store } from "./store.js";

// A step that the state does not confirm for longer is forgotten, so that the next one starts from
// what the server says.
const PENDING_MAX_S = 5;

/** `{root, update(model)}`: "1 / 2" between two buttons. */
export function scaleControl() {
  let model = null;
  let pending = null;
  const value = h("span", { class: "replicas", "aria-hidden": "true" });
  const spoken = h("span", { class: "offscreen" });
  const bounds = h("span", { class: "sub" });
  const down = iconButton("", ICONS.minus, () => step(-1), "icon step");
  const up = iconButton("", ICONS.plus, () => step(1), "icon step");
  const root = h("div", { class: "scale" }, h("div", { class: "scale-line" }, down, value,
    spoken, up), bounds);

  async function step(by) {
    const target = wanted() + by;
    if (reason(target)) return announce(reason(target));
    pending = { target, since: Date.now() };
    update(model);
    try {
      await change("POST", `models/${encodeURIComponent(model.name)}/scale`, { replicas: target });
      announce(`${model.name}: ${target} replicas desired`);
    } catch (error) {
      pending = null;
      complain(`${model.name} was not scaled: ${error.message}`);
    }
    update(model);
  }

  function wanted() {
    return pending?.target ?? model.replicas.desired;
  }

  /** Why a number of replicas is not allowed, or "". */
  function reason(target) {
    const { min, max } = model.replicas;
    if (target < min) return `minReplicas of ${model.name} is ${min}`;
    if (max !== null && target > max) return `maxReplicas of ${model.name} is ${max}`;
    return target < 0 ? "There are no replicas to remove" : "";
  }

  function update(next) {
    model = next;
    const { ready, desired, min, max } = model.replicas;
    const over = pending && Date.now() - pending.since > PENDING_MAX_S * 1000;
    if (pending && (over || desired === pending.target)) pending = null;
    setText(value, `${ready} / ${wanted()}`);
    setText(spoken, `${ready} ready, ${wanted()} desired`);
    setText(bounds, max === null ? `at least ${min}` : `${min} to ${max}`);
    const shown = store.state.can.scale && model.state !== "Deleting";
    for (const [button, by, verb] of [[down, -1, "down"], [up, 1, "up"]]) {
      const target = wanted() + by;
      setAttribute(button, "hidden", !shown);
      setAttribute(button, "aria-disabled", reason(target) ? "true" : null);
      const label = `Scale ${model.name} ${verb} to ${Math.max(target, 0)}`;
      setAttribute(button, "aria-label", label);
      setAttribute(button, "title", reason(target) || label);
    }
  }

  return { root, update };
}
