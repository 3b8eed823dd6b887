// The page: takes what the feed brings, keeps what the charts show, and hands the rest to the sections.

import { HeatMap, LineChart, redrawAll } from "./charts.js";
import { attribute, by, figure, keyed, make, say } from "./dom.js";
import { Feed, isToken } from "./feed.js";
import { Sections } from "./sections.js";
import { sizeParts, stack } from "./stack.js";
import { bytes, clock, count, NONE, rate, ratio, seconds, span } from "./units.js";

// A snapshot comes once a second; without one for so long the page says that it is old.
const STALE_MS = 5_000;
const HISTORY_MS = 240_000;

// ---- Theme: the system's, unless chosen otherwise.

const THEMES = { system: "System", light: "Light", dark: "Dark" };
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const chosen = () => document.documentElement.dataset.theme ?? "system";
const isDark = () => (chosen() === "system" ? systemDark.matches : chosen() === "dark");

function showTheme() {
  say(by("theme-name"), THEMES[chosen()]);
  attribute(by("theme"), "aria-label", `Theme: ${THEMES[chosen()]}`);
  redrawAll();
}

by("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(chosen()) + 1) % names.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    if (next === "system") localStorage.removeItem("cryptfold-theme");
    else localStorage.setItem("cryptfold-theme", next);
  } catch {
    // Not remembered, then.
  }
  showTheme();
});
systemDark.addEventListener("change", redrawAll);

// ---- What the charts show: rings of points as the target keeps them, and what has come since.

let rings = [{ keep: 300, points: [] }];

const OPERATIONS = ["read", "write"];
const FIGURES = { iops: "iops", bytes_per_second: "bytes_per_second", p50: "p50", p99: "p99", p999: "p999" };
const SPACE = ["logical_bytes", "unique_bytes", "stored_bytes", "metadata_bytes"];

function pointOf(s) {
  const point = { time: s.time, seconds: s.interval_seconds || 1 };
  for (const op of OPERATIONS) {
    for (const name of Object.values(FIGURES)) point[`${op}_${name}`] = s.totals?.[op]?.[name] ?? null;
    point[`heat_${op}`] = s.heat?.[op] ?? null;
  }
  for (const name of SPACE) point[name] = s.space?.[name] ?? null;
  return point;
}

function ringOf({ keep_seconds: keep, points: columns }) {
  const names = Object.keys(columns);
  const points = columns.time.map((_, n) => Object.fromEntries(names.map((name) => [name, columns[name][n]])));
  return { keep, points };
}

function remember(s) {
  const { keep, points } = rings[0];
  const last = points[points.length - 1];
  // A clock that was set back.
  if (last && s.time < last.time - 60) rings = rings.map((ring) => ({ ...ring, points: [] }));
  else if (last && s.time <= last.time) return;
  rings[0].points.push(pointOf(s));
  // Longer than the target keeps it: until the history is asked for again, coarser rings end here.
  while (rings[0].points[0].time < s.time - keep - 2 * (HISTORY_MS / 1000)) rings[0].points.shift();
}

// Points of the ring that fits, with finer ones after its end and coarser ones before its beginning.
function gather(length) {
  let base = rings.findIndex((ring) => ring.keep >= length);
  if (base < 0) base = rings.length - 1;
  let out = rings[base].points;
  for (let n = base - 1; n >= 0; n -= 1) {
    const end = out.length > 0 ? out[out.length - 1].time : -Infinity;
    out = out.concat(rings[n].points.filter((p) => p.time - p.seconds / 2 > end));
  }
  for (let n = base + 1; n < rings.length; n += 1) {
    const begin = out.length > 0 ? out[0].time - out[0].seconds / 2 : Infinity;
    out = rings[n].points.filter((p) => p.time < begin).concat(out);
  }
  return out;
}

