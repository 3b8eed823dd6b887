// A table of things that come and go: sorted by any column, filtered when long, and a list of cards where it is narrow.

import { attribute, keyed, make, say } from "./dom.js";

// Rows that are shown before "show all".
const FEW = 12;
// Rows from which on a filter helps.
const MANY = 8;

const order = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

function compare(a, b) {
  const none = (v) => v === null || v === undefined || v === "";
  if (none(a) || none(b)) return none(a) - none(b);
  return typeof a === "number" && typeof b === "number" ? a - b : order.compare(String(a), String(b));
}

export class DataTable {
  // columns: {label, sort: row => value, build: () => element, update: (element, row), numeric, broad, down}. The first names
  // the row. `broad`: wants a line of its own on a card. `down`: the first click sorts from the largest. `words`: row => text that the filter looks at.
  constructor(root, { name, columns, key, words }) {
    Object.assign(this, { root, name, columns, key, words });
    this.rows = [];
    this.by = 0;
    this.descending = false;
    this.showAll = false;
    this.build();
  }

  build() {
    this.filter = make("input", {
      type: "search", placeholder: "Filter", "aria-label": `Filter ${this.name}`, autocomplete: "off", spellcheck: "false",
    });
    this.filter.addEventListener("input", () => this.draw());
    this.sorter = make("select", { "aria-label": `Sort ${this.name} by` });
    this.columns.forEach((column, n) => {
      if (!column.sort) return;
      this.sorter.append(make("option", { value: n, text: column.label }));
    });
    this.sorter.addEventListener("change", () => this.sort(Number(this.sorter.value), true));
    this.tools = make("div", { class: "tools" }, this.filter, make("label", { class: "sorter" }, "Sort by ", this.sorter));
    const heads = this.columns.map((column, n) => {
      const head = make("th", { scope: "col", role: "columnheader", class: column.numeric ? "numeric" : null });
      if (!column.sort) {
        head.append(make("span", { text: column.label }));
        return head;
      }
      const button = make("button", { type: "button" }, make("span", { text: column.label }), make("i", { "aria-hidden": "true" }));
      button.addEventListener("click", () => this.sort(n, false));
      head.append(button);
      return head;
    });
    this.heads = heads;
    this.body = make("tbody", { role: "rowgroup" });
    const head = make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads));
    const caption = make("caption", { class: "hidden", text: this.name });
    this.more = make("button", { type: "button", class: "more" });
    this.more.addEventListener("click", () => {
      this.showAll = !this.showAll;
      this.draw();
    });
    this.found = make("p", { class: "found", role: "status" });
    // Roles, because tables that are laid out otherwise (cards) lose theirs.
    this.table = make("table", { role: "table" }, caption, head, this.body);
    this.root.append(this.tools, this.table, this.found, this.more);
    this.mark();
  }

  sort(column, chosen) {
    if (!chosen && column === this.by) this.descending = !this.descending;
    else this.descending = Boolean(this.columns[column].down);
    this.by = column;
    this.mark();
    this.draw();
  }

  mark() {
    this.heads.forEach((head, n) => {
      const direction = this.descending ? "descending" : "ascending";
      if (this.columns[n].sort) attribute(head, "aria-sort", n === this.by ? direction : "none");
    });
    this.sorter.value = String(this.by);
  }

  show(rows) {
    this.rows = rows;
    // Nothing jumps away from below the pointer.
    if (!this.body.matches(":hover")) this.draw();
    else this.drawRows(this.held(rows));
  }

  // In the order that is on the screen; what is gone is gone, what is new waits.
  held(rows) {
    const now = new Map(rows.map((row) => [String(this.key(row)), row]));
    return [...this.body.children].map((child) => now.get(child.dataset.key)).filter(Boolean);
  }

  draw() {
    const wanted = this.filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (row) => {
      const text = this.words(row).toLowerCase();
      return wanted.every((word) => text.includes(word));
    };
    const found = wanted.length > 0 ? this.rows.filter(matches) : [...this.rows];
    const { sort } = this.columns[this.by];
    const first = this.columns[0].sort;
    const sign = this.descending ? -1 : 1;
    found.sort((a, b) => sign * compare(sort(a), sort(b)) || compare(first(a), first(b)));
    const long = this.rows.length > MANY;
    this.filter.hidden = !long;
    this.tools.hidden = this.rows.length < 2;
    this.table.hidden = this.rows.length === 0;
    say(this.found, wanted.length > 0 ? `${found.length} of ${this.rows.length} match` : "");
    this.more.hidden = found.length <= FEW;
    say(this.more, this.showAll ? "Show fewer" : `Show all ${found.length}`);
    attribute(this.more, "aria-expanded", String(this.showAll));
    this.drawRows(this.showAll ? found : found.slice(0, FEW));
  }

  drawRows(rows) {
    keyed(this.body, rows, this.key, () => this.buildRow(), (line, row) => {
      this.columns.forEach((column, n) => column.update(line.cells[n].firstElementChild, row));
    });
  }

  buildRow() {
    const cells = this.columns.map((column, n) => {
      const attributes = { role: n === 0 ? "rowheader" : "cell", class: column.numeric ? "numeric" : column.broad ? "broad" : null };
      if (n === 0) attributes.scope = "row";
      else attributes["data-label"] = column.label;
      return make(n === 0 ? "th" : "td", attributes, column.build ? column.build() : make("span"));
    });
    return make("tr", { role: "row" }, ...cells);
  }
}
