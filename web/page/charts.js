// Charts over time, drawn by hand: lines (SVG) and a heat map (canvas). All of them share one cursor: what the pointer or the
// arrow keys point at in one is read out in all. A chart's plot is a slider for assistive technology: its value is a moment,
// its text the figures of that moment.

import { attribute, make, say, svg } from "./dom.js";
import { clock, exact, seconds, share, short, ticks } from "./units.js";

const MONTH_DAY = { month: "short", day: "numeric" };
const STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200];
const all = new Set();
let cursor = null;

function pointAt(time) {
  if (cursor === time) return;
  cursor = time;
  for (const chart of all) chart.showCursor();
}

function nearest(points, time) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle].time < time) low = middle + 1;
    else high = middle;
  }
  if (low > 0 && time - points[low - 1].time < points[low].time - time) low -= 1;
  return low;
}

class Chart {
  // `name`: what it shows, for assistive technology; `nothing`: what is said instead of an empty plot.
  constructor(plot, name, nothing) {
    this.plot = plot;
    this.name = name;
    this.points = [];
    this.view = { from: 0, to: 1, label: "" };
    this.width = 0;
    this.height = 0;
    this.when = make("span", { class: "when", hidden: true });
    this.nothing = make("span", { class: "nothing", text: nothing, hidden: true });
    plot.append(this.when, this.nothing);
    attribute(plot, "tabindex", 0);
    attribute(plot, "role", "slider");
    attribute(plot, "aria-readonly", "true");
    attribute(plot, "aria-orientation", "horizontal");
    plot.addEventListener("pointermove", (event) => this.hover(event));
    plot.addEventListener("pointerdown", (event) => this.hover(event));
    plot.addEventListener("pointerleave", () => pointAt(null));
    plot.addEventListener("keydown", (event) => this.key(event));
    plot.addEventListener("focus", () => {
      if (cursor === null && this.points.length > 0 && plot.matches(":focus-visible")) {
        pointAt(this.points[this.points.length - 1].time);
      }
    });
    plot.addEventListener("blur", () => pointAt(null));
    new ResizeObserver((entries) => {
      const { width, height } = entries[0].contentRect;
      if (Math.floor(width) !== this.width || height !== this.height) {
        this.width = Math.floor(width);
        this.height = height;
        this.draw();
      }
    }).observe(plot);
    all.add(this);
  }

  // Room for the axis.
  left() {
    return 62;
  }

  x(time) {
    const { from, to } = this.view;
    return this.left() + ((time - from) / (to - from)) * (this.width - this.left());
  }

  // Points (time: their end, seconds: how long, figures by name), oldest first; `view` says which of them are shown.
  show(points, view) {
    const first = points.findIndex((p) => p.time >= view.from);
    this.points = first < 0 ? [] : points.slice(first);
    this.view = view;
    this.draw();
    this.showCursor();
  }

  hover(event) {
    if (this.points.length === 0) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left - this.left();
    const { from, to } = this.view;
    const time = from + (at / (this.width - this.left())) * (to - from);
    pointAt(this.points[nearest(this.points, time)].time);
  }

  key(event) {
    if (this.points.length === 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.points.length - 1;
    const now = cursor === null ? last : nearest(this.points, cursor);
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10, Home: 0, End: last };
    if (event.key === "Escape") pointAt(null);
    else if (event.key in moves) pointAt(this.points[Math.min(last, Math.max(0, moves[event.key]))].time);
    else return;
    event.preventDefault();
  }

  // The point that is read out: at the cursor, else the last.
  current() {
    if (this.points.length === 0) return null;
    if (cursor === null) return this.points[this.points.length - 1];
    const point = this.points[nearest(this.points, cursor)];
    return Math.abs(point.time - cursor) <= 2.5 * point.seconds ? point : null;
  }

  showCursor() {
    const point = this.current();
    const pointed = cursor !== null && point !== null;
    this.when.hidden = !pointed;
    if (pointed) {
      say(this.when, clock(point.time));
      const half = this.when.offsetWidth / 2;
      const x = Math.min(this.width - half, Math.max(half, this.x(point.time)));
      this.when.style.transform = `translateX(${x - half}px)`;
    }
    this.mark(pointed ? this.x(point.time) : null, point);
    const text = point ? `${clock(point.time)}: ${this.read(point)}` : "no figures yet";
    attribute(this.plot, "aria-label", `${this.name}, ${this.view.label}`);
    attribute(this.plot, "aria-valuemin", 0);
    attribute(this.plot, "aria-valuemax", Math.max(0, this.points.length - 1));
    attribute(this.plot, "aria-valuenow", point ? this.points.indexOf(point) : 0);
    attribute(this.plot, "aria-valuetext", text);
  }

