// Everything below the charts: reactors, work, tables, pools, keys, events.

import { spark, sparkElement } from "./charts.js";
import { attribute, by, figure, keyed, make, say } from "./dom.js";
import { sizeParts, stack } from "./stack.js";
import { DataTable } from "./table.js";
import { ago, bytes, clock, count, exact, moment, NONE, rate, ratio, seconds, share, span } from "./units.js";

const SPARK = 60;
const FEW_EVENTS = 12;
const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

const GOOD = ["active", "open", "online", "unlocked", "bound", "converting", "encrypted", "reachable", "ok", "up", "connected", "running"];
const WARN = ["waiting", "changing", "starting", "pre-active", "suspended"];
const BAD = ["failed", "locked", "fenced", "unreachable", "compromised", "revoked", "deactivated", "destroyed", "refused", "error", "stopped", "down", "closed"];

function level(state) {
  const word = String(state ?? "").toLowerCase();
  if (GOOD.includes(word)) return "good";
  const is = (part) => word.includes(part);
  return BAD.some(is) ? "bad" : WARN.some(is) ? "warn" : null;
}

const words = (text) => String(text ?? "").replaceAll("_", " ");
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function tags(element, list) {
  keyed(element, list.filter(Boolean), (tag) => tag.text, () => make("span", { class: "tag" }), (item, tag) => {
    say(item, tag.text);
    attribute(item, "data-level", tag.level);
    attribute(item, "title", tag.title);
  });
}

// Columns that several tables have.
const number = (label, value, format, unit) => ({
  label,
  numeric: true,
  down: true,
  sort: value,
  build: () => make("data"),
  update: (cell, row) => {
    const n = value(row);
    figure(cell, n, format, unit);
    attribute(cell, "class", n === 0 || n === null || n === undefined ? "idle" : null);
  },
});
const text = (label, value) => ({
  label,
  broad: true,
  sort: value,
  build: () => make("span", { class: "sub" }),
  update: (cell, row) => say(cell, value(row) || NONE),
});

// Null only when both are unknown.
const add = (a, b) => (typeof a === "number" || typeof b === "number" ? (a ?? 0) + (b ?? 0) : null);
const most = (a, b) => (typeof a === "number" || typeof b === "number" ? Math.max(a ?? 0, b ?? 0) : null);
const busy = (row) => add(row.read?.bytes_per_second, row.write?.bytes_per_second);

const RATES = [
  number("Read", (r) => r.read?.bytes_per_second, rate, "bytes per second"),
  number("Write", (r) => r.write?.bytes_per_second, rate, "bytes per second"),
  number("IOPS", (r) => add(r.read?.iops, r.write?.iops), count, "operations per second"),
];
const P99 = number("p99", (r) => most(r.read?.p99, r.write?.p99), seconds, "seconds");

// A name, in a second line what it belongs to, and marks.
const named = (label, name, below, marks) => ({
  label,
  sort: name,
  build: () => make("div", { class: "name" }, make("b"), make("small"), make("span", { class: "tags" })),
  update: (cell, row) => {
    say(cell.children[0], name(row));
    attribute(cell.children[0], "title", name(row));
    say(cell.children[1], below(row));
    tags(cell.children[2], marks(row));
  },
});

function volumeMarks(v) {
  const key = v.host_key;
  return [
    v.kind && v.kind !== "volume" && { text: v.kind },
    v.read_only && v.kind !== "snapshot" && { text: "read-only" },
    key && { text: `host key: ${words(key.state)}`, level: level(key.state) ?? (key.why ? "warn" : null), title: key.why },
  ];
}

function hostMarks(h) {
  return [
    h.tls ? { text: "TLS", level: "good" } : { text: "no TLS" },
    h.authenticated ? { text: "authenticated", level: "good" } : { text: "not authenticated" },
    h.errors > 0 && { text: plural(h.errors, "error"), level: "warn" },
  ];
}

// Of each row's throughput, the last minute.
class Sparks {
  constructor() {
    this.of = new Map();
  }

  add(rows, key) {
    const now = new Map(rows.map((row) => [key(row), busy(row)]));
    for (const [name, values] of this.of) {
      if (!now.has(name)) this.of.delete(name);
      else values.push(now.get(name));
      if (values.length > SPARK) values.shift();
    }
    for (const [name, value] of now) if (!this.of.has(name)) this.of.set(name, [value]);
  }

  column(key) {
    return {
      label: "Last minute",
      build: () => sparkElement("read"),
      update: (cell, row) => spark(cell, this.of.get(key(row)) ?? []),
    };
  }
}