const LENGTHS = { 300: "last 5 minutes", 3600: "last hour", 86400: "last 24 hours" };
const READ_WRITE = (name) => [
  { key: `read_${name}`, label: "Read", class: "read", fill: true },
  { key: `write_${name}`, label: "Write", class: "write", fill: true },
];
const percentiles = (op) => [
  { key: `${op}_p50`, label: "p50", class: op },
  { key: `${op}_p99`, label: "p99", class: `${op}-2` },
  { key: `${op}_p999`, label: "p99.9", class: `${op}-3` },
];
const choice = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function heatOf(point) {
  const op = choice("heat-op");
  const rows = OPERATIONS.filter((o) => op === "all" || op === o).map((o) => point[`heat_${o}`] ?? []);
  const [a, b] = rows;
  return b ? Array.from({ length: Math.max(a.length, b.length) }, (_, n) => (a[n] ?? 0) + (b[n] ?? 0)) : a;
}

const IDLE = "No host reads or writes";
const latency = new LineChart(by("latency"), "Latency of reads", {
  series: percentiles("read"), format: seconds, log: true, nothing: IDLE,
});
const heat = new HeatMap(by("heat"), "How long operations take", { pick: heatOf, isDark, nothing: IDLE });
const charts = [
  new LineChart(by("throughput"), "Throughput", {
    series: READ_WRITE("bytes_per_second"), format: rate, base: 1024, nothing: IDLE,
  }),
  new LineChart(by("iops"), "Operations per second", { series: READ_WRITE("iops"), format: count, nothing: IDLE }),
  latency,
  heat,
  new LineChart(by("space"), "Space over time", {
    series: [
      { key: "logical_bytes", label: "Written", class: "c-logical" },
      { key: "unique_bytes", label: "Without duplicates", class: "c-unique" },
      { key: "stored_bytes", label: "Stored", class: "c-stored", fill: true },
    ],
    format: bytes, base: 1024, nothing: "Nothing is stored",
  }),
];

function showCharts() {
  if (!last) return;
  const length = Number(choice("range"));
  const view = { from: last.time - length, to: last.time, label: LENGTHS[length] };
  const points = gather(length);
  heat.setEdges(last.heat?.edges ?? []);
  for (const chart of charts) chart.show(points, view);
}

by("range").addEventListener("change", showCharts);
by("heat-op").addEventListener("change", showCharts);
by("latency-op").addEventListener("change", () => {
  const op = choice("latency-op");
  latency.name = `Latency of ${op}s`;
  latency.setSeries(percentiles(op));
  showCharts();
});

// ---- State, problems, reduction.

const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

function showState(s) {
  const problems = s.problems ?? [];
  const pill = by("state");
  const level = problems.length > 0 ? "bad" : s.state === "running" ? "good" : "warn";
  say(pill, level === "bad" ? plural(problems.length, "problem") : level === "good" ? "Healthy" : String(s.state));
  attribute(pill, "data-level", level);
  say(by("about"), `${s.version ? `version ${s.version} · ` : ""}up ${span(s.uptime_seconds)}`);
  by("problems").hidden = problems.length === 0;
  keyed(by("problem-list"), problems, (text) => text, () => make("li"), (item, text) => say(item, text));
  const short = s.space?.ratio ? ratio(s.space.ratio) : NONE;
  document.title = `${problems.length > 0 ? `▲ ${problems.length} · ` : ""}${short} · cryptfold`;
}

