// The Playground's chat: streamed answers, with images, a stop button and the progress of a start.

import { infer, messageOf } from "./api.js";
import { Answer } from "./answer.js";
import { h, iconButton, ICONS, setAttribute, setText } from "./dom.js";
import { count, plural, rate, seconds } from "./format.js";
import { announce } from "./notices.js";
import { createProgress } from "./progress.js";
import { events } from "./sse.js";

const IMAGES_MAX = 4;
const IMAGE_MAX_BYTES = 8 << 20;
const PATH = "/chat/completions";
const HELD = "X-KubeAI-Waited"; // on a stream that began with comments, the last one has the total
const HELD_COMMENT = /^waited ([\d.]+) s$/;

/** The chat as `{root, settings, request()}`; `model()` is the chosen model's ID. */
export function createChat({ model, changed }) {
  const settings = createSettings(changed);
  const composer = createComposer(changed);
  const list = h("div", { class: "conversation", role: "log", "aria-live": "off", tabindex: "0",
    "aria-label": "Conversation" });
  const hint = h("p", { class: "empty" }, "Messages are sent through the gateway, like those of "
    + "any other client. A model without a replica is started.");
  const progress = createProgress();
  list.append(hint);
  const messages = []; // of the API
  let sent = null; // the last request
  let current = null; // AbortController of the request in flight

  function body(history) {
    const { system, ...parameters } = settings.values();
    const first = system ? [{ role: "system", content: system }] : [];
    return { model: model(), messages: [...first, ...history], ...parameters, stream: true,
      stream_options: { include_usage: true } };
  }

  /** The request that Send would send; without a text, the last one. */
  function request() {
    const message = composer.message();
    if (message) return { path: PATH, body: body([...messages, message]) };
    return sent ?? { path: PATH, body: body([{ role: "user", content: "Hello!" }]) };
  }

  async function submit() {
    if (current) return;
    const message = composer.message();
    if (!message || !model()) return;
    messages.push(message);
    composer.clear();
    hint.remove();
    list.append(bubble("user", "You", [...composer.show(message)]));
    await ask();
  }

  async function ask() {
    sent = { path: PATH, body: body(messages) };
    changed();
    current = new AbortController();
    composer.busy(true);
    const reply = createReply(sent.body.model);
    list.append(reply.root);
    const stay = follow(list);
    progress.start(sent.body.model);
    try {
      await stream(sent.body, reply, progress, stay, current.signal);
    } catch (error) {
      if (error.name === "AbortError") reply.note("Stopped.");
      else reply.fail(error.message, again);
    }
    current = null;
    progress.stop();
    reply.finish();
    if (reply.text()) messages.push({ role: "assistant", content: reply.text() });
    composer.busy(false);
    stay();
    changed();

    function again() {
      if (current) return;
      reply.root.remove();
      // An answer that was cut off is not part of the conversation of the next attempt.
      if (messages.at(-1)?.role === "assistant") messages.pop();
      ask();
    }
  }

  function restart() {
    current?.abort();
    messages.length = 0;
    sent = null;
    list.replaceChildren(hint);
    changed();
  }

  composer.onsubmit = submit;
  composer.onstop = () => current?.abort();
  composer.onrestart = restart;
  const root = h("div", { class: "chat" }, list, progress.root, composer.root);
  return { root, settings: settings.root, request };
}