  // Moments for the axis, at round times of the clock here.
  moments() {
    const { from, to } = this.view;
    const wanted = Math.min(6, Math.max(2, Math.floor((this.width - this.left()) / 66)));
    const step = STEPS.find((s) => (to - from) / s <= wanted) ?? 86400;
    const shift = new Date(to * 1000).getTimezoneOffset() * 60;
    const out = [];
    for (let t = Math.ceil((from - shift) / step) * step + shift; t <= to; t += step) {
      const midnight = step >= 3600 && clock(t) === "00:00:00";
      const text = midnight ? new Date(t * 1000).toLocaleDateString("en", MONTH_DAY) : clock(t, step < 60);
      out.push({ t, text });
    }
    return out;
  }
}

const HEIGHT = 168, FOOT = 20, HEAD = 16;

// Null: not seen.
function place(element, at) {
  attribute(element, "visibility", at ? null : "hidden");
  for (const [name, value] of Object.entries(at ?? {})) attribute(element, name, value);
}

export class LineChart extends Chart {
  // series: [{key, label, class, fill}], in the legend's order; `key` of a point's figures. `base`: 1024 for bytes. `log`: decades.
  constructor(root, name, { series, format, base = 1000, log = false, nothing }) {
    super(root.querySelector(".plot"), name, nothing);
    Object.assign(this, { format, base, log });
    this.svg = svg("svg", { "aria-hidden": "true", focusable: "false", height: HEIGHT });
    this.grid = svg("g", { class: "grid" });
    this.labels = svg("g");
    this.lines = svg("g");
    this.line = svg("line", { class: "cursor", y1: HEAD, y2: HEIGHT - FOOT });
    this.dots = svg("g");
    this.svg.append(this.grid, this.lines, this.labels, this.line, this.dots);
    this.plot.prepend(this.svg);
    this.legend = root.querySelector(".legend");
    this.setSeries(series);
  }

  setSeries(series) {
    this.series = series;
    this.lines.replaceChildren();
    this.dots.replaceChildren();
    this.legend.replaceChildren();
    for (const s of series) {
      s.area = s.fill ? svg("path", { class: `area ${s.class}` }) : null;
      s.path = svg("path", { class: `line ${s.class}` });
      s.dot = svg("circle", { class: `dot ${s.class}`, r: 3.5 });
      if (s.area) this.lines.prepend(s.area);
      this.lines.append(s.path);
      this.dots.append(s.dot);
      s.value = make("data", { class: "figure" });
      const swatch = svg("svg", { class: "swatch", width: 14, height: 10, "aria-hidden": "true" });
      swatch.append(svg("path", { class: `line ${s.class}`, d: "M0 5H14" }));
      this.legend.append(make("li", {}, make("span", { class: "label" }, swatch, s.label), s.value));
    }
  }

  read(point) {
    return this.series.map((s) => `${s.label} ${this.format(point[s.key])}`).join(", ");
  }

  // More points than fit side by side become means; of percentiles, which have none, the highest.
  thin() {
    const most = (this.width - this.left()) / 1.5;
    if (this.points.length <= most) return this.points;
    const { from, to } = this.view;
    const cells = new Map();
    for (const point of this.points) {
      const cell = Math.floor(((point.time - from) / (to - from)) * most);
      if (!cells.has(cell)) cells.set(cell, []);
      cells.get(cell).push(point);
    }
    return [...cells.values()].map((cell) => {
      const out = { time: cell[cell.length - 1].time, seconds: cell.reduce((sum, p) => sum + p.seconds, 0) };
      for (const { key } of this.series) {
        const values = cell.map((p) => p[key]).filter((v) => typeof v === "number");
        if (values.length === 0) out[key] = null;
        else out[key] = this.log ? Math.max(...values) : values.reduce((a, b) => a + b, 0) / values.length;
      }
      return out;
    });
  }