const volumeKey = (v) => v.uuid ?? `${v.pool}/${v.name}`;
const hostKey = (h) => `${h.nqn} ${h.subsystem} ${h.controller ?? h.address}`;
const deviceKey = (d) => d.name;

export class Sections {
  constructor() {
    this.sparks = { volumes: new Sparks(), hosts: new Sparks(), devices: new Sparks() };
    this.allEvents = false;
    this.volumes = new DataTable(by("volumes"), {
      name: "Volumes",
      key: volumeKey,
      words: (v) => [v.pool, v.name, v.domain, v.kind, v.uuid, ...(v.exported ?? [])].join(" "),
      columns: [
        named("Name", (v) => v.name, (v) => [v.pool, v.domain].filter(Boolean).join(" · "), volumeMarks),
        number("Size", (v) => v.size_bytes, bytes, "bytes"),
        number("Written", (v) => v.logical_bytes, bytes, "bytes"),
        number("Gives back", (v) => v.reclaimable_bytes, bytes, "bytes"),
        ...RATES,
        P99,
        this.sparks.volumes.column(volumeKey),
        text("Exported as", (v) => (v.exported ?? []).join(", ")),
      ],
    });
    this.hosts = new DataTable(by("hosts"), {
      name: "Hosts",
      key: hostKey,
      words: (h) => [h.nqn, h.subsystem, h.address].join(" "),
      columns: [
        named("Host", (h) => h.nqn, (h) => h.address ?? "", hostMarks),
        text("Subsystem", (h) => h.subsystem),
        number("Queues", (h) => h.queues, count, "queues"),
        ...RATES,
        this.sparks.hosts.column(hostKey),
        number("Last sign of life", (h) => h.keep_alive_age_seconds, ago, "seconds"),
      ],
    });
    this.devices = new DataTable(by("devices"), {
      name: "Devices",
      key: deviceKey,
      words: (d) => [d.name, d.product].join(" "),
      columns: [
        named("Name", (d) => d.name, (d) => d.product ?? "", () => []),
        number("Size", (d) => d.size_bytes, bytes, "bytes"),
        ...RATES,
        P99,
        this.sparks.devices.column(deviceKey),
        number("Errors", (d) => d.errors, count, "operations that failed"),
      ],
    });
    for (const id of ["volumes", "hosts", "devices"]) by(id).classList.add("cards");
    by("more-events").addEventListener("click", () => {
      this.allEvents = !this.allEvents;
      this.showEvents(this.events ?? []);
    });
  }

  // Also while nobody looks.
  remember(s) {
    this.sparks.volumes.add(s.volumes ?? [], volumeKey);
    this.sparks.hosts.add(s.hosts ?? [], hostKey);
    this.sparks.devices.add(s.devices ?? [], deviceKey);
  }

  show(s) {
    this.showReactors(s.reactors ?? []);
    this.showWork(s.work ?? []);
    this.showTable("volumes", "no-volume", s.volumes ?? [], s.left_out?.volumes, "volume");
    this.showTable("hosts", "no-host", s.hosts ?? [], s.left_out?.hosts, "connection");
    this.showTable("devices", "no-device", s.devices ?? [], s.left_out?.devices, "device");
    this.showPools(s.pools ?? []);
    this.showKeys(s.keys ?? [], s.key_servers ?? []);
    this.showEvents(s.events ?? []);
  }

  showTable(name, empty, rows, leftOut, one) {
    this[name].show(rows);
    by(empty).hidden = rows.length > 0;
    const more = leftOut > 0 ? `, and ${leftOut} that the target leaves out here` : "";
    say(by(`${name}-aside`), rows.length > 0 ? plural(rows.length, one) + more : "");
  }

  showReactors(reactors) {
    by("no-reactor").hidden = reactors.length > 0;
    const known = reactors.map((r) => r.busy).filter((b) => typeof b === "number");
    const mean = known.length > 0 ? known.reduce((a, b) => a + b, 0) / known.length : null;
    say(by("reactors-aside"), mean === null ? "" : `${share(mean)} busy on average`);
    const build = () => make("li", {}, make("span", { class: "name" }), meter(), make("data"));
    keyed(by("reactors"), reactors, (r) => r.core, build, (item, r) => {
      say(item.children[0], `Core ${r.core}`);
      setMeter(item.children[1], r.busy, `Core ${r.core}`, r.busy > 0.9);
      figure(item.children[2], r.busy, share);
    });
  }

