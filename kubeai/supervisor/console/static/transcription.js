// The Playground's transcription of an audio file.

import { infer } from "./api.js";
import { h, setAttribute, setText } from "./dom.js";
import { count, seconds } from "./format.js";
import { createProgress } from "./progress.js";

const PATH = "/audio/transcriptions";
const FILE_MAX_BYTES = 100 << 20;

/** `{root, settings, request()}`; `model()` is the chosen model's ID. */
export function createTranscription({ model, changed }) {
  const picker = h("input", { type: "file", id: "audio", accept: "audio/*,video/*",
    onchange: changed });
  const submit = h("button", { type: "button", class: "primary" }, "Transcribe");
  const stop = h("button", { type: "button", class: "danger", hidden: true }, "Stop");
  const failure = h("div", { class: "error", role: "alert", hidden: true });
  const text = h("p", { class: "said" });
  const facts = h("p", { class: "figures" });
  const result = h("div", { class: "result", role: "status" }, text, facts);
  const progress = createProgress();
  let current = null;

  function request() {
    return { path: PATH, form: { model: model(), file: picker.files[0]?.name ?? "speech.wav" } };
  }

  function fail(message) {
    setText(failure, message);
    setAttribute(failure, "hidden", !message);
  }

  async function transcribe() {
    const file = picker.files[0];
    if (current || !model()) return;
    if (!file) return fail("Choose an audio file first.");
    if (file.size > FILE_MAX_BYTES) return fail(`${file.name} is larger than 100 MiB.`);
    fail("");
    setText(text, "");
    setText(facts, "");
    current = new AbortController();
    setAttribute(submit, "hidden", true);
    setAttribute(stop, "hidden", false);
    const began = performance.now();
    const form = new FormData();
    form.append("model", model());
    form.append("file", file);
    progress.start(model());
    try {
      const response = await infer(PATH, {
        method: "POST", body: form, signal: current.signal,
      });
      setText(text, (await response.json()).text);
      setText(facts, `${seconds((performance.now() - began) / 1000)} · `
        + `${count(Math.ceil(file.size / 1024))} KiB`);
    } catch (error) {
      if (error.name === "AbortError") setText(facts, "Stopped.");
      else fail(error.message);
    }
    progress.stop();
    current = null;
    setAttribute(submit, "hidden", false);
    setAttribute(stop, "hidden", true);
  }

  submit.addEventListener("click", transcribe);
  stop.addEventListener("click", () => current?.abort());
  const root = h("div", { class: "form" },
    h("label", {}, "Audio file (or drop one here)", picker),
    h("div", { class: "tools" }, stop, submit), progress.root, failure, result);
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    picker.files = event.dataTransfer.files;
    changed();
  });
  return { root, settings: null, request };
}