  // [ticks, value to height]
  scale() {
    const room = HEIGHT - FOOT - HEAD;
    let low = Infinity, high = 0;
    for (const point of this.drawn) {
      for (const s of this.series) {
        const v = point[s.key];
        if (typeof v !== "number" || (this.log && v <= 0)) continue;
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
    }
    if (!this.log) {
      const marks = ticks(high, this.base);
      const top = marks[marks.length - 1];
      return [high > 0 ? marks : [0], (v) => HEIGHT - FOOT - (v / top) * room];
    }
    if (high === 0) return [[], () => HEIGHT - FOOT];
    const from = Math.floor(Math.log10(low) + 1e-9);
    const to = Math.max(from + 1, Math.ceil(Math.log10(high) - 1e-9));
    const marks = [];
    for (let n = from; n <= to; n += 1) marks.push(10 ** n);
    return [marks, (v) => HEIGHT - FOOT - ((Math.log10(v) - from) / (to - from)) * room];
  }

  draw() {
    if (this.width <= 0) return;
    attribute(this.svg, "width", this.width);
    this.drawn = this.thin();
    const [marks, y] = this.scale();
    this.y = y;
    this.nothing.hidden = marks.length > 1 || this.points.length === 0;
    this.grid.replaceChildren();
    this.labels.replaceChildren();
    for (const mark of marks) {
      const at = Math.round(y(mark)) + 0.5;
      this.grid.append(svg("line", { x1: this.left(), x2: this.width, y1: at, y2: at, class: mark === 0 ? "zero" : null }));
      if (mark !== 0 || marks.length > 1) this.labels.append(svg("text", { x: this.left() - 8, y: at + 3.5, "text-anchor": "end", text: short(this.format(mark)) }));
    }
    for (const { t, text } of this.moments()) {
      const x = this.x(t);
      if (x < this.left() + 18 || x > this.width - 18) continue;
      this.labels.append(svg("text", { x, y: HEIGHT - 4, "text-anchor": "middle", text }));
    }
    for (const s of this.series) this.drawLine(s, y);
  }

  drawLine(s, y) {
    let path = "", area = "", begun = null, last = null;
    const end = () => {
      if (begun !== null) area += `L${last.x} ${HEIGHT - FOOT}L${begun} ${HEIGHT - FOOT}Z`;
      begun = null;
    };
    for (const point of this.drawn) {
      const v = point[s.key];
      const here = typeof v === "number" && !(this.log && v <= 0);
      if (!here || (last && point.time - last.time > 2.5 * Math.max(point.seconds, last.seconds))) end();
      if (!here) continue;
      const x = this.x(point.time).toFixed(1);
      const piece = `${begun === null ? "M" : "L"}${x} ${y(v).toFixed(1)}`;
      path += piece;
      area += piece;
      if (begun === null) {
        begun = x;
        path += "h.1"; // one point alone is seen, too
      }
      last = { x, time: point.time, seconds: point.seconds };
    }
    end();
    attribute(s.path, "d", path || null);
    if (s.area) attribute(s.area, "d", area || null);
  }

  mark(x, point) {
    place(this.line, x === null ? null : { x1: x, x2: x });
    for (const s of this.series) {
      const v = point?.[s.key];
      const seen = x !== null && typeof v === "number" && !(this.log && v <= 0) && this.y;
      place(s.dot, seen ? { cx: x, cy: this.y(v) } : null);
      say(s.value, this.format(v));
      attribute(s.value, "value", v);
    }
  }
}

const RAMPS = {
  light: [[226, 237, 250], [132, 184, 237], [38, 120, 200], [11, 70, 138], [4, 30, 66]],
  dark: [[27, 45, 70], [31, 84, 143], [64, 148, 222], [150, 209, 250], [240, 249, 255]],
};

function colour(ramp, level) {
  const at = Math.min(0.9999, Math.max(0, level)) * (ramp.length - 1);
  const low = ramp[Math.floor(at)], high = ramp[Math.floor(at) + 1];
  return `rgb(${low.map((c, n) => Math.round(c + (high[n] - c) * (at % 1))).join(" ")})`;
}

export class HeatMap extends Chart {
  // Rows are buckets of latency (`edges`: upper ends in seconds), columns moments; `pick` makes a row of counts of a point.
  constructor(root, name, { pick, isDark, nothing }) {
    super(root.querySelector(".plot"), name, nothing);
    Object.assign(this, { pick, isDark, edges: [], row: null });
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.line = make("span", { class: "column", hidden: true });
    this.plot.prepend(this.canvas, this.line);
    this.readout = root.querySelector(".readout");
    this.ramp = root.querySelector(".ramp");
    this.rampline = root.querySelector(".rampline");
    this.plot.addEventListener("pointerleave", () => this.pickRow(null));
  }

  setEdges(edges) {
    this.edges = edges;
  }

  pickRow(row) {
    if (this.row === row) return;
    this.row = row;
    this.showCursor();
  }

  hover(event) {
    super.hover(event);
    if (!this.rows) return;
    const y = event.clientY - this.plot.getBoundingClientRect().top - HEAD;
    const row = this.rows.last - Math.floor(y / this.rows.height);
    this.pickRow(row >= this.rows.first && row <= this.rows.last ? row : null);
  }

  key(event) {
    const up = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (up === undefined || !this.rows) {
      if (event.key === "Escape") this.row = null;
      super.key(event);
      return;
    }
    const { first, last } = this.rows;
    this.pickRow(this.row === null ? first : Math.min(last, Math.max(first, this.row + up)));
    event.preventDefault();
  }

  bucket(row) {
    const low = this.edges[row - 1], high = this.edges[row];
    if (low === undefined) return `under ${seconds(high)}`;
    if (high === undefined) return `over ${seconds(low)}`;
    return `${seconds(low)} to ${seconds(high)}`;
  }

