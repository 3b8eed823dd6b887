// Elements without markup: whatever the target says ends up as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

// Attributes by name; `class` and `text` as expected; children are nodes or nothing.
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const by = (id) => document.getElementById(id);

// Only what changes is touched: selections and screen readers stay where they are.
export function say(element, text) {
  text = String(text);
  if (element.textContent !== text) element.textContent = text;
}

export function attribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// A figure: what people read, the raw value for machines, and all its digits on hover.
export function figure(element, value, format, unit) {
  say(element, format(value));
  attribute(element, "value", value);
  if (unit) attribute(element, "title", typeof value === "number" ? `${value.toLocaleString("en")} ${unit}` : null);
}

// Children by key, in this order; `build` for new ones, `update` for all.
export function keyed(parent, items, keyOf, build, update) {
  const wanted = new Map();
  for (const item of items) {
    let key = String(keyOf(item));
    while (wanted.has(key)) key += "'";
    wanted.set(key, item);
  }
  const old = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) old.set(child.dataset.key, child);
    else child.remove();
  }
  let at = parent.firstElementChild;
  for (const [key, item] of wanted) {
    let child = old.get(key);
    if (!child) {
      child = build(item);
      child.dataset.key = key;
    }
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
    update(child, item);
  }
}
