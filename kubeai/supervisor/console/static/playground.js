// The Playground: try a model through the public API, and copy the request as a program.
//
// It is built once and kept, so that a conversation survives a look at another view.

import { createChat } from "./chat.js";
import { copyButton, h, setAttribute, setText, showItems } from "./dom.js";
import { createEmbeddings } from "./embeddings.js";
import { createRerank } from "./rerank.js";
import { LANGUAGES } from "./snippets.js";
import { store } from "./store.js";
import { createTranscription } from "./transcription.js";

const TASKS = [
  { key: "chat", title: "Chat", feature: "TextGeneration", create: createChat },
  { key: "embeddings", title: "Embeddings", feature: "TextEmbedding", create: createEmbeddings },
  { key: "rerank", title: "Reranking", feature: "Reranking", create: createRerank },
  { key: "transcription", title: "Transcription", feature: "SpeechToText",
    create: createTranscription },
];
// What is longer is shortened on the screen, not in the copied program.
const SHOWN_MAX_CHARS = 20_000;
const DATA_URL = /(data:[\w/+.-]+;base64,[\w+/=]{24})[\w+/=]{100,}/g;

let playground = null;

/** Show the Playground in `main`, with the Model `name` chosen if there is one. */
export function showPlayground(main, signal, name) {
  playground ??= createPlayground();
  main.append(playground.root);
  playground.update();
  if (name) playground.choose(name);
  store.addEventListener("state", () => name && playground.choose(name, true), { signal });
  return "Playground";
}

function createPlayground() {
  const chosen = {}; // task → model ID
  const select = h("select", { id: "playground-model" });
  const options = new Map();
  const none = h("p", { class: "empty" });
  const code = createCode(() => tasks[task].request());
  const tasks = {};
  let task = "chat";
  let wanted = ""; // a Model from the address that has not been chosen yet

  for (const { key, create } of TASKS) {
    tasks[key] = create({ model: () => chosen[key] ?? "", changed: code.changed });
  }
  const switches = TASKS.map(({ key, title }) =>
    h("button", { type: "button", onclick: () => show(key), "data-task": key }, title));
  const settings = h("div", { class: "settings" },
    h("div", { class: "switch", role: "group", "aria-label": "Task" }, switches),
    h("label", {}, "Model", select), none,
    TASKS.map(({ key }) => tasks[key].settings));
  const stage = h("div", { class: "stage" }, TASKS.map(({ key }) => tasks[key].root));
  const root = h("div", { class: "playground" },
    h("h1", { tabindex: "-1", class: "offscreen" }, "Playground"), settings, stage, code.root);

  function show(key) {
    task = key;
    for (const { key: each } of TASKS) {
      for (const part of [tasks[each].root, tasks[each].settings]) {
        if (part) setAttribute(part, "hidden", each !== key);
      }
    }
    for (const button of switches) {
      setAttribute(button, "aria-pressed", button.dataset.task === key);
    }
    update();
  }

  function update() {
    const { feature } = TASKS.find(({ key }) => key === task);
    const models = (store.state?.models ?? []).filter((model) => model.features.includes(feature));
    const ids = models.flatMap((model) =>
      [model.name, ...model.adapters.map((adapter) => `${model.name}_${adapter}`)]
        .map((id) => ({ id, state: model.state })));
    showItems(select, options, ids, ({ id }) => id, createOption);
    if (!ids.some(({ id }) => id === chosen[task])) chosen[task] = ids[0]?.id;
    select.value = chosen[task] ?? "";
    setText(none, ids.length ? "" : `No Model has the feature ${feature}.`);
    setAttribute(none, "hidden", ids.length > 0);
    code.changed();
  }

  /** Choose a Model and a task that it can do; `once`: only if it has not been chosen before. */
  function choose(name, once = false) {
    if (once && wanted !== name) return;
    wanted = name;
    const model = store.model(name);
    if (!model) return;
    wanted = "";
    const found = TASKS.find(({ feature }) => model.features.includes(feature));
    if (!found) return;
    chosen[found.key] = name;
    show(found.key);
  }

  select.addEventListener("change", () => {
    chosen[task] = select.value;
    code.changed();
  });
  store.addEventListener("state", update);
  show(task);
  return { root, update, choose };
}

function createOption({ id }) {
  const root = h("option", { value: id });
  return { root, update: ({ state }) => setText(root, state === "Ready" ? id
    : `${id} (${state.toLowerCase()})`) };
}

/** The panel with the request as a program. `changed()` has it shown again in the next frame. */
function createCode(request) {
  let language = "curl";
  let frame = 0;
  const text = h("code");
  const buttons = Object.keys(LANGUAGES).map((name) =>
    h("button", { type: "button", "data-language": name, onclick: () => choose(name) }, name));
  const root = h("aside", { class: "request", "aria-label": "The request as a program" },
    h("div", { class: "request-head" },
      h("div", { class: "switch", role: "group", "aria-label": "Language" }, buttons),
      copyButton("Copy", () => LANGUAGES[language](request()))),
    h("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "Program" }, text));

  function choose(name) {
    language = name;
    changed();
  }
  function draw() {
    frame = 0;
    for (const button of buttons) {
      setAttribute(button, "aria-pressed", button.dataset.language === language);
    }
    const program = LANGUAGES[language](request()).replace(DATA_URL, "$1…");
    const long = program.length > SHOWN_MAX_CHARS;
    const start = program.slice(0, SHOWN_MAX_CHARS);
    setText(text, long ? `${start}\n… (Copy copies all of it)` : program);
  }
  function changed() {
    frame ||= requestAnimationFrame(draw);
  }
  return { root, changed };
}