/** Send the request and show its answer; raises the API's error, also one inside the stream. */
async function stream(body, reply, progress, stay, signal) {
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  const response = await infer(PATH, {
    method: "POST", body: JSON.stringify(body), signal,
    headers: { "Content-Type": "application/json" },
  });
  const figures = { held_s: Number(response.headers.get(HELD)), first_s: null, whole_s: 0,
    usage: null };
  let whole = false;
  for await (const { comment, event, data } of events(response.body)) {
    if (comment !== undefined) {
      const held = HELD_COMMENT.exec(comment);
      if (held) figures.held_s = Number(held[1]);
      const news = held ? "waiting for the answer" : comment;
      if (news && figures.first_s === null) progress.say(news);
      continue;
    }
    if (data === "[DONE]") {
      whole = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (event === "error" || chunk.error) throw new Error(messageOf(data));
    figures.usage = chunk.usage ?? figures.usage;
    const delta = chunk.choices?.[0]?.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    if (!delta.content && !thought) continue;
    if (figures.first_s === null) {
      figures.first_s = passed();
      progress.stop();
    }
    reply.append(delta.content ?? "", thought);
    stay();
  }
  figures.whole_s = passed();
  reply.measure(figures);
  if (!whole) throw new Error("The answer was cut off.");
}

/** One answer: text, reasoning, figures and error. */
function createReply(name) {
  const answer = new Answer();
  const thoughts = new Answer();
  const reasoning = h("details", { class: "reasoning", hidden: true },
    h("summary", {}, "Reasoning"), thoughts.root);
  const foot = h("p", { class: "figures" });
  const root = bubble("assistant", name, [reasoning, answer.root, foot]);
  root.setAttribute("aria-busy", "true");
  return {
    root,
    text: () => answer.text,
    append(text, thought) {
      if (thought) setAttribute(reasoning, "hidden", false);
      if (thought) thoughts.append(thought);
      if (text) answer.append(text);
    },
    note(text) {
      foot.append(h("span", {}, text));
    },
    fail(message, again) {
      root.append(h("div", { class: "error", role: "alert" }, h("span", {}, message),
        h("button", { type: "button", class: "small", onclick: again }, "Try again")));
    },
    measure(figures) {
      setText(foot, describe(figures));
      if (figures.usage) announce(`Answer: ${plural(figures.usage.completion_tokens, "token")}`);
    },
    finish() {
      answer.draw();
      thoughts.draw();
      root.removeAttribute("aria-busy");
    },
  };
}

function describe({ held_s, first_s, whole_s, usage }) {
  const held = held_s ? [`held for ${seconds(held_s)}`] : [];
  const parts = [...held, `first token after ${seconds(first_s)}`, `${seconds(whole_s)} in all`];
  if (usage) {
    const output = usage.completion_tokens;
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const each = first_s === null || output < 2 ? null : (output - 1) / (whole_s - first_s);
    parts.push(plural(output, "output token"));
    if (each && Number.isFinite(each)) parts.push(`${rate(each)} tokens/s`);
    parts.push(plural(usage.prompt_tokens, "prompt token")
      + (cached === undefined || cached === null ? "" : `, ${count(cached)} cached`));
  }
  return parts.join(" · ");
}

function bubble(kind, name, children) {
  return h("article", { class: `bubble ${kind}`, "aria-label": name },
    h("p", { class: "speaker" }, name), children);
}

/** Keep the end of the list in sight, unless the user has scrolled up. */
function follow(list) {
  list.scrollTop = list.scrollHeight;
  return () => {
    if (list.scrollHeight - list.scrollTop - list.clientHeight < 160) {
      list.scrollTop = list.scrollHeight;
    }
  };
}

function createSettings(changed) {
  const system = h("textarea", { id: "system", rows: "4", oninput: changed });
  const temperature = h("input", { id: "temperature", type: "number", min: "0", max: "2",
    step: "0.1", placeholder: "engine's default", oninput: changed });
  const tokens = h("input", { id: "max-tokens", type: "number", min: "1", step: "1",
    placeholder: "engine's default", oninput: changed });
  const root = h("div", { class: "fields" },
    h("label", {}, "System prompt", system),
    h("label", {}, "Temperature", temperature),
    h("label", {}, "Maximum of output tokens", tokens));
  function values() {
    const found = { system: system.value.trim() ? system.value : "" };
    if (Number.isFinite(temperature.valueAsNumber)) {
      found.temperature = temperature.valueAsNumber;
    }
    if (tokens.valueAsNumber >= 1) found.max_tokens = Math.floor(tokens.valueAsNumber);
    return found;
  }
  return { root, values };
}

/** The text and images of the next message. */
function createComposer(changed) {
  const text = h("textarea", { id: "message", rows: "3", "aria-label": "Message",
    placeholder: "Message (Enter sends, Shift+Enter starts a line)" });
  const picker = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true,
    "aria-label": "Images" });
  const thumbnails = h("div", { class: "thumbnails" });
  const problem = h("span", { class: "sub bad", role: "alert" });
  const submit = h("button", { type: "button", class: "primary" }, "Send");
  const stop = h("button", { type: "button", class: "danger", hidden: true }, "Stop");
  const restart = h("button", { type: "button" }, "New chat");
  const attach = iconButton("Attach images", ICONS.image, () => picker.click());
  const root = h("div", { class: "composer" }, thumbnails, text,
    h("div", { class: "tools" }, attach, problem, restart, stop, submit), picker);
  const images = []; // data URLs
  const composer = { root, message, clear, busy, show, onsubmit() {}, onstop() {}, onrestart() {} };

  async function add(files) {
    setText(problem, "");
    for (const file of files) {
      if (!file.type.startsWith("image/")) setText(problem, `${file.name} is not an image.`);
      else if (file.size > IMAGE_MAX_BYTES) setText(problem, `${file.name} is larger than 8 MiB.`);
      else if (images.length >= IMAGES_MAX) setText(problem, `At most ${IMAGES_MAX} images.`);
      else images.push(await dataUrl(file));
    }
    draw();
  }
  function draw() {
    thumbnails.replaceChildren(...images.map((url, index) => h("span", { class: "thumbnail" },
      h("img", { src: url, alt: `Image ${index + 1}` }),
      iconButton(`Remove image ${index + 1}`, ICONS.close, () => {
        images.splice(index, 1);
        draw();
      }))));
    changed();
  }
  function message() {
    const written = text.value.trim() ? text.value : "";
    if (!images.length) return written ? { role: "user", content: written } : null;
    const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role: "user",
      content: written ? [{ type: "text", text: written }, ...parts] : parts };
  }
  function clear() {
    text.value = "";
    images.length = 0;
    draw();
  }
  function busy(on) {
    const focused = document.activeElement === (on ? submit : stop);
    setAttribute(submit, "hidden", on);
    setAttribute(stop, "hidden", !on);
    if (focused) (on ? stop : text).focus();
  }
  /** A message of the conversation as elements. */
  function show({ content }) {
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
    return parts.map((part) => part.type === "text" ? h("p", { class: "said" }, part.text)
      : h("img", { class: "attached", src: part.image_url.url, alt: "Attached image" }));
  }

  text.addEventListener("input", changed);
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    composer.onsubmit();
  });
  text.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) add(event.clipboardData.files);
  });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    add(event.dataTransfer.files);
  });
  picker.addEventListener("change", async () => {
    await add([...picker.files]);
    picker.value = "";
  });
  submit.addEventListener("click", () => composer.onsubmit());
  stop.addEventListener("click", () => composer.onstop());
  restart.addEventListener("click", () => {
    composer.onrestart();
    text.focus();
  });
  return composer;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
