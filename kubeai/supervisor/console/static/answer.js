// A model's answer: plain text with code blocks, shown while it arrives. Nothing in it is markup.

import { copyButton, h, setText } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^\n`]*)$/;

/** Shows a text that grows. Only the block at its end changes. */
export class Answer {
  root = h("div", { class: "answer" });
  text = "";
  #line = ""; // the last line, which may be incomplete
  #block = ""; // the complete lines of the current block
  #fence = ""; // what ends the current code block, or ""
  #target = null;
  #frame = 0;

  append(piece) {
    this.text += piece;
    const lines = (this.#line + piece).split("\n");
    this.#line = lines.pop();
    for (const line of lines) this.#take(line);
    this.#frame ||= requestAnimationFrame(() => this.draw());
  }

  /** Show what has arrived, now instead of in the next frame. */
  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const text = this.#block + this.#line;
    if (!this.#target && !text.trim()) return;
    this.#target ??= this.#paragraph();
    setText(this.#target, this.#fence ? text : text.replace(/^\n+/, ""));
  }

  #take(line) {
    const match = FENCE.exec(line);
    if (match && !this.#fence) {
      this.#finish();
      this.#fence = match[1];
      this.#target = this.#code(match[2].trim());
    } else if (match && !match[2].trim() && match[1].startsWith(this.#fence)) {
      this.#finish();
      this.#fence = "";
    } else {
      this.#block += `${line}\n`;
    }
  }

  #finish() {
    const text = this.#block.replace(this.#fence ? /\n$/ : /^\n+|\n+$/g, "");
    if (this.#fence || text.trim()) {
      this.#target ??= this.#paragraph();
      setText(this.#target, text);
    } else {
      this.#target?.remove(); // it had the beginning of a fence
    }
    this.#target = null;
    this.#block = "";
  }

  #paragraph() {
    const block = h("p");
    this.root.append(block);
    return block;
  }

  #code(language) {
    const code = h("code");
    this.root.append(h("div", { class: "fence" },
      h("div", { class: "fence-head" }, h("span", {}, language || "code"),
        copyButton("Copy", () => code.textContent)),
      h("pre", { tabindex: "0", role: "region", "aria-label": `Code: ${language || "text"}` },
        code)));
    return code;
  }
}
