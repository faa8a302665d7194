// Numbers, durations and times as text. null is an unknown value and becomes a dash.

const UNKNOWN = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const dated = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "medium",
  hourCycle: "h23" });

export function count(value) {
  return value === null || value === undefined ? UNKNOWN : whole.format(value);
}

/** Events per second: one digit after the point below 10. */
export function rate(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (value === 0 || value >= 9.95) return whole.format(value);
  return value < 0.05 ? "<0.1" : value.toFixed(1);
}

/** A duration with three significant digits. */
export function seconds(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (value === 0) return "0 s";
  if (value < 0.0095) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  const rest = Math.round(value);
  return `${Math.floor(rest / 60)} min ${String(rest % 60).padStart(2, "0")} s`;
}

/** A rough duration: its largest unit. */
export function age(value) {
  if (value === null || value === undefined) return UNKNOWN;
  const floor = Math.max(0, Math.floor(value));
  if (floor < 120) return `${floor} s`;
  if (floor < 7200) return `${Math.floor(floor / 60)} min`;
  if (floor < 172800) return `${Math.floor(floor / 3600)} h`;
  return `${Math.floor(floor / 86400)} d`;
}

export function share(value) {
  return value === null || value === undefined ? UNKNOWN : `${Math.round(value * 100)}%`;
}

/** Unix seconds as the local time of day. */
export function time(value) {
  return value ? clock.format(value * 1000) : UNKNOWN;
}

/** Unix seconds as the local date and time. */
export function date(value) {
  return value ? dated.format(value * 1000) : UNKNOWN;
}

const RATE_WINDOW_S = 60;

/** Rates are over a minute; over a shorter time, which is named, after very many requests. */
export function windowOf({ window_s: window }) {
  return window < RATE_WINDOW_S ? `over ${seconds(window)}` : "";
}

export function plural(number, one, many = `${one}s`) {
  return `${whole.format(number)} ${number === 1 ? one : many}`;
}

/** "PullingImage" → "pulling image", for reasons in running text. */
export function words(reason) {
  return reason.replace(/([a-z0-9])([A-Z])/g, "$1 $2").toLowerCase();
}
