// Parses server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
// Unlike EventSource it shows comments, works with POST, and leaves reconnecting to its caller.

const BUFFER_MAX_CHARS = 16 << 20;

/**
 * Yield `{comment}` for each comment line and `{event, data}` for each event of a body stream.
 * `onbytes` is called for each piece that arrives.
 */
export async function* events(body, onbytes = () => {}) {
  const parser = new Parser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(cutOff);
      if (done) return;
      onbytes();
      yield* parser.feed(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function cutOff(error) {
  throw error.name === "AbortError" ? error : new Error("The connection was cut off.");
}

export class Parser {
  #rest = "";
  #event = "";
  #data = [];

  /** Yield what is complete with this piece of text. */
  *feed(text) {
    this.#rest += text;
    if (this.#rest.length > BUFFER_MAX_CHARS) throw new Error("An event is too long.");
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      if (end < 0) return;
      const carriage = this.#rest[end] === "\r";
      if (carriage && end + 1 === this.#rest.length) return; // a line feed may follow
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (carriage && this.#rest[end + 1] === "\n" ? 2 : 1));
      yield* this.#line(line);
    }
  }

  *#line(line) {
    if (line.startsWith(":")) {
      yield { comment: line.slice(1).trim() };
    } else if (line === "") {
      if (this.#data.length) yield { event: this.#event || "message", data: this.#data.join("\n") };
      this.#event = "";
      this.#data = [];
    } else {
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") this.#event = value;
      if (field === "data") this.#data.push(value);
    }
  }
}
