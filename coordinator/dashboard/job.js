// One job: its curves, where its ranks are, what has happened to it, why it waits, what it prints; cancel and scale.

import { get, post } from "./api.js";
import { chart, widthIn } from "./chart.js";
import { badge, facts, h, nodeLink, section, table } from "./dom.js";
import { bytes, count, duration, figure, moment } from "./format.js";
import { live, may } from "./live.js";
import { logs } from "./logs.js";
import * as parts from "./parts.js";

/** Twice what the coordinator keeps; a curve that was watched for long is thinned here too. */
const POINTS_MAX = 1024;

/** What is known of the job in sight. */
let known = { id: null };

export const title = ([id]) => id;

export async function load([id]) {
  if (known.id !== id) known = { id, points: [], told: null, checkpoints: [], at: null };
  const asked = known;
  const last = asked.points.at(-1)?.at_ms ?? 0;
  const [job, { points }] = await Promise.all([get(`/v1/jobs/${id}`), get(`/v1/jobs/${id}/history?after_ms=${last}`)]);
  follow(asked, points);
  // Lists that change with events are asked for when there were some.
  const at = JSON.stringify([job.state, job.reason, job.generation, job.placement, job.checkpoint?.step, live.events.findLast((event) => event.job === id)?.number]);
  if (asked.at !== at || job.state === "queued") {
    const [told, { checkpoints }] = await Promise.all([get(`/v1/jobs/${id}/explanation`), get(`/v1/checkpoints?job=${id}`)]);
    Object.assign(asked, { told, checkpoints, at });
  }
  return { job, ...asked };
}

/** Steps that were done again are told again: they replace those before. */
function follow(asked, points) {
  if (points.length === 0) return;
  const kept = asked.points.filter((point) => point.step < points[0].step);
  asked.points = [...kept, ...points];
  if (asked.points.length > POINTS_MAX) asked.points = asked.points.filter((_, at) => at % 2 === 0 || at === asked.points.length - 1);
}

export function draw({ job, points, told, checkpoints }) {
  return [
    h("div", { class: "row" }, badge(job.state), h("span", null, job.name), h("span", { class: "quiet" }, parts.kind(job)), h("span", null, parts.progress(job))),
    job.reason && h("p", { class: job.state === "failed" ? "grave" : null }, h("strong", null, job.state === "queued" ? "Why it waits: " : "Why: "), job.reason),
    told.nodes.length > 0 && section("Node by node", h("ul", null, told.nodes.map(({ node, reason }) => h("li", null, nodeLink(node), `: ${reason}`)))),
    controls(job),
    curves(job, points, told.events),
    section("State", facts(state(job))),
    job.outcome && section("Outcome", facts(outcome(job))),
    job.placement.length > 0 && section("Placement", placement(job)),
    section("Checkpoints", table("Checkpoints", ["Step", "Generation", "Shards", "Size", "Committed", "Pinned", "Where"], checkpoints.slice().reverse().map(checkpoint), "None yet.")),
    section("Timeline", parts.events("Timeline", timeline(told.events), true)),
    logs(job),
  ];
}

function controls(job) {
  if (parts.hasEnded(job) || !may("change", job)) return null;
  return h(
    "form",
    { class: "row", "data-submit": "scale", "data-of": job.job, "aria-label": "Change this job" },
    !job.serves && [
      h("label", null, "Ranks ", h("input", { type: "number", name: "ranks", min: 1, max: 4096, value: job.world_sizes.at(-1) ?? 1, required: true })),
      h("button", { type: "submit" }, "Scale"),
    ],
    h("button", { type: "button", class: "grave", "data-do": "cancel", "data-of": job.job, "data-sure": `Cancel ${job.job} (${job.name})? Its ranks are stopped; checkpoints stay.` }, "Cancel job"),
  );
}

const timeline = (events) => events.map((event) => ({ ...event, grave: / ended: |^failed/.test(event.text) })).reverse();

/** Where later generations went on; the first has begun the curve. */
function generations(events) {
  const resumed = events.map(({ text }) => /^(g\d+) goes on at step-(\d+)/.exec(text)).filter(Boolean);
  return resumed.slice(1).map(([, text, step]) => ({ x: Number(step), text }));
}

