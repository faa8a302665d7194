// The Playground's embeddings: the vector of a text, and how similar a second text is.

import { publicUrl, send } from "./api.js";
import { h, setAttribute, setText } from "./dom.js";
import { count, plural, seconds } from "./format.js";
import { createProgress } from "./progress.js";

const PATH = "/embeddings";
const VALUES_SHOWN = 8;

/** `{root, settings, request()}`; `model()` is the chosen model's ID. */
export function createEmbeddings({ model, changed }) {
  const text = h("textarea", { id: "text", rows: "5", oninput: changed });
  const other = h("textarea", { id: "text-2", rows: "5", oninput: changed });
  const submit = h("button", { type: "button", class: "primary", onclick: embed }, "Embed");
  const failure = h("div", { class: "error", role: "alert", hidden: true });
  const result = h("div", { class: "result", role: "status" });
  const progress = createProgress();
  let busy = false;

  function request() {
    const texts = [text.value, other.value].filter((each) => each.trim());
    return { path: PATH, body: { model: model(), input: texts.length ? texts : ["Hello!"],
      encoding_format: "float" } };
  }

  async function embed() {
    if (busy || !model()) return;
    if (!text.value.trim()) {
      text.focus();
      return;
    }
    busy = true;
    setAttribute(submit, "aria-disabled", "true");
    setAttribute(failure, "hidden", true);
    const began = performance.now();
    const { body } = request();
    progress.start(body.model);
    try {
      const response = await send(publicUrl(PATH), {
        method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
      });
      result.replaceChildren(...describe(await response.json(),
        (performance.now() - began) / 1000));
    } catch (error) {
      result.replaceChildren();
      setText(failure, error.message);
      setAttribute(failure, "hidden", false);
    }
    progress.stop();
    busy = false;
    setAttribute(submit, "aria-disabled", null);
  }

  const root = h("div", { class: "form" },
    h("label", {}, "Text", text),
    h("label", {}, "Compare with (optional)", other),
    h("div", { class: "tools" }, submit), progress.root, failure, result);
  return { root, settings: null, request };
}

function describe({ data, usage }, took_s) {
  const vectors = data.map((item) => item.embedding);
  const facts = [["Dimensions", count(vectors[0].length)], ["Took", seconds(took_s)],
    ["Prompt", plural(usage?.prompt_tokens ?? 0, "token")]];
  if (vectors.length > 1) {
    facts.unshift(["Cosine similarity", cosine(vectors[0], vectors[1]).toFixed(4)]);
  }
  const tiles = h("dl", { class: "tiles" }, facts.map(([title, value]) =>
    h("div", { class: "tile" }, h("dt", {}, title), h("dd", {}, value))));
  const rows = vectors.map((vector, index) => h("div", { class: "vector" },
    h("span", { class: "sub" }, vectors.length > 1 ? `Text ${index + 1}` : "First values"),
    h("code", {}, `[${vector.slice(0, VALUES_SHOWN).map((value) => value.toFixed(4)).join(", ")}`
      + `${vector.length > VALUES_SHOWN ? ", …" : ""}]`)));
  return [tiles, ...rows];
}

export function cosine(a, b) {
  const dot = (left, right) => left.reduce((sum, value, index) => sum + value * right[index], 0);
  const norms = Math.sqrt(dot(a, a) * dot(b, b));
  return norms === 0 ? 0 : dot(a, b) / norms;
}
