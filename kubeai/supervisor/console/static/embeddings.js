// The Playground's embeddings: the vector of a text, and how similar a second text is.

import { h } from "./dom.js";
import { createForm } from "./form.js";
import { count, plural, seconds } from "./format.js";

const PATH = "/embeddings";
const VALUES_SHOWN = 8;

/** `{root, settings, request()}`; `model()` is the chosen model's ID. */
export function createEmbeddings({ model, changed }) {
  const text = h("textarea", { id: "text", rows: "5", oninput: changed });
  const other = h("textarea", { id: "text-2", rows: "5", oninput: changed });

  function request() {
    const texts = [text.value, other.value].filter((each) => each.trim());
    return { path: PATH, body: { model: model(), input: texts.length ? texts : ["Hello!"],
      encoding_format: "float" } };
  }

  return createForm({ action: "Embed", required: [text], model, request, describe,
    fields: [["Text", text], ["Compare with (optional)", other]] });
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
