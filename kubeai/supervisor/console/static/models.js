// The list of Models: one row each, updated in place.

import { deleteModel, openApply } from "./dialogs.js";
import { h, iconButton, ICONS, setAttribute, setNumber, setText, showItems, table } from "./dom.js";
import { count, plural, rate, seconds, windowOf } from "./format.js";
import { sparkline } from "./charts.js";
import { scaleControl } from "./scaling.js";
import { stateBadge } from "./states.js";
import { store, tokenRate } from "./store.js";

const COLUMNS = [
  ["Model"],
  ["State"],
  ["Replicas", "center", "Ready / desired"],
  ["In flight", "number", "Requests that engines serve, over the last two minutes"],
  ["Held", "number", "Requests that wait for a replica"],
  ["Requests/s", "number", "Over the last minute"],
  ["Tokens/s", "number",
    "Output tokens over the last minute, if engines report them, and prompt tokens"],
  ["TTFT p50", "number", "Median time to the first token over the last five minutes"],
  ["TTFT p99", "number", "99th percentile of the time to the first token"],
  ["Actions", "actions"],
];

// Kept when the view is left and opened again.
let filter = "";

/** Show the view in `main` until `signal` aborts. Returns its title. */
export function showModels(main, signal) {
  const rows = new Map();
  const body = h("tbody");
  const summary = h("p", { class: "summary" });
  const none = h("div", { class: "empty" });
  const search = h("input", { type: "search", id: "filter", value: filter, autocomplete: "off",
    placeholder: "Filter by name, state, engine, feature", "aria-label": "Filter Models" });
  const applyButton = h("button", { type: "button", onclick: () => openApply() },
    "Apply a manifest");
  const list = table("Models", COLUMNS, body);
  main.append(
    h("div", { class: "title" }, h("h1", { tabindex: "-1" }, "Models"), summary,
      h("div", { class: "tools" }, search, applyButton)),
    list, none);

  function update() {
    setAttribute(list, "hidden", !store.state);
    if (!store.state) return setText(none, "Loading…");
    const { models, can, synced } = store.state;
    const shown = models.filter(matches);
    showItems(body, rows, shown, (model) => model.name, createRow);
    setText(summary, summarize(models));
    setAttribute(applyButton, "hidden", !can.apply);
    setAttribute(list, "hidden", shown.length === 0);
    setAttribute(none, "hidden", shown.length > 0);
    setText(none, emptyText(models, can, synced));
  }
  search.addEventListener("input", () => {
    filter = search.value;
    update();
  });
  store.addEventListener("state", update, { signal });
  store.addEventListener("sample", () => rows.forEach((row) => row.sample()), { signal });
  update();
  return "Models";
}

function matches(model) {
  const text = [model.name, model.state, model.reason, model.engine, ...model.features,
    ...model.adapters].join(" ").toLowerCase();
  return filter.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function summarize(models) {
  const ready = models.filter((model) => model.state === "Ready").length;
  const total = (what) => models.reduce((sum, model) => sum + model[what], 0);
  return [plural(models.length, "Model"), `${ready} ready`,
    `${count(total("in_flight"))} in flight`, `${count(total("held"))} held`].join(" · ");
}

function emptyText(models, can, synced) {
  if (!synced) return "KubeAI is still reading the Models…";
  if (models.length) return "No Model matches the filter.";
  return can.apply
    ? "There is no Model yet. Apply a manifest: drop its file here, or use the button above."
    : "There is no Model yet. Apply a manifest with kubectl.";
}

function createRow(first) {
  const parts = {
    engine: h("span", { class: "sub" }),
    state: stateBadge(),
    scale: scaleControl(),
    inFlight: h("span"),
    inFlightLine: sparkline(),
    held: h("td", { class: "number" }),
    requests: h("span"),
    window: h("span", { class: "sub" }),
    output: h("span"),
    outputLine: sparkline("second"),
    prompt: h("span", { class: "sub" }),
    p50: h("td", { class: "number" }),
    p99: h("td", { class: "number" }),
  };
  let model = first;
  const path = encodeURIComponent(first.name);
  const remove = iconButton(`Delete ${first.name}`, ICONS.bin, () => deleteModel(model));
  const root = h("tr", {},
    h("th", { scope: "row" },
      h("a", { class: "name", href: `#/models/${path}` }, first.name), parts.engine),
    h("td", { class: "state-cell" }, parts.state.root),
    h("td", { class: "center" }, parts.scale.root),
    h("td", { class: "number" },
      h("div", { class: "charted" }, parts.inFlightLine.root, parts.inFlight)),
    parts.held,
    h("td", { class: "number" }, parts.requests, parts.window),
    h("td", { class: "number" },
      h("div", { class: "charted" }, parts.outputLine.root, parts.output), parts.prompt),
    parts.p50,
    parts.p99,
    h("td", { class: "actions" },
      h("a", { class: "small button", href: `#/playground/${path}`,
        "aria-label": `Try ${first.name} in the Playground` }, "Try"),
      remove));

  function update(next) {
    model = next;
    updateRow(parts, model);
    setAttribute(remove, "hidden", !store.state.can.delete || model.state === "Deleting");
  }
  function sample() {
    parts.inFlightLine.update(store.samples(model.name, "in_flight"));
    parts.outputLine.update(store.samples(model.name, "tokens"));
  }
  sample();
  return { root, update, sample };
}

function updateRow(parts, model) {
  const { rates, ttft_s: ttft } = model;
  setText(parts.engine, [model.engine, ...model.features].join(" · "));
  parts.state.update(model);
  parts.scale.update(model);
  setNumber(parts.inFlight, count(model.in_flight));
  setNumber(parts.held, count(model.held));
  setAttribute(parts.held, "class", model.held ? "number alarming" : "number");
  setNumber(parts.requests, rate(rates.requests_per_s));
  setText(parts.window, windowOf(rates));
  const tokens = tokenRate(model);
  const prompt = rates.prompt_tokens_per_s;
  setNumber(parts.output, rate(tokens));
  setText(parts.prompt, tokens === prompt ? (prompt ? "prompt" : "") : `${rate(prompt)} prompt`);
  setNumber(parts.p50, seconds(ttft.p50));
  setNumber(parts.p99, seconds(ttft.p99));
}
