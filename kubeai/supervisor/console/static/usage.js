// What API keys have used since their first request, as all replicas of KubeAI have stored it.

import { get } from "./api.js";
import { h, setAttribute, setNumber, setText, table } from "./dom.js";
import { count, plural } from "./format.js";
import { store } from "./store.js";

const REFRESH_S = 30; // how often KubeAI stores it
const GROUPS = [["", "key and Model"], ["key", "key"], ["tenant", "tenant"], ["model", "Model"]];
const NAMES = { "": ["key", "tenant", "model"], key: ["key", "tenant"], tenant: ["tenant"],
  model: ["model"] };
const HEADS = { key: "Key", tenant: "Tenant", model: "Model" };
const COUNTS = [
  ["requests", "Requests"],
  ["estimated_requests", "Estimated", "Requests whose tokens the engine has not reported"],
  ["prompt_tokens", "Prompt", "Prompt tokens"],
  ["cached_tokens", "Cached", "Prompt tokens that the engine had cached"],
  ["completion_tokens", "Completion", "Completion tokens"],
];

// Kept when the view is left and opened again.
let by = "";

/** Show the view in `main` until `signal` aborts. Returns its title. */
export function showUsage(main, signal) {
  const summary = h("p", { class: "summary" });
  const none = h("div", { class: "empty" });
  const list = h("div");
  const select = h("select", { id: "usage-by" },
    GROUPS.map(([value, name]) => h("option", { value }, name)));
  select.value = by;
  main.append(
    h("div", { class: "title" }, h("h1", { tabindex: "-1" }, "Usage"), summary,
      h("div", { class: "tools" }, h("label", { class: "field-line" }, "By", select))),
    list, none);
  let asked = 0;

  async function update() {
    if (!store.state.keys) {
      setText(none, "Usage is counted for API keys, and no keys are required.");
      return;
    }
    const number = ++asked;
    try {
      const usage = await get(`usage?by=${by}`, signal);
      if (number === asked) show(usage);
    } catch (error) {
      if (error.name === "AbortError" || number !== asked) return;
      setText(none, error.message);
      setAttribute(none, "hidden", null);
    }
  }
  function show({ rows, count: all, total }) {
    const left = all - rows.length;
    setText(summary, `${plural(total.requests, "request")} · `
      + `${count(total.prompt_tokens)} prompt and ${count(total.completion_tokens)} completion tokens`
      + (left ? ` · ${count(left)} more rows in kubeai usage` : ""));
    const body = h("tbody", {}, rows.map((row) => rowOf(row, NAMES[by])));
    list.replaceChildren(table("Usage", columns(NAMES[by]), body));
    setAttribute(list, "hidden", rows.length === 0);
    setAttribute(none, "hidden", rows.length > 0);
    setText(none, "No usage is stored yet. KubeAI stores it every 30 seconds.");
  }
  select.addEventListener("change", () => {
    by = select.value;
    update();
  });
  const timer = setInterval(() => store.state && update(), REFRESH_S * 1000);
  signal.addEventListener("abort", () => clearInterval(timer));
  setText(none, "Loading…");
  if (store.state) update();
  else store.addEventListener("state", update, { once: true, signal });
  return "Usage";
}

function columns(names) {
  return [...names.map((name) => [HEADS[name]]),
    ...COUNTS.map(([, name, hint]) => [name, "number", hint]), ["Last used"]];
}

function rowOf(row, names) {
  const [first, ...others] = names;
  const numbers = COUNTS.map(([name]) => {
    const cell = h("td", { class: "number" });
    setNumber(cell, count(row[name]));
    return cell;
  });
  return h("tr", {}, h("th", { scope: "row", class: "wide" }, row[first]),
    others.map((name) => h("td", { class: "wide" }, row[name])), numbers,
    h("td", { class: "nowrap" }, row.last_day));
}
