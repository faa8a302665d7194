// What a request of the Playground waits for, with the time since it was sent.

import { h, setAttribute, setText } from "./dom.js";
import { seconds, words } from "./format.js";
import { store } from "./store.js";

const TICK_S = 0.1;
// A running engine usually answers within this time; then nothing flashes up.
const QUIET_S = 0.3;

/** `{root, start(id), say(text), stop()}`. */
export function createProgress() {
  const text = h("span", { role: "status" });
  const elapsed = h("span", { class: "elapsed", "aria-hidden": "true" });
  const root = h("div", { class: "progress", hidden: true },
    h("span", { class: "spinner", "aria-hidden": "true" }), text, elapsed);
  let timer = 0;
  let began = 0;
  let said = "";
  let id = "";

  function tick() {
    const passed_s = (performance.now() - began) / 1000;
    if (passed_s < QUIET_S && !said) return;
    setAttribute(root, "hidden", false);
    setText(text, said || expected(id));
    setText(elapsed, passed_s < 60 ? `${passed_s.toFixed(1)} s` : seconds(passed_s));
  }
  function start(modelId) {
    stop();
    id = modelId;
    began = performance.now();
    timer = setInterval(tick, TICK_S * 1000);
  }
  /** Show a comment of the stream, such as "waiting for a replica: pulling image, 1 of 3". */
  function say(comment) {
    said = comment.charAt(0).toUpperCase() + comment.slice(1);
    tick();
  }
  function stop() {
    clearInterval(timer);
    said = "";
    setAttribute(root, "hidden", true);
    setText(text, "");
  }
  return { root, start, say, stop };
}

/** What the state says about the model, until the stream says it. */
function expected(id) {
  const model = modelOf(id);
  if (!model || model.replicas.ready > 0) return "Waiting for the answer";
  if (model.message) return `Waiting for a replica: ${model.message}`;
  return `Waiting for a replica${model.reason ? `: ${words(model.reason)}` : ""}`;
}

/** The Model of "<model>" or "<model>_<adapter>". */
export function modelOf(id) {
  return store.model(id) ?? store.model(id.split("_", 1)[0]);
}
