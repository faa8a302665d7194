// The engine's log of one pod: streamed, with a limit on the lines that are kept.

import { consoleUrl, send } from "./api.js";
import { copyButton, h, setAttribute, setText } from "./dom.js";
import { count } from "./format.js";
import { store } from "./store.js";

const LINES_MAX = 2000;
const LINE_MAX_CHARS = 4000;
const TAIL_LINES = 500;
const BACKOFF_S = [1, 2, 4, 8];
const NEAR_END_PX = 24;
// Colours and cursor movements of terminals: CSI sequences, and single escapes.
const ESCAPES = /\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[\x00-\x08\x0b-\x1f\x7f]/g;

/** Show the log until `signal` aborts; returns the function that takes the Model's detail. */
export function showLog(content, signal, name) {
  const view = createView();
  content.append(view.root);
  let pod = "";
  let current = new AbortController();
  signal.addEventListener("abort", () => current.abort());

  function open(next) {
    current.abort();
    current = new AbortController();
    pod = next;
    view.lines.clear();
    if (pod) follow(view, name, pod, current.signal);
    else view.say("There is no pod.");
  }
  view.pods.addEventListener("change", () => open(view.pods.value));
  view.say("There is no pod.");
  return (model) => {
    showPods(view.pods, model.pods);
    if (view.pods.value !== pod) open(view.pods.value);
  };
}

function createView() {
  const pods = h("select", { id: "log-pod" });
  const status = h("span", { class: "sub", role: "status" });
  const output = h("div", { class: "log mono", tabindex: "0", role: "log", "aria-live": "off",
    "aria-label": "Log of the engine" });
  const following = h("button", { type: "button", class: "small", "aria-pressed": "true" },
    "Follow");
  const lines = new Lines(output, () => following.getAttribute("aria-pressed") === "true");
  const total = h("span", { class: "sub" });
  lines.onchange = () =>
    setText(total, `${count(lines.size)} of at most ${count(LINES_MAX)} lines`);
  lines.onchange();
  function toggle(on) {
    setAttribute(following, "aria-pressed", on);
    if (on) output.scrollTop = output.scrollHeight;
  }
  following.addEventListener("click", () =>
    toggle(following.getAttribute("aria-pressed") !== "true"));
  // Scrolling up to read stops following, and scrolling to the end starts it again.
  let top = 0;
  output.addEventListener("scroll", () => {
    const left = output.scrollHeight - output.scrollTop - output.clientHeight;
    if (left < NEAR_END_PX) setAttribute(following, "aria-pressed", true);
    else if (output.scrollTop < top) setAttribute(following, "aria-pressed", false);
    top = output.scrollTop;
  });
  const root = h("section", {},
    h("div", { class: "title" }, h("h2", {}, "Log"),
      h("label", { class: "field-line" }, "Pod", pods), status,
      h("div", { class: "tools" }, total, following,
        h("button", { type: "button", class: "small", onclick: () => lines.clear() }, "Clear"),
        copyButton("Copy log", () => lines.text()))),
    output);
  return { root, pods, lines, say: (text) => setText(status, text) };
}

/** Keep the options of the select equal to the pods; the choice stays while its pod exists. */
function showPods(select, pods) {
  const names = pods.map((pod) => pod.name);
  if ([...select.options].map((option) => option.value).join() === names.join()) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}

/** Read the log until it is aborted; reads it again with back-off when it ends. */
async function follow(view, name, pod, signal) {
  const url = consoleUrl(`models/${encodeURIComponent(name)}/log`);
  url.search = new URLSearchParams({ pod, tail: String(TAIL_LINES) });
  for (let attempt = 0; !signal.aborted; attempt += 1) {
    let message = "The log has ended.";
    try {
      view.say("Opening the log…");
      const response = await send(url, { signal });
      view.lines.clear();
      view.say("");
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        view.lines.append(value);
        attempt = 0;
      }
    } catch (error) {
      message = error.status ? error.message : "The log was cut off.";
    }
    if (signal.aborted) return;
    view.say(message);
    await pause(BACKOFF_S[Math.min(attempt, BACKOFF_S.length - 1)], signal);
  }
}

/** Wait, and then until the connection to KubeAI is back. */
async function pause(wait_s, signal) {
  await new Promise((done) => {
    setTimeout(done, wait_s * 1000);
    signal.addEventListener("abort", done, { once: true });
  });
  while (!signal.aborted && store.connection.kind !== "live") {
    await new Promise((done) => {
      store.addEventListener("connection", done, { once: true });
      signal.addEventListener("abort", done, { once: true });
    });
  }
}

/** The lines in an element. They are added once a frame, and the first ones are dropped. */
class Lines {
  size = 0;
  onchange = () => {};
  #output;
  #following;
  #pending = [];
  #rest = "";
  #frame = 0;

  constructor(output, following) {
    this.#output = output;
    this.#following = following;
  }

  append(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop().slice(0, LINE_MAX_CHARS);
    this.#pending.push(...lines.map(clean));
    if (this.#pending.length > LINES_MAX) this.#pending = this.#pending.slice(-LINES_MAX);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  clear() {
    this.#pending = [];
    this.#rest = "";
    this.#output.replaceChildren();
    this.size = 0;
    this.onchange();
  }

  text() {
    return [...this.#output.children].map((line) => line.textContent).join("\n");
  }

  #draw() {
    this.#frame = 0;
    this.#output.append(...this.#pending.map((line) => h("div", {}, line || " ")));
    this.#pending = [];
    while (this.#output.childElementCount > LINES_MAX) this.#output.firstElementChild.remove();
    this.size = this.#output.childElementCount;
    if (this.#following()) this.#output.scrollTop = this.#output.scrollHeight;
    this.onchange();
  }
}

/** A line without escape sequences; of a progress bar, its last state. */
function clean(line) {
  const last = line.trimEnd().split("\r").at(-1);
  const text = last.replace(ESCAPES, "");
  return text.length > LINE_MAX_CHARS ? `${text.slice(0, LINE_MAX_CHARS)}…` : text;
}
