// The Playground's reranking: which of several documents answer a query best.

import { h } from "./dom.js";
import { createForm } from "./form.js";
import { plural, seconds } from "./format.js";

const PATH = "/rerank";

/** `{root, settings, request()}`; `model()` is the chosen model's ID. */
export function createRerank({ model, changed }) {
  const query = h("textarea", { id: "query", rows: "2", oninput: changed });
  const documents = h("textarea", { id: "documents", rows: "8", oninput: changed });

  function request() {
    const lines = documents.value.split("\n").map((line) => line.trim()).filter((line) => line);
    return { path: PATH, body: { model: model(), query: query.value.trim() || "Hello!",
      documents: lines.length ? lines : ["Hello!"] } };
  }

  return createForm({ action: "Rerank", required: [query, documents], model, request, describe,
    fields: [["Query", query], ["Documents (one on each line)", documents]] });
}

/** The documents, best first, which some engines leave to the client. */
function describe({ results }, took_s, { documents }) {
  const ranked = results.toSorted((a, b) => b.relevance_score - a.relevance_score);
  return [
    h("ol", { class: "ranked" }, ranked.map(({ index, relevance_score: score }) => h("li", {},
      h("code", {}, score.toFixed(4)), " ", documents[index] ?? `Document ${index + 1}`))),
    h("p", { class: "figures" }, `${seconds(took_s)} · ${plural(documents.length, "document")}`),
  ];
}