  read(point) {
    const counts = this.pick(point);
    const sum = counts.reduce((a, b) => a + b, 0);
    if (sum === 0) return "no operations";
    if (this.row !== null) return `${share((counts[this.row] ?? 0) / sum)} of ${exact(sum, "operations")} took ${this.bucket(this.row)}`;
    const most = counts.indexOf(Math.max(...counts));
    return `${exact(sum, "operations")}; the most frequent time: ${this.bucket(most)}`;
  }

  draw() {
    if (this.width <= 0) return;
    // Per second: points of different lengths have comparable colours.
    const columns = this.points.map((p) => ({ ...p, counts: this.pick(p).map((n) => n / p.seconds) }));
    let first = Infinity, last = -1, top = 0;
    for (const { counts } of columns) {
      counts.forEach((n, row) => {
        if (n <= 0) return;
        first = Math.min(first, row);
        last = Math.max(last, row);
        top = Math.max(top, n);
      });
    }
    const context = this.prepare();
    this.nothing.hidden = last >= 0 || this.points.length === 0;
    this.rampline.hidden = last < 0;
    if (last < 0) {
      this.rows = null;
      this.axes(context);
      return;
    }
    // A few rows around what there is: a quiet device does not fill the map with one colour.
    while (last - first < 7) {
      if (last < this.edges.length) last += 1;
      if (first > 0) first -= 1;
      if (first === 0 && last >= this.edges.length) break;
    }
    this.rows = { first, last, height: (this.height - FOOT - HEAD) / (last - first + 1) };
    const ramp = RAMPS[this.isDark() ? "dark" : "light"];
    const scale = Math.log1p(top);
    let end = -Infinity;
    for (const { time, seconds: long, counts } of columns) {
      // Ticks come a little early or late: no cracks.
      const begin = time - end < 2.5 * long ? end : time - long;
      end = time;
      const x0 = Math.max(this.left(), Math.round(this.x(begin)));
      const x1 = Math.round(this.x(time));
      if (x1 <= x0) continue;
      for (let row = first; row <= last; row += 1) {
        if (!(counts[row] > 0)) continue;
        const y0 = Math.round(this.top(row)), y1 = Math.round(this.top(row - 1));
        context.fillStyle = colour(ramp, Math.log1p(counts[row]) / scale);
        context.fillRect(x0, y0, x1 - x0, y1 - y0 - 1);
      }
    }
    this.axes(context);
    this.drawKey(ramp);
  }

  prepare() {
    const dots = window.devicePixelRatio || 1;
    this.canvas.width = this.width * dots;
    this.canvas.height = this.height * dots;
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(dots, dots);
    return context;
  }

  top(row) {
    return HEAD + (this.rows.last - row) * this.rows.height;
  }

  axes(context) {
    const style = getComputedStyle(this.plot);
    context.fillStyle = style.color;
    context.font = `11px ${style.fontFamily}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    if (this.rows) {
      const every = Math.ceil(14 / this.rows.height);
      for (let row = this.rows.first; row < this.rows.last; row += every) {
        if (this.edges[row]) context.fillText(seconds(this.edges[row]), this.left() - 8, this.top(row));
      }
    }
    context.textAlign = "center";
    context.textBaseline = "alphabetic";
    for (const { t, text } of this.moments()) {
      const x = this.x(t);
      if (x > this.left() + 18 && x < this.width - 18) context.fillText(text, x, this.height - 4);
    }
  }

  drawKey(ramp) {
    if (this.ramp.childElementCount === 0) {
      for (let n = 0; n < 6; n += 1) this.ramp.append(make("i"));
    }
    [...this.ramp.children].forEach((cell, n) => {
      cell.style.backgroundColor = colour(ramp, n / 5);
    });
  }

  mark(x, point) {
    this.line.hidden = x === null;
    if (x !== null) this.line.style.transform = `translateX(${x}px)`;
    say(this.readout, point && this.rows ? this.read(point) : "");
  }
}

// A line of figures without axes; null where there is none.
export function spark(element, values, most = Math.max(...values.map((v) => v ?? 0))) {
  const width = 96, height = 22;
  let path = "", open = false;
  values.forEach((v, n) => {
    if (typeof v !== "number") {
      open = false;
      return;
    }
    const x = width - (values.length - 1 - n) * (width / 59);
    const y = height - 1.5 - (most > 0 ? (v / most) * (height - 3) : 0);
    path += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  });
  attribute(element.firstElementChild, "d", path || null);
}

export function sparkElement(name) {
  const element = svg("svg", { class: "spark", viewBox: "0 0 96 22", width: 96, height: 22, "aria-hidden": "true" });
  element.append(svg("path", { class: `line ${name}` }));
  return element;
}

export function redrawAll() {
  for (const chart of all) {
    chart.draw();
    chart.showCursor();
  }
}