function showReduction(s) {
  // Before its configuration has been applied a target has nothing, and nothing has to be done about it.
  const none = s.state === "running" && s.pools?.length === 0;
  by("no-pool").hidden = !none;
  for (const part of document.querySelectorAll(".split")) part.hidden = none;
  const space = s.space ?? {};
  const known = typeof space.ratio === "number" && space.logical_bytes > 0;
  by("to-one").hidden = !known;
  figure(by("ratio"), known ? space.ratio : null, (n) => (n === null ? NONE : ratio(n).replace(":1", "")));
  const caption = by("ratio-caption");
  if (known) {
    const used = (space.stored_bytes ?? 0) + (space.metadata_bytes ?? 0);
    say(caption, `Hosts have written ${bytes(space.logical_bytes)}; it lies in ${bytes(used)}.`);
  } else say(caption, s.state === "running" && !none ? "Nothing has been written yet." : "");
  if (none) return;
  const logical = space.logical_bytes ?? 0, zero = space.zero_bytes ?? 0;
  const unique = space.unique_bytes ?? 0, stored = space.stored_bytes ?? 0;
  const parts = [
    { class: "stored", label: "Stored", value: Math.min(stored, unique) },
    { class: "compressed", label: "Saved by compression", value: Math.max(0, unique - stored) },
    { class: "duplicate", label: "Saved as duplicates", value: Math.max(0, logical - zero - unique) },
    { class: "zero", label: "Zeros", value: zero },
  ];
  figure(by("logical"), space.logical_bytes, bytes, "bytes");
  stack(by("logical-stack"), by("logical-parts"), "Written by hosts", parts);
  figure(by("size"), space.size_bytes, bytes, "bytes");
  stack(by("size-stack"), by("size-parts"), "Space of the pools", sizeParts(space) ?? []);
}

// ---- Live or not.

let last = null;
let heard = 0;
let asked = 0;
let lost = null;
// When the page was seen again: while hidden it does not listen.
let seen = -Infinity;

function showLive() {
  if (document.hidden) return;
  const silent = performance.now() - heard;
  const stale = last !== null && (lost !== null || silent > STALE_MS);
  document.body.classList.toggle("is-stale", stale);
  const live = last !== null && !stale;
  attribute(by("live"), "data-live", live ? "yes" : "no");
  const connecting = lost === null && (last === null || performance.now() - seen < STALE_MS);
  say(by("live-text"), live ? "Live" : connecting ? "Connecting" : "Disconnected");
  say(by("live-age"), stale && !connecting ? `for ${span(silent / 1000)}` : "");
  if (stale) {
    say(by("state"), "Unknown");
    attribute(by("state"), "data-level", "unknown");
  }
  const banner = by("stale");
  banner.hidden = connecting || (!stale && lost === null);
  if (banner.hidden) return;
  const why = lost ?? "no news";
  say(banner, last === null
    ? `The target can not be reached (${why}). Trying again.`
    : `The target is silent (${why}). What you see is how it was at ${clock(last.time)}. Trying again.`);
}

const sections = new Sections();

function show() {
  if (!last || document.hidden) return;
  showState(last);
  showReduction(last);
  sections.show(last);
  showCharts();
}

setInterval(showLive, 1000);

// ---- The token, where one is needed.

function askToken(wrong) {
  const dialog = by("token"), input = by("token-input");
  const tell = (isWrong) => {
    by("token-wrong").hidden = !isWrong;
    attribute(input, "aria-invalid", isWrong ? "true" : null);
    input.value = "";
  };
  tell(wrong);
  return new Promise((given) => {
    let done = false;
    by("token-form").onsubmit = (event) => {
      const token = input.value.trim();
      done = isToken(token);
      if (done) given(token);
      else {
        // A quote that an editor has made typographic, say: no target has such a token.
        event.preventDefault();
        tell(true);
      }
    };
    // There is nothing to see without it.
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      if (!done) dialog.showModal();
    };
    if (!dialog.open) dialog.showModal();
    input.focus();
  });
}

const feed = new Feed({
  history(history) {
    if (!Array.isArray(history.rings) || history.rings.length === 0) return;
    rings = history.rings.map(ringOf);
    asked = performance.now();
    showCharts();
  },
  snapshot(snapshot) {
    heard = performance.now();
    lost = null;
    last = snapshot;
    remember(snapshot);
    sections.remember(snapshot);
    show();
    showLive();
  },
  lost(why) {
    lost = why;
    showLive();
  },
  token: askToken,
});

// Coarser figures than those that come by themselves; a page that nobody looks at needs none.
function refresh() {
  if (lost === null && !document.hidden && performance.now() - asked >= HISTORY_MS) feed.askHistory().catch(() => {});
}
setInterval(refresh, 10_000);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) seen = performance.now();
  show();
  showLive();
});
showTheme();
feed.run();
