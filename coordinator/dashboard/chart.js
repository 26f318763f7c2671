// Curves, with axes that can be read at any width. Knows nothing of jobs.

import { figure } from "./format.js";
import { h, svg } from "./dom.js";

const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [220, 64, 16, 22, 44];
const CHARACTER = 8;
/** With fewer points there is no mean to see. */
const MEAN_MIN = 40;
/** Reports before and behind each, at most, that its mean is of. */
const REACH_MAX = 10;
/** Between names of marks. */
const APART = 28;

/** A round number that is in a span about `wanted` times. */
function stepOf(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw * 0.999) ?? 10 * power;
}

/** Its multiples in the span. */
function ticks(low, high, step) {
  const first = Math.ceil(low / step - 1e-9);
  const many = Math.max(0, Math.floor(high / step + 1e-9) - first + 1);
  return Array.from({ length: many }, (_, at) => +((first + at) * step).toPrecision(12));
}

/** Values as an axis shows them: with the digits that tell neighbours apart. */
function labels(values) {
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0] ?? 1);
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step || 1) + 1e-9)));
  return values.map((value) => (Math.abs(value) >= 1e4 || (value !== 0 && step < 1e-6) ? figure(value) : value.toFixed(digits)));
}

/** Of each point and as many before as behind it: a mean of those before alone would run late, and end above where the curve ends. */
function mean(points) {
  const most = Math.min(REACH_MAX, Math.ceil(points.length / 40));
  return points.map(([x], at) => {
    const reach = Math.min(most, at, points.length - 1 - at);
    const near = points.slice(at - reach, at + reach + 1);
    return [x, near.reduce((sum, [, y]) => sum + y, 0) / near.length];
  });
}

/**
 * A figure. `series` are `{ name, points: [[x, y]] }`, at most three; `marks` are `{ x, text }`. With one series of many points the strong line is a
 * mean.
 */
export function chart({ name, xName, series, marks = [], width }) {
  const drawn = series.map(({ name, points }) => ({ name, points: points.filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y)) }));
  const all = drawn.flatMap(({ points }) => points);
  if (all.length === 0) return h("figure", null, h("figcaption", null, name), h("p", { class: "quiet" }, "No points yet."));
  const [xs, ys] = [all.map(([x]) => x), all.map(([, y]) => y)];
  const [left, right] = span(xs);
  const [least, greatest] = span(ys);
  // Up and down to round numbers, so that the ends have names.
  const rise = stepOf(least, greatest, 4);
  const [low, high] = [Math.floor(least / rise + 1e-9) * rise, Math.ceil(greatest / rise - 1e-9) * rise];
  const inner = { width: Math.max(120, width - LEFT - RIGHT), height: HEIGHT - TOP - BOTTOM };
  const x = (value) => LEFT + ((value - left) / (right - left)) * inner.width;
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * inner.height;
  const path = (points) => points.map(([px, py], at) => `${at ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
  const smooths = drawn.length === 1 && drawn[0].points.length > MEAN_MIN;
  const lines = smooths
    ? [line("thin c0", path(drawn[0].points)), line("strong c0", path(mean(drawn[0].points)))]
    : drawn.map(({ points }, at) => line(`strong c${at}`, path(points)));
  const dots = drawn.map(({ points }, at) => points.length === 1 && svg("circle", { class: `dot c${at}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 }));
  const said = drawn.filter(({ points }) => points.length).map(({ name, points }) => {
    const [first, last] = [points[0], points.at(-1)];
    return `${name}: ${figure(first[1])} at ${xName} ${figure(first[0])}, ${figure(last[1])} at ${xName} ${figure(last[0])}`;
  });
  const names = drawn.length > 1 ? drawn.map(({ name }, at) => h("span", { class: `legend c${at}` }, name)) : [];
  return h(
    "figure",
    null,
    h("figcaption", null, name, smooths && h("span", { class: "quiet" }, ` – thin: each report, strong: their mean`), names),
    svg(
      "svg",
      { role: "img", "aria-label": said.join("; "), width: inner.width + LEFT + RIGHT, height: HEIGHT },
      axes({ x, y, left, right, rows: ticks(low, high, rise), inner, xName }),
      flags(marks.filter((mark) => mark.x >= left && mark.x <= right).map((mark) => ({ text: mark.text, at: x(mark.x) })), inner),
      lines,
      dots,
    ),
  );
}

/** Of a figure, so that two stand side by side where there is room. */
export function widthIn(main) {
  const room = main.clientWidth - 32;
  return Math.max(300, room >= 900 ? Math.min(760, (room - 16) / 2) : room);
}

function span(values) {
  const [low, high] = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const spare = high > low ? 0 : Math.abs(high) * 0.05 || 1;
  return [low - spare, high + spare];
}

const line = (kind, d) => svg("path", { class: kind, d, fill: "none" });

function axes({ x, y, left, right, rows, inner, xName }) {
  const bottom = TOP + inner.height;
  const columns = ticks(left, right, stepOf(left, right, Math.max(2, Math.floor(inner.width / (10 * CHARACTER)))));
  const [rowNames, columnNames] = [labels(rows), labels(columns)];
  return [
    rows.map((value, at) => [
      svg("line", { class: "rule", x1: LEFT, x2: LEFT + inner.width, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, rowNames[at]),
    ]),
    columns.map((value, at) => [
      svg("line", { class: "rule", x1: x(value), x2: x(value), y1: bottom, y2: bottom + 5 }),
      svg("text", { x: x(value), y: bottom + 19, "text-anchor": "middle" }, columnNames[at]),
    ]),
    svg("line", { class: "axis", x1: LEFT, x2: LEFT + inner.width, y1: bottom, y2: bottom }),
    svg("text", { x: LEFT + inner.width / 2, y: HEIGHT - 6, "text-anchor": "middle" }, xName),
  ];
}

/** Moments that matter, named above the plot where there is room for names. */
function flags(marks, inner) {
  let free = -APART;
  return marks.map(({ text, at }) => {
    const isNamed = at >= free;
    if (isNamed) free = at + APART;
    return [
      svg("line", { class: "flag", x1: at, x2: at, y1: TOP, y2: TOP + inner.height }),
      isNamed && svg("text", { class: "flag", x: at, y: TOP - 6, "text-anchor": at > LEFT + inner.width - 40 ? "end" : "middle" }, text),
    ];
  });
}