function curves(job, points, events) {
  if (job.serves || job.exec) return null;
  const width = widthIn(document.querySelector("main"));
  const of = (key) => points.map((point) => [point.step, point[key]]).filter(([, y]) => y !== null);
  const marks = generations(events);
  const one = (name, key) => {
    const curve = of(key);
    return curve.length > 0 && chart({ name, xName: "step", series: [{ name, points: curve }], marks, width });
  };
  const isRl = points.some((point) => point.episode_return !== null);
  const returns = points.filter((point) => point.episode_return !== null).map((point) => [point.env_steps, point.episode_return]);
  return section(
    "Curves",
    points.length === 0 && h("p", { class: "quiet" }, parts.hasEnded(job) ? "None: this coordinator has begun after the job. Its checkpoints and logs have the whole." : "No points yet: they come with the first steps."),
    h(
      "div",
      { class: "charts" },
      isRl && chart({ name: "Return, mean of the last 100 episodes", xName: "environment step", series: [{ name: "return", points: returns }], width }),
      one(isRl ? "Loss of the learner's batches" : "Training loss (mean of each step's batch)", "loss"),
      !isRl && one("Training accuracy (share of each step's batch)", "accuracy"),
      one("Samples a second", "samples_per_second"),
    ),
    points.length > 0 && values(points, isRl),
  );
}

/** A dozen of the points, for those who read rather than look. */
function values(points, isRl) {
  const every = Math.max(1, Math.floor(points.length / 12));
  const shown = points.filter((_, at) => at % every === 0 || at === points.length - 1);
  const cells = (point) => [String(point.step), figure(point.loss), isRl ? figure(point.episode_return) : figure(point.accuracy), figure(point.samples_per_second)];
  const headings = ["Step", "Training loss", isRl ? "Return" : "Training accuracy", "Samples a second"];
  return h("details", null, h("summary", null, "Values"), table("Values", headings, shown.map((point) => ({ key: `v${point.step}`, cells: cells(point) }))));
}

function state(job) {
  const { progress, serves, exec } = job;
  return [
    ["Owner", job.owner],
    ["Submitted", moment(job.submitted_ms)],
    job.started_ms && ["Started", moment(job.started_ms)],
    job.ended_ms && ["Ended", `${moment(job.ended_ms)}, after ${duration(job.ended_ms - (job.started_ms ?? job.submitted_ms))}`],
    ["Generation", `g${job.generation}`],
    ["World sizes", job.world_sizes.join(", ") || "–"],
    ["Recoveries", String(job.recoveries)],
    ["Failures since it got further", String(job.failures)],
    job.preemptions > 0 && ["Made room", count(job.preemptions, "time")],
    ["Priority", String(job.priority)],
    progress && !serves && !exec && ["Training loss of the last report", figure(progress.loss)],
    progress && !serves && !exec && ["A step takes", `${figure(progress.compute_ms)} ms compute, ${figure(progress.exchange_ms)} ms exchange, ${figure(progress.apply_ms)} ms apply`],
    serves && ["Serves", `${serves.model} (${serves.task}, ${serves.weights}, ${serves.precision})`],
    exec && ["Restarts of its command", `${exec.restarts} of ${exec.attempts} attempts`],
  ];
}

/** What was measured on samples that training never saw stands beside what the last batch gave, each by its name. */
function outcome(job) {
  const { step, loss, samples, skipped, weights_blake3: weights, metrics } = job.outcome;
  return [
    ["Steps", String(step)],
    ["Samples", samples.toLocaleString("en")],
    !job.exec && ["Training loss of the last step", figure(loss)],
    ...Object.entries(metrics).map(([name, value]) => [`Held out: ${name}`, figure(value)]),
    skipped > 0 && ["Steps left out", String(skipped)],
    ["weights_blake3", h("code", null, weights)],
  ];
}

function placement(job) {
  const slow = new Map(job.slow.map(({ rank, times }) => [rank, times]));
  const on = Map.groupBy(job.placement, ({ node }) => node);
  const named = (rank) => (slow.has(rank) ? `${rank} (${figure(slow.get(rank))} times as slow as the others)` : String(rank));
  const row = ([node, ranks]) => ({ key: node, cells: [nodeLink(node), ranks.map(({ rank }) => named(rank)).join(", ")] });
  return table("Placement", ["Node", "Ranks"], [...on].map(row));
}

const checkpoint = (it) => ({
  key: `c${it.step}-${it.generation}`,
  cells: [String(it.step), `g${it.generation}`, String(it.shards), bytes(it.bytes), moment(it.committed_ms), it.pinned ? "yes" : "no", h("td", null, h("code", null, it.uri))],
});

export const actions = {
  cancel: (id) => post(`/v1/jobs/${id}/cancel`),
};

export const forms = {
  scale: (id, form) => post(`/v1/jobs/${id}/scale`, { ranks: Number(form.get("ranks")) }),
};
