// One Model: overview, log, YAML. The detail is read again after each change of the state.

import { get } from "./api.js";
import { sparkline, stepChart } from "./charts.js";
import { deleteModel } from "./dialogs.js";
import { copyButton, h, setAttribute, setNumber, setText, showItems, table } from "./dom.js";
import { age, count, date, plural, rate, seconds, share, windowOf } from "./format.js";
import { showLog } from "./log.js";
import { announce } from "./notices.js";
import { scaleControl } from "./scaling.js";
import { stateBadge } from "./states.js";
import { store } from "./store.js";

const REFRESH_S = 5; // without a change of the state, such as while ages grow
const TABS = [["", "Overview"], ["log", "Log"], ["yaml", "YAML"]];

/** Show a Model in `main` until `signal` aborts; `tab` is "", "log" or "yaml". */
export function showModel(main, signal, name, tab) {
  const heading = createHeading(name, tab);
  const content = h("div", { class: "content" });
  const gone = h("div", { class: "empty", hidden: true });
  main.append(heading.root, gone, content);
  const show = { "": showOverview, log: showLog, yaml: showYaml }[tab] ?? showOverview;
  const update = show(content, signal, name);
  let reading = false;
  let state = "";

  async function refresh() {
    if (reading || store.connection.kind !== "live") return;
    reading = true;
    try {
      const model = await get(`models/${encodeURIComponent(name)}`, signal);
      setAttribute(gone, "hidden", true);
      for (const part of [content, heading.body]) setAttribute(part, "hidden", false);
      heading.update(model);
      update(model);
      if (state && state !== model.state) announce(`${name} is now: ${model.state}`);
      state = model.state;
    } catch (error) {
      if (signal.aborted) return;
      setText(gone, error.message);
      setAttribute(gone, "hidden", false);
      if (error.status === 404) {
        for (const part of [content, heading.body]) setAttribute(part, "hidden", true);
      }
    } finally {
      reading = false;
    }
  }
  store.addEventListener("state", refresh, { signal });
  const timer = setInterval(refresh, REFRESH_S * 1000);
  signal.addEventListener("abort", () => clearInterval(timer));
  refresh();
  return name;
}

function createHeading(name, tab) {
  const path = `#/models/${encodeURIComponent(name)}`;
  const badge = stateBadge();
  const scale = scaleControl();
  const facts = h("p", { class: "summary" });
  let model = null;
  const remove = h("button", { type: "button", class: "danger", onclick: del }, "Delete");
  async function del() {
    if (await deleteModel(model)) location.hash = "#/models";
  }
  const tabs = TABS.map(([key, title]) => h("a", {
    href: key ? `${path}/${key}` : path, "aria-current": key === tab ? "page" : null }, title));
  const body = h("div", { class: "heading", hidden: true }, badge.root, facts,
    h("div", { class: "tools" }, scale.root,
      h("a", { class: "button", href: `#/playground/${encodeURIComponent(name)}` }, "Try"),
      remove));
  const root = h("header", {},
    h("nav", { class: "crumbs", "aria-label": "Breadcrumb" },
      h("a", { href: "#/models" }, "Models"), h("span", { "aria-hidden": "true" }, "/")),
    h("h1", { tabindex: "-1" }, name), body,
    h("nav", { class: "tabs", "aria-label": "Parts of the Model" }, tabs));
  function update(next) {
    model = next;
    badge.update(model);
    scale.update(model);
    const adapters = model.adapters.length ? `adapters: ${model.adapters.join(", ")}` : "";
    setText(facts, [model.engine, ...model.features, model.url, model.strategy, adapters,
      model.owner].filter(Boolean).join(" · "));
    setAttribute(remove, "hidden", !store.state.can.delete || model.state === "Deleting");
  }
  return { root, body, update };
}

// -- overview -------------------------------------------------------------------------------------

const POD_COLUMNS = [
  ["Pod"], ["State"],
  ["In flight", "number"],
  ["Pending tokens", "number", "Prompt tokens still to be computed"],
  ["Ring share", "number", "Share of the hash ring"],
  ["Cached", "number", "Share of the prompt tokens that the pod had cached"],
  ["Restarts", "number"],
  ["Age", "number"],
];
const CONDITION_COLUMNS = [["Condition"], ["Status"], ["Why"], ["Since", "number"]];

function showOverview(content, signal, name) {
  const tiles = createTiles(name);
  const pods = createList("Pods", POD_COLUMNS, (pod) => pod.name, podRow, "There is no pod.");
  const conditions = createList("Conditions", CONDITION_COLUMNS, (condition) => condition.type,
    conditionRow, "The operator has not written a condition yet.");
  const timeline = createTimeline();
  content.append(tiles.root, pods.root,
    h("div", { class: "columns" }, timeline.root, conditions.root));
  store.addEventListener("sample", tiles.sample, { signal });
  return (model) => {
    tiles.update(model);
    pods.update(model.pods);
    conditions.update(model.conditions);
    timeline.update(model.timeline);
  };
}

