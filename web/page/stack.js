// A whole and its parts, as a bar and as a list with figures.

import { attribute, figure, keyed, make, say } from "./dom.js";
import { bytes, share } from "./units.js";

const sum = (parts) => parts.reduce((all, part) => all + part.value, 0);

// parts: {class, label, value in bytes}; the list may be missing.
export function stack(bar, list, name, parts) {
  const total = sum(parts);
  const seen = parts.filter((part) => part.value > 0);
  keyed(bar, seen, (part) => part.class, (part) => make("i", { class: part.class }), (cell, part) => {
    cell.style.width = `${(part.value / total) * 100}%`;
    attribute(cell, "title", `${part.label}: ${bytes(part.value)}`);
  });
  const text = parts.map((part) => `${part.label} ${bytes(part.value)}`).join(", ");
  attribute(bar, "aria-label", `${name} ${bytes(total)}: ${text}`);
  if (!list) return;
  const build = (part) => make("li", {}, make("i", { class: part.class }), make("span", { text: part.label }), make("data"), make("small"));
  keyed(list, parts, (part) => part.class, build, (item, part) => {
    figure(item.children[2], part.value, bytes, "bytes");
    say(item.children[3], total > 0 ? share(part.value / total) : "");
  });
}

// What lies in a pool (or in all of them): null without figures.
export function sizeParts(space) {
  if (typeof space?.size_bytes !== "number") return null;
  const n = (name) => space[name] ?? 0;
  const other = n("size_bytes") - n("free_bytes") - n("stored_bytes") - n("metadata_bytes") - n("reclaimable_bytes");
  return [
    { class: "stored", label: "Data", value: n("stored_bytes") },
    { class: "metadata", label: "Metadata", value: n("metadata_bytes") },
    { class: "reclaim", label: "Reclaimable", value: n("reclaimable_bytes") },
    { class: "other", label: "Set aside", value: Math.max(0, other) },
    { class: "free", label: "Free", value: n("free_bytes") },
  ];
}
