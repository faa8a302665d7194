// A form of the Playground that sends one JSON request and shows its response.

import { infer } from "./api.js";
import { h, setAttribute, setText } from "./dom.js";
import { createProgress } from "./progress.js";

/**
 * `{root, settings, request()}`. `fields`: pairs of a label and an element. `required`: those that must not
 * be empty. `request()`: the path and body. `describe(response, took_s, body)`: the elements of the result.
 */
export function createForm({ action, fields, required, model, request, describe }) {
  const submit = h("button", { type: "button", class: "primary", onclick: run }, action);
  const failure = h("div", { class: "error", role: "alert", hidden: true });
  const result = h("div", { class: "result", role: "status" });
  const progress = createProgress();
  let busy = false;

  async function run() {
    if (busy || !model()) return;
    const empty = required.find((field) => !field.value.trim());
    if (empty) {
      empty.focus();
      return;
    }
    busy = true;
    setAttribute(submit, "aria-disabled", "true");
    setAttribute(failure, "hidden", true);
    const began = performance.now();
    const { path, body } = request();
    progress.start(body.model);
    try {
      const response = await infer(path, {
        method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
      });
      result.replaceChildren(
        ...describe(await response.json(), (performance.now() - began) / 1000, body));
    } catch (error) {
      result.replaceChildren();
      setText(failure, error.message);
      setAttribute(failure, "hidden", false);
    }
    progress.stop();
    busy = false;
    setAttribute(submit, "aria-disabled", null);
  }

  const root = h("div", { class: "form" }, fields.map(([label, field]) => h("label", {}, label, field)),
    h("div", { class: "tools" }, submit), progress.root, failure, result);
  return { root, settings: null, request };
}