function createTiles(name) {
  const lines = { in_flight: sparkline(), tokens: sparkline("second") };
  const values = {};
  const window = h("dd", { class: "sub" });
  const tile = (key, title, hint, line) => {
    values[key] = h("dd", {});
    return h("div", { class: "tile" }, h("dt", { title: hint }, title), values[key], line);
  };
  const root = h("dl", { class: "tiles" },
    tile("flight", "In flight", "Requests that engines serve", lines.in_flight.root),
    tile("held", "Held", "Requests that wait for a replica"),
    tile("requests", "Requests/s", "Over the last minute", window),
    tile("output", "Output tokens/s", "Over the last minute", lines.tokens.root),
    tile("prompt", "Prompt tokens/s", "Over the last minute"),
    tile("p50", "TTFT p50", "Median over the last five minutes"),
    tile("p99", "TTFT p99", "Over the last five minutes"));
  function update({ in_flight, held, rates, ttft_s: ttft }) {
    setText(values.flight, count(in_flight));
    setText(values.held, count(held));
    setText(values.requests, rate(rates.requests_per_s));
    setText(window, windowOf(rates));
    setText(values.output, rate(rates.output_tokens_per_s));
    setText(values.prompt, rate(rates.prompt_tokens_per_s));
    setText(values.p50, seconds(ttft.p50));
    setText(values.p99, seconds(ttft.p99));
  }
  function sample() {
    for (const [what, line] of Object.entries(lines)) line.update(store.samples(name, what));
  }
  sample();
  return { root, update, sample };
}

/** A section with a table of items: `{root, update(items)}`. */
function createList(title, columns, key, create, nothing) {
  const rows = new Map();
  const body = h("tbody");
  const list = table(title, columns, body);
  const none = h("p", { class: "empty" }, nothing);
  const root = h("section", {}, h("h2", {}, title), list, none);
  function update(items) {
    showItems(body, rows, items, key, create);
    setAttribute(list, "hidden", items.length === 0);
    setAttribute(none, "hidden", items.length > 0);
  }
  return { root, update };
}

const POD_KINDS = { Ready: "ok", "Not ready": "busy", Pending: "busy", Ejected: "bad",
  Failed: "bad" };

/** The phase of a pod, or more exactly what a running pod does. */
function podState({ phase, ready, ejected }) {
  if (phase !== "Running") return phase;
  if (ejected) return "Ejected";
  return ready ? "Ready" : "Not ready";
}

function podRow(first) {
  const phase = h("td");
  const badge = h("span", { class: "badge" });
  const why = h("span", { class: "why" });
  phase.append(h("div", { class: "state" }, badge, why));
  const address = h("span", { class: "sub mono" });
  const numbers = Array.from({ length: 6 }, () => h("td", { class: "number" }));
  const root = h("tr", {}, h("th", { scope: "row" },
    h("span", { class: "mono" }, first.name), address), phase, numbers);
  function update(pod) {
    setText(address, pod.address ?? "");
    const state = podState(pod);
    setText(badge, state);
    setAttribute(badge, "data-kind", POD_KINDS[state] ?? "idle");
    const text = [pod.reason, pod.message].filter(Boolean).join(": ");
    setText(why, text);
    setAttribute(why, "title", text || null);
    const values = [count(pod.in_flight), count(pod.pending_tokens), share(pod.ring_share),
      share(pod.cached_share), count(pod.restarts), age(store.now() - pod.created_s)];
    values.forEach((value, index) => setNumber(numbers[index], value));
  }
  return { root, update };
}

function conditionRow(first) {
  const status = h("td");
  const why = h("td", { class: "wide" });
  const since = h("td", { class: "number" });
  const root = h("tr", {}, h("th", { scope: "row" }, first.type), status, why, since);
  function update(condition) {
    setText(status, condition.status);
    setText(why, [condition.reason, condition.message].filter(Boolean).join(": "));
    setText(since, age(store.now() - condition.last_transition_s));
    setAttribute(since, "title", date(condition.last_transition_s));
  }
  return { root, update };
}

function createTimeline() {
  const rows = new Map();
  const chart = stepChart();
  const list = h("ol", { class: "timeline" });
  const none = h("p", { class: "empty" }, "The number of replicas has not changed yet.");
  const root = h("section", {}, h("h2", {}, "Scaling"), chart.root, list, none);
  function update(steps) {
    chart.update(steps, store.now());
    showItems(list, rows, steps, (step) => `${step.time_s} ${step.from} ${step.to}`, stepRow);
    setAttribute(none, "hidden", steps.length > 0);
  }
  return { root, update };
}

function stepRow(step) {
  const since = h("time", { datetime: new Date(step.time_s * 1000).toISOString(),
    title: date(step.time_s) });
  const root = h("li", { class: step.to > step.from ? "up" : "down" },
    h("span", { class: "step" }, `${step.from} → ${step.to}`),
    h("span", { class: "reason" }, step.reason || "no reason is known"), since);
  return { root, update: () => setText(since, `${age(store.now() - step.time_s)} ago`) };
}

// -- YAML -----------------------------------------------------------------------------------------

function showYaml(content) {
  const text = h("code");
  const lines = h("span", { class: "sub" });
  content.append(h("section", {},
    h("div", { class: "title" }, h("h2", {}, "YAML"), lines,
      h("div", { class: "tools" }, copyButton("Copy YAML", () => text.textContent))),
    h("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "YAML" }, text)));
  return (model) => {
    setText(text, model.yaml);
    setText(lines, plural(model.yaml.trimEnd().split("\n").length, "line"));
  };
}
