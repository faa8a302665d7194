// Small inline SVG charts. They repeat numbers that the page shows as text, so they are hidden from
// assistive technology.

import { setAttribute, svg } from "./dom.js";
import { SAMPLES_MAX } from "./store.js";

const WIDTH = 72;
const HEIGHT = 20;

/** A sparkline of the last samples; `update(values)` redraws it. */
export function sparkline(kind = "") {
  const line = svg("polyline", { class: "line" });
  const area = svg("polygon", { class: "area" });
  const root = svg("svg", { class: `spark ${kind}`, viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none", "aria-hidden": "true" }, area, line);
  function update(values) {
    const highest = Math.max(...values, 1e-9);
    const left = WIDTH - (values.length - 1) * (WIDTH / (SAMPLES_MAX - 1));
    const points = values.map((value, index) => {
      const x = left + index * (WIDTH / (SAMPLES_MAX - 1));
      return `${x.toFixed(1)},${(HEIGHT - 1.5 - (value / highest) * (HEIGHT - 3)).toFixed(1)}`;
    });
    setAttribute(line, "points", points.join(" "));
    const closed = points.length ? [`${left.toFixed(1)},${HEIGHT}`, ...points] : [];
    setAttribute(area, "points", [...closed, `${WIDTH},${HEIGHT}`].join(" "));
  }
  return { root, update };
}

/**
 * Where the time of a request went, as a bar: held, then until the first byte, then the answer.
 * `update(request, longest_s)` draws it on a scale on which `longest_s` is the whole width.
 */
export function timeBar() {
  const parts = ["held", "first", "answer"].map((kind) =>
    svg("rect", { class: kind, y: "0", height: "6", rx: "1" }));
  const root = svg("svg", { class: "timebar", viewBox: "0 0 100 6", preserveAspectRatio: "none",
    "aria-hidden": "true" }, parts);
  function update({ waited_s, ttft_s, duration_s }, longest_s) {
    const held = Math.min(waited_s ?? 0, duration_s);
    const first = Math.max(Math.min(ttft_s ?? duration_s, duration_s), held);
    let x = 0;
    [held, first - held, duration_s - first].forEach((length_s, index) => {
      const width = longest_s > 0 ? (100 * length_s) / longest_s : 0;
      setAttribute(parts[index], "x", x.toFixed(2));
      setAttribute(parts[index], "width", width.toFixed(2));
      x += width;
    });
  }
  return { root, update };
}

/**
 * A step chart of a model's replicas over time. `update(steps, now_s)` takes the steps with the
 * newest first; the time axis goes from the oldest of them to now.
 */
export function stepChart() {
  const [width, height] = [600, 72];
  const line = svg("polyline", { class: "line" });
  const area = svg("polygon", { class: "area" });
  const root = svg("svg", { class: "steps", viewBox: `0 0 ${width} ${height}`,
    preserveAspectRatio: "none", "aria-hidden": "true" }, area, line);
  function update(steps, now_s) {
    setAttribute(root, "hidden", steps.length === 0);
    if (steps.length === 0) return;
    const begin = steps.at(-1).time_s;
    const highest = Math.max(1, ...steps.map((step) => Math.max(step.from, step.to)));
    const scale = (width - 16) / Math.max(now_s - begin, 1);
    const x = (time_s) => (8 + scale * (time_s - begin)).toFixed(1);
    const y = (replicas) => (height - 5 - ((height - 12) * replicas) / highest).toFixed(1);
    const points = [`0,${y(steps.at(-1).from)}`];
    for (const step of steps.toReversed()) {
      points.push(`${x(step.time_s)},${y(step.from)}`, `${x(step.time_s)},${y(step.to)}`);
    }
    points.push(`${width},${y(steps[0].to)}`);
    setAttribute(line, "points", points.join(" "));
    setAttribute(area, "points", [`0,${height}`, ...points, `${width},${height}`].join(" "));
  }
  return { root, update };
}
