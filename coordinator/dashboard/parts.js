// What several pages show alike: jobs in a line, alerts, events.

import { badge, h, jobLink, nodeLink, table } from "./dom.js";
import { count, duration, figure, moment, percent } from "./format.js";
import { live } from "./live.js";

export const now = () => live.cluster?.now_ms ?? Date.now();

export const hasEnded = (job) => ["succeeded", "failed", "cancelled"].includes(job.state);

/** What a job does, in a word or two. */
export const kind = (job) => (job.serves ? `serves ${job.serves.model}` : job.exec ? "command" : job.trainer);

export function progress(job) {
  const { step, steps } = job.progress ?? {};
  if (job.outcome) return `step ${job.outcome.step}`;
  if (!steps) return "–";
  const done = `step ${step} of ${steps}`;
  return [h("progress", { max: steps, value: step, "aria-label": `progress of ${job.job}` }), ` ${done}, ${percent(step / steps)}`];
}

/** The figure that people look for first. */
export function result(job) {
  const rl = job.progress?.rl;
  if (rl?.episode_return !== null && rl?.episode_return !== undefined) return `return ${figure(rl.episode_return)}`;
  if (job.serves?.load) return `${figure(job.serves.load.tokens_per_second)} tokens/s`;
  const loss = job.outcome?.loss ?? job.progress?.loss;
  return loss === null || loss === undefined || job.exec ? "–" : `loss ${figure(loss)}`;
}

const ranks = (job) => job.world_sizes.at(-1) ?? job.placement.length;

export const jobs = (caption, list, nothing) =>
  table(
    caption,
    ["Job", "Name", "What", "State", "Ranks", "Progress", "Result", "Owner", "Age"],
    list.map((job) => ({
      key: job.job,
      grave: job.state === "failed",
      cells: [jobLink(job.job), job.name, kind(job), badge(job.state), String(ranks(job)), h("td", null, progress(job)), result(job), job.owner, duration(now() - job.submitted_ms)],
    })),
    nothing,
  );

/** Of the whole cluster, or of one job. */
export const events = (caption, list, isOfOne = false) =>
  table(
    caption,
    isOfOne ? ["When", "What"] : ["When", "What", "Of"],
    list.map((event) => ({
      key: `${event.number ?? event.index}-${event.text}`,
      grave: event.grave,
      cells: [
        h("td", null, h("time", { datetime: new Date(event.at_ms).toISOString() }, moment(event.at_ms))),
        h("td", null, event.grave && h("strong", null, "! "), event.text),
        ...(isOfOne ? [] : [event.job ? jobLink(event.job) : event.node ? nodeLink(event.node) : "cluster"]),
      ],
    })),
    "Nothing has happened yet.",
  );

/** The newest first. */
export const newest = (list, most) => list.slice(-most).reverse();

/** What a person should look at. */
export function alerts(nodes, jobs) {
  const found = [];
  for (const node of nodes) {
    if (node.state === "silent" || node.state === "lost") {
      found.push([nodeLink(node.node), ` (${node.name}) is ${node.state}: not heard of for ${duration(node.silent_ms)}`]);
    } else if (node.state === "quarantined") {
      found.push([nodeLink(node.node), ` (${node.name}) is in quarantine: ${node.reason}`]);
    } else if (node.drain?.overdue) {
      found.push([nodeLink(node.node), ` (${node.name}): its drain is overdue`]);
    }
    if (node.temperature_c >= 95) found.push([nodeLink(node.node), ` (${node.name}) runs at ${Math.round(node.temperature_c)} °C`]);
  }
  for (const job of jobs) {
    if (job.state === "failed") found.push([jobLink(job.job), ` (${job.name}) has failed: ${job.reason}`]);
    if (job.state === "recovering") found.push([jobLink(job.job), ` (${job.name}) recovers: ${job.reason}`]);
    if (job.slow.length > 0) found.push([jobLink(job.job), ` (${job.name}) has ${count(job.slow.length, "rank")} slower than the others`]);
    if (job.serves && job.state === "running" && !job.serves.ready) found.push([jobLink(job.job), ` serves ${job.serves.model}, and does not answer yet`]);
  }
  return found;
}