  showWork(work) {
    by("no-work").hidden = work.length > 0;
    const running = work.filter((w) => w.state === "running").length;
    say(by("work-aside"), running > 0 ? `${running} running` : "");
    const build = () => make("li", {},
      make("div", { class: "head" }, make("p", { class: "what" }), make("p", { class: "how" })),
      meter(), make("p", { class: "why" }));
    keyed(by("work"), work, (w) => `${w.what} ${w.on}`, build, (item, w) => {
      const [head, bar, why] = item.children;
      head.children[0].replaceChildren(capital(words(w.what)), make("span", { text: w.on ? ` of ${w.on}` : "" }));
      const parts = [
        w.state === "running" ? null : words(w.state),
        w.done < 1 ? share(w.done) : null,
        w.state === "running" && typeof w.rate_bytes_per_second === "number" ? rate(w.rate_bytes_per_second) : null,
        w.state === "running" && typeof w.eta_seconds === "number" ? `${span(w.eta_seconds)} left` : null,
      ];
      say(head.children[1], parts.filter(Boolean).join(" · "));
      bar.hidden = w.state !== "running" && !(w.done < 1);
      setMeter(bar, w.done, `${words(w.what)} of ${w.on}`, false);
      why.hidden = !w.why;
      say(why, w.why ?? "");
    });
  }

  showPools(pools) {
    by("no-pool-2").hidden = pools.length > 0;
    say(by("pools-aside"), pools.length > 0 ? plural(pools.length, "pool") : "");
    keyed(by("pools"), pools, (p) => p.uuid ?? p.name, buildPool, showPool);
  }

  showKeys(keys, servers) {
    by("no-key").hidden = keys.length + servers.length > 0;
    say(by("keys-aside"), keys.length > 0 ? `${plural(keys.length, "key")} from key servers` : "");
    const build = () => make("li", {},
      make("div", { class: "head" }, make("p", { class: "what" }), make("span", { class: "tags" })),
      make("p", { class: "sub" }), make("p", { class: "why" }));
    const update = (item, { what, name, marks, below, why }) => {
      const [head, sub, reason] = item.children;
      head.children[0].replaceChildren(make("span", { text: `${what} ` }), name);
      tags(head.children[1], marks);
      say(sub, below);
      reason.hidden = !why;
      say(reason, why ?? "");
    };
    const serverRows = servers.map((k) => ({
      what: "Server", name: k.name, why: k.why,
      marks: [{ text: words(k.state), level: level(k.state) }],
      below: [(k.addresses ?? []).join(", "),
        typeof k.last_answer_age_seconds === "number" ? `last answer ${ago(k.last_answer_age_seconds)}` : "has not answered yet",
      ].filter(Boolean).join(" · "),
    }));
    const keyRows = keys.map((k) => ({
      what: "Key", name: k.name, why: k.why,
      marks: [{ text: words(k.state ?? "unknown"), level: level(k.state) },
        k.access && { text: `access: ${words(k.access)}`, level: level(k.access) }],
      below: [k.server && `from ${k.server}`,
        (k.devices ?? []).length > 0 ? `for ${k.devices.join(", ")}` : "not used"].filter(Boolean).join(" · "),
    }));
    keyed(by("servers"), serverRows, (r) => r.name, build, update);
    keyed(by("keys"), keyRows, (r) => r.name, build, update);
  }

  showEvents(events) {
    this.events = events;
    by("no-event").hidden = events.length > 0;
    const bad = events.filter((e) => e.severity !== "info").length;
    say(by("events-aside"), bad > 0 ? `${plural(bad, "warning or error", "warnings and errors")}` : "");
    const more = by("more-events");
    more.hidden = events.length <= FEW_EVENTS;
    say(more, this.allEvents ? "Show fewer" : `Show all ${events.length}`);
    attribute(more, "aria-expanded", String(this.allEvents));
    const build = () => make("li", {}, make("time"), make("span", { class: "sign", role: "img" }), make("span", { class: "text" }));
    const shown = this.allEvents ? events : events.slice(0, FEW_EVENTS);
    keyed(by("events"), shown, (e) => `${e.time} ${e.text}`, build, (item, e) => {
      attribute(item, "data-level", e.severity);
      const [time, sign, what] = item.children;
      say(time, clock(e.time));
      attribute(time, "datetime", new Date(e.time * 1000).toISOString());
      attribute(time, "title", moment(e.time));
      say(sign, { warning: "▲", error: "■" }[e.severity] ?? "●");
      attribute(sign, "aria-label", e.severity);
      say(what, e.text);
    });
  }
}

