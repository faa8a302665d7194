// The Playground's reranking: which of several documents answer a query best.

import { publicUrl, send } from "./api.js";
import { h, setAttribute, setText } from "./dom.js";
import { plural, seconds } from "./format.js";
import { createProgress } from "./progress.js";

const PATH = "/rerank";

/** `{root, settings, request()}`; `model()` is the chosen model's ID. */
export function createRerank({ model, changed }) {
  const query = h("textarea", { id: "query", rows: "2", oninput: changed });
  const documents = h("textarea", { id: "documents", rows: "8", oninput: changed });
  const submit = h("button", { type: "button", class: "primary", onclick: rerank }, "Rerank");
  const failure = h("div", { class: "error", role: "alert", hidden: true });
  const result = h("div", { class: "result", role: "status" });
  const progress = createProgress();
  let busy = false;

  function request() {
    const lines = documents.value.split("\n").map((line) => line.trim()).filter((line) => line);
    return { path: PATH, body: { model: model(), query: query.value.trim() || "Hello!",
      documents: lines.length ? lines : ["Hello!"] } };
  }

  async function rerank() {
    if (busy || !model()) return;
    const empty = [query, documents].find((field) => !field.value.trim());
    if (empty) {
      empty.focus();
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
      result.replaceChildren(...describe(body.documents, await response.json(),
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
    h("label", {}, "Query", query),
    h("label", {}, "Documents (one on each line)", documents),
    h("div", { class: "tools" }, submit), progress.root, failure, result);
  return { root, settings: null, request };
}

/** The documents, best first, which some engines leave to the client. */
function describe(documents, { results }, took_s) {
  const ranked = results.toSorted((a, b) => b.relevance_score - a.relevance_score);
  return [
    h("ol", { class: "ranked" }, ranked.map(({ index, relevance_score: score }) => h("li", {},
      h("code", {}, score.toFixed(4)), " ", documents[index] ?? `Document ${index + 1}`))),
    h("p", { class: "figures" }, `${seconds(took_s)} · ${plural(documents.length, "document")}`),
  ];
}
