// Figures as people read them. Everything takes base units (bytes, seconds, operations per second); null is unknown.

export const NONE = "–";
const BINARY = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

const known = (n) => typeof n === "number" && Number.isFinite(n);

// Three digits that count: 1.24, 12.4, 124.
function digits(n) {
  const a = Math.abs(n);
  return n.toFixed(a < 9.995 ? 2 : a < 99.95 ? 1 : 0);
}

export function bytes(n) {
  if (!known(n)) return NONE;
  let unit = 0;
  // As the command line shows it: three digits.
  while (Math.abs(n) >= 999.5 && unit < BINARY.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(n) : digits(n)} ${BINARY[unit]}`;
}

export const rate = (n) => (known(n) ? `${bytes(n)}/s` : NONE);

export function count(n) {
  if (!known(n)) return NONE;
  if (Math.abs(n) < 9.95 && !Number.isInteger(n)) return n.toFixed(1);
  if (Math.abs(n) < 999.5) return String(Math.round(n));
  for (const unit of ["k", "M", "G"]) {
    n /= 1000;
    if (Math.abs(n) < 999.5) return `${digits(n)} ${unit}`;
  }
  return `${digits(n / 1000)} T`;
}

export function seconds(n) {
  if (!known(n)) return NONE;
  if (n === 0) return "0 s";
  if (n < 999.5e-9) return `${Math.round(n * 1e9)} ns`;
  if (n < 99.5e-6) return `${trim(n * 1e6)} µs`;
  if (n < 999.5e-6) return `${Math.round(n * 1e6)} µs`;
  if (n < 0.9995) return `${digits(n * 1e3)} ms`;
  return `${digits(n)} s`;
}

const trim = (n) => digits(n).replace(/\.?0+$/, "");

// A span of days down to seconds, in two parts.
export function span(n) {
  if (!known(n)) return NONE;
  n = Math.max(0, Math.round(n));
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = parts.findIndex(([size]) => n >= size);
  if (first < 0) return "0 s";
  const out = [];
  for (const [size, unit] of parts.slice(first, first + 2)) {
    const whole = Math.floor(n / size);
    if (whole > 0) out.push(`${whole} ${unit}`);
    n -= whole * size;
  }
  return out.join(" ");
}

export const ago = (n) => (known(n) ? (n < 1.5 ? "now" : `${span(n)} ago`) : NONE);

export function share(n) {
  if (!known(n)) return NONE;
  const percent = n * 100;
  if (percent > 0 && percent < 0.1) return "< 0.1 %";
  return `${percent < 9.95 && percent > 0 ? percent.toFixed(1) : Math.round(percent)} %`;
}

export const ratio = (n) => (known(n) ? `${n >= 99.95 ? Math.round(n) : n.toFixed(2)}:1` : NONE);

export const exact = (n, unit) => (known(n) ? `${n.toLocaleString("en")} ${unit}` : "");

const pad = (n) => String(n).padStart(2, "0");

export function clock(time, withSeconds = true) {
  if (!known(time)) return NONE;
  const d = new Date(time * 1000);
  const hm = `${pad(d.getHours())}:${pad(d.getMinutes())}`;
  return withSeconds ? `${hm}:${pad(d.getSeconds())}` : hm;
}

export function moment(time) {
  if (!known(time)) return NONE;
  const d = new Date(time * 1000);
  return `${d.getFullYear()}-${pad(d.getMonth() + 1)}-${pad(d.getDate())} ${clock(time)}`;
}

// Round values for an axis from 0 to at least `max`; `base` is 1024 for bytes.
export function ticks(max, base, wanted = 3) {
  if (!known(max) || max <= 0) return [0, 1];
  const scale = base ** Math.max(0, Math.floor(Math.log(max) / Math.log(base)));
  const raw = max / scale / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const nice = [1, 2, 2.5, 5, 10].find((n) => n * power >= raw * 0.999) * power;
  // Steps of 250 out of 1024 are no round figures of the next unit, but the axis stays readable.
  const step = nice * scale;
  const out = [];
  for (let n = 0; n < wanted + 2; n += 1) {
    out.push(n * step);
    if (n * step >= max) break;
  }
  return out;
}

// Tick labels need no third digit.
export const short = (text) => text.replace(/(\.\d*?)0+(?=\s)/, "$1").replace(/\.(?=\s)/, "");
