// The page: which view is shown, the header, and the banner about the connection.

import { logOut } from "./api.js";
import { setUpDialogs } from "./dialogs.js";
import { setAttribute, setText } from "./dom.js";
import { age, plural, seconds } from "./format.js";
import { showModel } from "./model.js";
import { showModels } from "./models.js";
import { announce } from "./notices.js";
import { showPlayground } from "./playground.js";
import { showRequests } from "./requests.js";
import { store } from "./store.js";
import { showUsage } from "./usage.js";

const RECOVERED_S = 5; // how long the banner says that the connection is back

const main = document.getElementById("main");
const banner = document.getElementById("banner");
const bannerText = document.getElementById("banner-text");
const retry = document.getElementById("retry");
const link = document.getElementById("connection");
const workers = document.getElementById("workers");
const logout = document.getElementById("logout");

// -- views ----------------------------------------------------------------------------------------

let leave = new AbortController();
let shown = false;

/** The view of an address such as #/models/chat/log: [name of the view, arguments]. */
function parse(hash) {
  const parts = hash.replace(/^#\/?/, "").split("/").map(decode);
  if (parts[0] === "models" && parts[1]) return ["model", parts[1], parts[2] ?? ""];
  if (parts[0] === "requests" || parts[0] === "usage") return [parts[0]];
  if (parts[0] === "playground") return ["playground", parts[1] ?? ""];
  return ["models"];
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function route() {
  const [view, ...rest] = parse(location.hash);
  leave.abort();
  leave = new AbortController();
  main.replaceChildren();
  main.dataset.view = view;
  const show = { models: showModels, model: showModel, requests: showRequests,
    playground: showPlayground, usage: showUsage }[view];
  const title = show(main, leave.signal, ...rest);
  document.title = `${title} · KubeAI`;
  for (const each of document.querySelectorAll("#views a")) {
    const current = each.dataset.view === (view === "model" ? "models" : view);
    setAttribute(each, "aria-current", current ? "page" : null);
  }
  // The reader of a new view begins at its heading, but a new page at its top.
  if (shown) main.querySelector("h1").focus({ preventScroll: true });
  shown = true;
  scrollTo(0, 0);
}

// -- header and banner ----------------------------------------------------------------------------

const LINKS = { connecting: "Connecting", live: "Live", lost: "Reconnecting", paused: "Paused" };
let recovered = 0;
let lost = false;

function showConnection() {
  const { kind, message, outage_s: outage } = store.connection;
  setText(link, LINKS[kind]);
  setAttribute(link, "data-kind", kind);
  if (kind === "lost" && !lost) {
    recovered = 0;
    announce(`The connection to KubeAI is lost: ${message}`);
  }
  lost = kind === "lost";
  if (kind === "live" && outage > 0) {
    recovered = Date.now() + RECOVERED_S * 1000;
    announce("The connection to KubeAI is back.");
    setTimeout(showBanner, RECOVERED_S * 1000 + 50);
  }
  setAttribute(document.body, "class", lost ? "stale" : null);
  showBanner();
}

function showBanner() {
  const { kind, message, retryAt, outage_s: outage } = store.connection;
  const problems = kind === "live" ? `${workerProblems()} ${streamProblems()}`.trim() : "";
  const back = kind === "live" && Date.now() < recovered;
  setAttribute(banner, "hidden", !(kind === "lost" || back || problems));
  setAttribute(banner, "data-kind", kind === "lost" ? "lost" : back ? "back" : "warning");
  setAttribute(retry, "hidden", kind !== "lost");
  if (kind === "lost") setText(bannerText, lostText(message, retryAt));
  else if (back) setText(bannerText, `Connected again after ${seconds(outage)}.`);
  else setText(bannerText, problems);
}

function lostText(message, retryAt) {
  const wait = Math.max(0, Math.ceil((retryAt - Date.now()) / 1000));
  const stale = store.staleness();
  const data = stale === null ? "" : ` The data is ${age(stale)} old.`;
  return `The connection to KubeAI is lost: ${message}${data} `
    + (wait > 0 ? `Next attempt in ${wait} s.` : "Connecting…");
}

function workerProblems() {
  const down = store.state.workers.filter((worker) => !worker.ready);
  if (down.length === 0) return "";
  const names = down.map((worker) => worker.worker).join(", ");
  return `${down.length === 1 ? "Worker" : "Workers"} ${names} of ${store.state.workers.length} `
    + `${down.length === 1 ? "is" : "are"} not ready.`;
}

function streamProblems() {
  const problems = store.state.stream_problems ?? [];
  if (problems.length === 0) return "";
  const more = problems.length > 3 ? ` and ${problems.length - 3} more` : "";
  return `Message streams not connected: ${problems.slice(0, 3).join("; ")}${more}.`;
}

function showState() {
  const { workers: all, version, namespace, local } = store.state;
  const ready = all.filter((worker) => worker.ready).length;
  setText(workers, ready === all.length ? plural(ready, "worker")
    : `${ready} of ${plural(all.length, "worker")} ready`);
  setAttribute(workers, "data-kind", ready === all.length ? "ok" : "warn");
  setAttribute(workers, "title", all.map(({ worker, ready: up, restarts }) =>
    `Worker ${worker}: ${up ? "ready" : "not ready"}, ${plural(restarts, "restart")}`).join("\n"));
  setAttribute(logout, "hidden", !store.state.keys);
  setAttribute(document.getElementById("usage-link"), "hidden", !store.state.keys);
  setText(document.getElementById("version"), `KubeAI ${version}`);
  setText(document.getElementById("namespace"), local ? "on this machine"
    : `namespace ${namespace}`);
  showBanner();
}

store.addEventListener("connection", showConnection);
store.addEventListener("state", showState);
setInterval(() => store.connection.kind === "lost" && showBanner(), 1000);
retry.addEventListener("click", () => store.retry());
logout.addEventListener("click", () => logOut());
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.querySelector("h1").focus();
});
setUpDialogs(() => store.state?.can.apply ?? false);
addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, textarea, select, dialog")) return;
  const filter = document.getElementById("filter");
  if (!filter) return;
  event.preventDefault();
  filter.focus();
});
route();
store.start();
