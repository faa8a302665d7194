// Interactive plots: <div class="kubeai-plot" data-src="routing/plot.json"> is filled from its data, which
// bench/plot_data.py writes. What the element contains before is shown without JavaScript.
"use strict";
(() => {
  const METRICS = {
    mean: { name: "mean TTFT", unit: "ms", log: true },
    p50: { name: "median TTFT", unit: "ms", log: true },
    p99: { name: "p99 TTFT", unit: "ms", log: true },
    hit_rate: { name: "prompt tokens found in a cache", unit: "%", factor: 100 },
    tokens_per_s: { name: "generated tokens per second", unit: "/s" },
  };
  const WIDTH = 720, HEIGHT = 340, LEFT = 74, RIGHT = 14, TOP = 14, BOTTOM = 46;
  const SVG = "http://www.w3.org/2000/svg";

  function make(name, attributes = {}, parent, text) {
    const svg = ["svg", "g", "path", "circle", "line", "text", "title"].includes(name);
    const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function select(parent, label, options) {
    const field = make("label", {}, parent, `${label} `);
    const node = make("select", {}, field);
    for (const [value, text] of options) make("option", { value }, node, text);
    return node;
  }

  const digits = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

  // Round positions between low and high: 1, 2, 5, 10, … if logarithmic.
  function ticks(low, high, log) {
    const found = [];
    if (log) {
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
        for (const step of [1, 2, 5]) found.push(step * 10 ** power);
      }
      const inside = found.filter((tick) => tick >= low && tick <= high);
      return inside.length > 8 ? inside.filter((tick) => Number.isInteger(Math.log10(tick))) : inside;
    }
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
    for (let tick = Math.ceil(low / step) * step; tick <= high * 1.0001; tick += step) found.push(tick);
    return found;
  }

  function scale(values, from, to, log) {
    let low = Math.min(...values), high = Math.max(...values);
    if (log) [low, high] = [low / 1.15, high * 1.15];
    else [low, high] = [0, high * 1.05 || 1];
    const of = log ? Math.log : (value) => value;
    const at = (value) => from + ((of(value) - of(low)) / (of(high) - of(low))) * (to - from);
    return { at, ticks: ticks(low, high, log) };
  }

  function draw(figure, table, series, metric, unit) {
    const { name, log = false, factor = 1 } = METRICS[metric];
    const value = (point) => point[metric] * factor;
    const points = Object.values(series).flat();
    const x = scale(points.map((point) => point.x), LEFT, WIDTH - RIGHT, false);
    const y = scale(points.map(value), HEIGHT - BOTTOM, TOP, log);
    figure.replaceChildren();
    for (const tick of x.ticks) {
      make("line", { x1: x.at(tick), x2: x.at(tick), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid" }, figure);
      make("text", { x: x.at(tick), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, figure, digits(tick));
    }
    for (const tick of y.ticks) {
      make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(tick), y2: y.at(tick), class: "grid" }, figure);
      make("text", { x: LEFT - 8, y: y.at(tick) + 4, "text-anchor": "end" }, figure, digits(tick));
    }
    make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, figure, unit);
    const middle = (TOP + HEIGHT - BOTTOM) / 2;
    const turned = { transform: `rotate(-90 14 ${middle})`, x: 14, y: middle, "text-anchor": "middle" };
    make("text", turned, figure, `${name}, ${METRICS[metric].unit}`);
    Object.entries(series).forEach(([strategy, line], index) => {
      const group = make("g", { class: `series series-${index}` }, figure);
      const path = line.map((point, at) => `${at ? "L" : "M"}${x.at(point.x)} ${y.at(value(point))}`);
      make("path", { d: path.join("") }, group);
      for (const point of line) {
        const dot = make("circle", { cx: x.at(point.x), cy: y.at(value(point)), r: 4 }, group);
        const text = `${digits(point.x)} ${unit}: ${digits(value(point))} ${METRICS[metric].unit}`;
        make("title", {}, dot, `${strategy}, ${text}`);
      }
    });
    fill(table, series, metric, unit);
  }

  function fill(table, series, metric, unit) {
    const { name, factor = 1 } = METRICS[metric];
    table.replaceChildren();
    make("caption", {}, table, `${name}, ${METRICS[metric].unit}`);
    const head = make("tr", {}, make("thead", {}, table));
    make("th", { scope: "col" }, head, unit);
    Object.keys(series).forEach((strategy, index) => {
      make("th", { scope: "col", class: `series-${index}` }, head, strategy);
    });
    const body = make("tbody", {}, table);
    const [first] = Object.values(series);
    first.forEach((point, at) => {
      const row = make("tr", {}, body);
      make("th", { scope: "row" }, row, digits(point.x));
      const values = Object.values(series).map((line) => line[at][metric] * factor);
      const best = metric === "hit_rate" || metric === "tokens_per_s" ? Math.max(...values) : Math.min(...values);
      for (const value of values) make("td", value === best ? { class: "best" } : {}, row, digits(value));
    });
  }

  function start(root, data) {
    root.replaceChildren();
    const form = make("div", { class: "kubeai-plot-controls" }, root);
    const traffic = select(form, "Traffic", data.traffics.map((each, at) => [at, each.name]));
    const share = select(form, "Sent before, share of a prompt", []);
    const metric = select(form, "Show", Object.entries(METRICS).map(([key, each]) => [key, each.name]));
    const figure = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" }, root);
    const table = make("table", { "aria-live": "polite" }, root);
    const show = () => {
      const chosen = data.traffics[traffic.value];
      draw(figure, table, chosen.shares[share.value], metric.value, chosen.unit);
    };
    const choose = () => {
      const shares = Object.keys(data.traffics[traffic.value].shares);
      share.replaceChildren();
      for (const each of shares) make("option", { value: each }, share, each);
      share.value = shares.includes("75%") ? "75%" : shares[0];
      share.parentElement.hidden = shares.length < 2;
      show();
    };
    traffic.addEventListener("change", choose);
    for (const each of [share, metric]) each.addEventListener("change", show);
    choose();
  }

  for (const root of document.querySelectorAll(".kubeai-plot")) {
    fetch(new URL(root.dataset.src, document.baseURI))
      .then((answer) => (answer.ok ? answer.json() : Promise.reject(new Error(answer.statusText))))
      .then((data) => start(root, data))
      .catch((error) => console.error(`${root.dataset.src}: ${error.message}`));
  }
})();