function meter() {
  return make("div", { class: "meter", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, make("i"));
}

// Without a share it is only known that something goes on.
function setMeter(bar, part, name, warn) {
  const known = typeof part === "number";
  bar.classList.toggle("unknown", !known);
  bar.firstElementChild.style.transform = known ? `scaleX(${Math.min(1, Math.max(0, part))})` : "";
  attribute(bar, "aria-label", name);
  attribute(bar, "aria-valuenow", known ? Math.round(part * 100) : null);
  attribute(bar, "data-level", warn ? "warn" : null);
}

function buildPool() {
  const domains = make("table", {},
    make("caption", { class: "hidden", text: "Domains" }),
    make("thead", {}, make("tr", {}, ...["Domain", "Unique", "Stored", "Ratio"].map((label, n) =>
      make("th", { scope: "col", class: n > 0 ? "numeric" : null, text: label })))),
    make("tbody"));
  return make("article", { class: "card pool" },
    make("div", { class: "head" }, make("h3"), make("span", { class: "tags" })),
    make("p", { class: "why" }),
    make("div", { class: "fill" }, make("div", { class: "stack", role: "img" })),
    make("div", { class: "twins" }, make("dl", { class: "facts" }), domains));
}

function slotsOf(encryption) {
  const kinds = (encryption?.slots ?? []).map((slot) => words(slot.kind).replace("kms", "key server"));
  return [...new Set(kinds)].join(", ");
}

function showPool(card, p) {
  const [head, why, fill, twins] = card.children;
  const [facts, domains] = twins.children;
  say(head.children[0], p.name);
  const encryption = p.encryption ?? {};
  tags(head.children[1], [
    { text: words(p.state), level: level(p.state) },
    encryption.encrypted === true && { text: "encrypted", level: "good" },
    encryption.encrypted === false && { text: "not encrypted", level: "warn" },
    p.damaged > 0 && { text: `${plural(p.damaged, "damaged fragment")}`, level: "bad" },
  ]);
  const reason = p.why ?? encryption.why;
  why.hidden = !reason;
  say(why, reason ?? "");
  const parts = sizeParts(p);
  fill.hidden = parts === null;
  if (parts) stack(fill.firstElementChild, null, `Space of ${p.name}`, parts);
  const memory = typeof p.memory_bytes === "number"
    ? `${bytes(p.memory_bytes)}${p.memory_budget_bytes ? ` of ${bytes(p.memory_budget_bytes)}` : ""}` : null;
  const rows = [
    ["Reduction", typeof p.ratio === "number" ? ratio(p.ratio) : null],
    ["Free", typeof p.free_bytes === "number" ? `${bytes(p.free_bytes)} of ${bytes(p.size_bytes)}` : null, exact(p.free_bytes, "bytes")],
    ["Written", typeof p.logical_bytes === "number" ? bytes(p.logical_bytes) : null, exact(p.logical_bytes, "bytes")],
    ["Stored", typeof p.stored_bytes === "number" ? bytes(p.stored_bytes) : null, exact(p.stored_bytes, "bytes")],
    ["Memory", memory],
    ["Device", p.base_bdev],
    ["Opened by", slotsOf(encryption) || null],
  ].filter(([, value]) => value !== null && value !== undefined);
  keyed(facts, rows, ([label]) => label, () => make("div", {}, make("dt"), make("dd")), (item, [label, value, title]) => {
    say(item.children[0], label);
    say(item.children[1], value);
    attribute(item.children[1], "title", title);
  });
  domains.hidden = (p.domains ?? []).length === 0;
  const build = () => make("tr", {}, make("th", { scope: "row" }, make("span"), " ", make("span", { class: "tags" })),
    ...[0, 1, 2].map(() => make("td", { class: "numeric" }, make("data"))));
  keyed(domains.tBodies[0], p.domains ?? [], (d) => d.name, build, (row, d) => {
    say(row.cells[0].children[0], d.name);
    tags(row.cells[0].children[1], [d.state && { text: words(d.state), level: d.state === "encrypted" ? null : "warn" }]);
    figure(row.cells[1].firstElementChild, d.unique_bytes, bytes, "bytes");
    figure(row.cells[2].firstElementChild, d.stored_bytes, bytes, "bytes");
    figure(row.cells[3].firstElementChild, d.ratio, ratio);
  });
}
