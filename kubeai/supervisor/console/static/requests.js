// The last requests, the newest first. Their contents are not known to KubeAI.

import { timeBar } from "./charts.js";
import { h, setAttribute, setNumber, setText, showItems, table } from "./dom.js";
import { count, date, seconds, time } from "./format.js";
import { REQUESTS_MAX, store } from "./store.js";

const COLUMNS = [
  ["Time"],
  ["Model"],
  ["Endpoint"],
  ["Status"],
  ["Held", "number", "How long the request waited for a replica"],
  ["TTFT", "number", "Time to the first token"],
  ["Duration", "number"],
  ["Prompt", "number", "Prompt tokens"],
  ["Cached", "number", "Prompt tokens that the engine had cached"],
  ["Output", "number", "Output tokens"],
  ["Retries", "number"],
  ["Why this endpoint"],
];
const ENDS = { left: "client left", broken: "cut off" };

// Kept when the view is left and opened again.
let chosen = "";

/** Show the view in `main` until `signal` aborts. Returns its title. */
export function showRequests(main, signal) {
  const rows = new Map();
  const body = h("tbody");
  const select = h("select", { id: "requests-model" });
  const pause = h("button", { type: "button", "aria-pressed": "false" }, "Pause");
  const summary = h("p", { class: "summary" });
  const none = h("div", { class: "empty" });
  const list = table("Requests", COLUMNS, body);
  let paused = null; // the list as it was when it was paused

  main.append(
    h("div", { class: "title" }, h("h1", { tabindex: "-1" }, "Requests"), summary,
      h("div", { class: "tools" }, legend(),
        h("label", { class: "field-line" }, "Model", select), pause)),
    list, none);

  function update() {
    const all = paused ?? store.requests;
    showChoices(select, all);
    const shown = all.filter((request) => !chosen || request.model === chosen);
    const longest_s = Math.max(0, ...shown.map((request) => request.duration_s));
    showItems(body, rows, shown, (request) => request.key, () => createRow());
    for (const request of shown) rows.get(request.key).scale(request, longest_s);
    setText(summary, summarize(all, shown, paused));
    setAttribute(list, "hidden", shown.length === 0);
    setAttribute(none, "hidden", shown.length > 0);
    setText(none, all.length ? "No request of this model." : "No request has been served yet.");
  }
  select.addEventListener("change", () => {
    chosen = select.value;
    update();
  });
  pause.addEventListener("click", () => {
    paused = paused ? null : [...store.requests];
    setAttribute(pause, "aria-pressed", paused !== null);
    setText(pause, paused ? "Resume" : "Pause");
    update();
  });
  store.addEventListener("requests", update, { signal });
  update();
  return "Requests";
}

function legend() {
  const item = (kind, text) => h("span", { class: "key", "data-part": kind }, text);
  return h("span", { class: "legend", "aria-hidden": "true" },
    item("held", "held"), item("first", "first token"), item("answer", "answer"));
}

function summarize(all, shown, paused) {
  const shownText = `${shown.length} of the last ${REQUESTS_MAX} requests`;
  if (!paused) return shownText;
  const newest = paused[0]?.key ?? 0;
  const added = store.requests.filter((request) => request.key > newest).length;
  return `${shownText} · paused, ${count(added)} new`;
}

/** The models in the list; the chosen one stays, even without a request. */
function showChoices(select, requests) {
  const names = [...new Set(requests.map((request) => request.model))].filter(Boolean);
  if (chosen && !names.includes(chosen)) names.push(chosen);
  names.sort();
  if ([...select.options].slice(1).map((option) => option.value).join("\n") === names.join("\n")
    && select.options.length) return;
  select.replaceChildren(h("option", { value: "" }, "all"),
    ...names.map((name) => h("option", { value: name }, name)));
  select.value = chosen;
}

function createRow() {
  const began = h("td");
  const model = h("a");
  const endpoint = h("td", { class: "mono nowrap" });
  const badge = h("span", { class: "badge" });
  const end = h("span", { class: "sub" });
  const [held, first, prompt, cached, output, retries] =
    Array.from({ length: 6 }, () => h("td", { class: "number" }));
  const duration = h("span");
  const bar = timeBar();
  const why = h("td", { class: "wide" });
  const root = h("tr", {}, began, h("td", { class: "nowrap" }, model), endpoint,
    h("td", {}, badge, end), held, first,
    h("td", { class: "number" }, h("div", { class: "charted" }, bar.root, duration)),
    prompt, cached, output, retries, why);

  function update(request) {
    setText(began, time(request.time_s));
    setAttribute(began, "title", `${date(request.time_s)}, ID ${request.id}`);
    setText(model, request.model || "–");
    setAttribute(model, "href",
      request.model ? `#/models/${encodeURIComponent(request.model)}` : null);
    setText(endpoint, request.endpoint ?? "–");
    setText(badge, String(request.status));
    setAttribute(badge, "data-kind", statusKind(request));
    setText(end, ENDS[request.end] ?? "");
    setNumber(held, request.waited_s ? seconds(request.waited_s) : "–");
    setNumber(first, seconds(request.ttft_s));
    setNumber(duration, seconds(request.duration_s));
    setNumber(prompt, count(request.prompt_tokens));
    setNumber(cached, count(request.cached_tokens));
    setNumber(output, count(request.output_tokens));
    setNumber(retries, request.retries ? count(request.retries) : "–");
    setText(why, request.why || request.pick || "–");
  }
  return { root, update, scale: bar.update };
}

function statusKind({ status, end }) {
  if (status >= 500 || end === "broken") return "bad";
  return status >= 400 || end === "left" ? "warn" : "ok";
}
