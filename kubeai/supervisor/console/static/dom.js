// Builds and updates elements. Text becomes text nodes only, so text from a server is never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Create an HTML element. `on…` attributes are listeners; null and false leave one out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Create an SVG element, like `h`. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else setAttribute(element, name, value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace the text of an element if it differs, so that an unchanged page causes no work. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show a number as text; zero and unknown ones stand back. */
export function setNumber(element, text) {
  setText(element, text);
  setAttribute(element, "data-quiet", text === "0" || text === "–");
}

/**
 * Set an attribute if it differs; null and false remove it, true sets it without a value. The
 * states of ARIA are words: "true" and "false".
 */
export function setAttribute(element, name, value) {
  if (typeof value === "boolean" && name.startsWith("aria-")) value = String(value);
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

/**
 * Show one child per item: create, update in place, remove. Children whose order is unchanged are
 * not moved, so that they keep the focus.
 *
 * `create(item)` returns `{root, update(item)}`; `rows` is a Map that the caller keeps.
 */
export function showItems(parent, rows, items, key, create) {
  const wanted = new Set(items.map(key));
  for (const [name, row] of rows) {
    if (wanted.has(name)) continue;
    row.root.remove();
    rows.delete(name);
  }
  let next = parent.firstElementChild;
  for (const item of items) {
    let row = rows.get(key(item));
    if (row === undefined) {
      row = create(item);
      rows.set(key(item), row);
    }
    row.update(item);
    if (row.root === next) next = next.nextElementSibling;
    else parent.insertBefore(row.root, next);
  }
}

/** A button with a label for assistive technology, and optionally only an icon for the eye. */
export function iconButton(label, path, onclick, kind = "icon") {
  const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true", class: "glyph" },
    svg("path", { d: path }));
  return h("button", { type: "button", class: kind, "aria-label": label, title: label, onclick },
    icon);
}

export const ICONS = {
  bin: "M3 4.5h10M6.5 4.5v-2h3v2M4.5 4.5l.6 9h5.8l.6-9M6.7 7v4M9.3 7v4",
  chat: "M2.5 3h11v7.5h-6L4.5 13v-2.5h-2z",
  minus: "M3.5 8h9",
  plus: "M3.5 8h9M8 3.5v9",
  close: "M4 4l8 8M12 4l-8 8",
  image: "M2.5 3h11v10h-11zM2.5 11l3.5-3.5 2.5 2.5 2-2 3 3M10.5 6h.01",
};

/** A table in a region that can be scrolled with the keyboard. `columns`: [name, class] pairs. */
export function table(label, columns, body) {
  const heads = columns.map(([name, kind, hint]) =>
    h("th", { scope: "col", class: kind || null, title: hint || null }, name));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
}

/** Copy text; a page that is not served from loopback has no clipboard API. */
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = h("textarea", { class: "offscreen", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A button that copies `text()` and says so for two seconds. */
export function copyButton(label, text) {
  const button = h("button", { type: "button", class: "small", onclick: copy }, label);
  let timer = 0;
  async function copy() {
    await copyText(text());
    setText(button, "Copied");
    clearTimeout(timer);
    timer = setTimeout(() => setText(button, label), 2000);
  }
  return button;
}
