// What the page knows: the state, the last requests, and the connection that they come from.
//
// Views listen to the events "state", "requests", "connection" and "sample". The stream is opened
// again with back-off when it breaks; until then the data stays, marked as stale.

import { ApiError, consoleUrl, requireKey, send } from "./api.js";
import { events } from "./sse.js";

export const REQUESTS_MAX = 200;
export const SAMPLES_MAX = 60;
const SAMPLE_S = 2;
// The server sends a comment every 15 s; without any byte for longer the stream is dead.
const SILENCE_MAX_S = 40;
// First quickly: when a worker has died, another one accepts the connection.
const BACKOFF_S = [0.25, 1, 2, 4, 8];
// A hidden page gives back its stream, of which the server has a limited number.
const HIDDEN_MAX_S = 60;

class Store extends EventTarget {
  state = null;
  requests = [];
  /** kind: "connecting", "live", "lost" or "paused"; message: why it was lost; outage_s: how long
   * it had been lost before it became live. */
  connection = { kind: "connecting", message: "", since: Date.now(), retryAt: 0, outage_s: 0 };
  #samples = new Map();
  #heard = 0;
  #sequence = 0;
  #wake = () => {};
  #abort = null;
  #suspended = false;

  start() {
    setInterval(() => this.sample(), SAMPLE_S * 1000);
    let timer = 0;
    document.addEventListener("visibilitychange", () => {
      clearTimeout(timer);
      if (document.hidden) timer = setTimeout(() => this.#suspend(), HIDDEN_MAX_S * 1000);
      else this.#resume();
    });
    addEventListener("online", () => this.retry());
    this.#run();
  }

  /** Connect now instead of at the end of the back-off. */
  retry() {
    this.#wake();
  }

  model(name) {
    return this.state?.models.find((model) => model.name === name);
  }

  /** Seconds since the last data, while the connection is lost. */
  staleness() {
    return this.#heard === 0 ? null : (Date.now() - this.#heard) / 1000;
  }

  /** The server's time in Unix seconds: its clock may differ from this machine's. */
  now() {
    return Date.now() / 1000 + (this.skew ?? 0);
  }

  /** The last values of "in_flight" or "tokens" of a model, the oldest first. */
  samples(name, what) {
    return this.#samples.get(name)?.[what] ?? [];
  }

  async #run() {
    for (let attempt = 0; ; attempt += 1) {
      while (this.#suspended) await new Promise((wake) => (this.#wake = wake));
      let message = "The event stream has ended.";
      try {
        await this.#follow(() => (attempt = 0));
      } catch (error) {
        message = error.message;
      }
      if (!this.#suspended) await this.#lost(message, attempt);
    }
  }

  async #follow(connected) {
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => this.#abort.abort(), SILENCE_MAX_S * 1000);
    };
    heard();
    try {
      const response = await send(consoleUrl("events"), { signal });
      let first = true;
      for await (const { event, data } of events(response.body, heard)) {
        this.#heard = Date.now();
        if (event === "state") this.#takeState(JSON.parse(data), connected);
        if (event === "requests") {
          this.#takeRequests(JSON.parse(data), first);
          first = false;
        }
      }
    } catch (error) {
      if (error instanceof ApiError) throw error;
      throw signal.aborted ? new Error("KubeAI is silent.") : error;
    } finally {
      clearTimeout(silence);
      this.#abort.abort();
    }
  }

  async #lost(message, attempt) {
    const wait = BACKOFF_S[Math.min(attempt, BACKOFF_S.length - 1)] * (0.8 + 0.4 * Math.random());
    const since = this.connection.kind === "lost" ? this.connection.since : Date.now();
    this.#connection("lost", message, since, Date.now() + wait * 1000);
    await new Promise((wake) => {
      this.#wake = wake;
      setTimeout(wake, wait * 1000);
    });
  }

  #suspend() {
    this.#suspended = true;
    this.#connection("paused", "", Date.now());
    this.#abort.abort();
  }

  #resume() {
    if (!this.#suspended) return;
    this.#suspended = false;
    this.#wake();
  }

  #takeState(state, connected) {
    this.state = state;
    requireKey(state.keys);
    this.skew = state.time_s - Date.now() / 1000;
    const names = new Set(state.models.map((model) => model.name));
    for (const name of this.#samples.keys()) if (!names.has(name)) this.#samples.delete(name);
    if (this.connection.kind !== "live") {
      connected();
      this.#connection("live", "", Date.now());
    }
    this.#emit("state");
  }

  #takeRequests(list, whole) {
    const added = list.map((request) => ({ ...request, key: 0 }));
    for (const request of added.toReversed()) request.key = this.#sequence += 1;
    this.requests = (whole ? added : [...added, ...this.requests]).slice(0, REQUESTS_MAX);
    this.#emit("requests");
  }

  #connection(kind, message, since, retryAt = 0) {
    const before = this.connection;
    const outage_s = before.kind === "lost" ? (Date.now() - before.since) / 1000 : 0;
    this.connection = { kind, message, since, retryAt, outage_s };
    this.#emit("connection");
  }

  /** Add the current values to the samples; called every two seconds. */
  sample() {
    if (this.connection.kind !== "live") return;
    for (const model of this.state.models) {
      const samples = this.#samples.get(model.name) ?? { in_flight: [], tokens: [] };
      this.#samples.set(model.name, samples);
      samples.in_flight.push(model.in_flight);
      samples.tokens.push(tokenRate(model));
      for (const values of Object.values(samples)) if (values.length > SAMPLES_MAX) values.shift();
    }
    this.#emit("sample");
  }

  #emit(name) {
    this.dispatchEvent(new Event(name));
  }
}

/** Output tokens per second; prompt tokens for a model that only reads, such as for embeddings. */
export function tokenRate({ features, rates }) {
  const writes = features.includes("TextGeneration");
  return writes ? rates.output_tokens_per_s : rates.prompt_tokens_per_s;
}

export const store = new Store();
