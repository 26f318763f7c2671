// Models that are served: who answers for them, under which revision, how fast; the curves are of this page's own looks.

import { get } from "./api.js";
import { chart, widthIn } from "./chart.js";
import { badge, h, jobLink, section, table } from "./dom.js";
import { count, figure } from "./format.js";
import { live } from "./live.js";

const LOOKS_MAX = 600;

/** Of each model: `{ at, tokens, p50, p99, waiting }`, one a look. */
const seen = new Map();

export const title = () => "Serving";

export async function load() {
  const [{ jobs }, { nodes }] = await Promise.all([get("/v1/jobs?ended=0"), get("/v1/nodes")]);
  const models = Map.groupBy(jobs.filter((job) => job.serves), (job) => job.serves.model);
  for (const [model, list] of models) note(model, list);
  return { models, nodes };
}

const loads = (list) => list.map((job) => job.serves.load).filter(Boolean);

const most = (values) => (values.length === 0 ? null : Math.max(...values));

function note(model, list) {
  const all = loads(list);
  const of = (key) => most(all.map((load) => load[key]).filter((value) => value !== null));
  const sum = (key) => all.reduce((sum, load) => sum + (load[key] ?? 0), 0);
  const look = { at: live.cluster.now_ms, tokens: sum("tokens_per_second"), p50: of("first_token_p50_ms"), p99: of("first_token_p99_ms"), waiting: sum("waiting") + (list[0].serves.held ?? 0), running: sum("running") };
  seen.set(model, [...(seen.get(model) ?? []), look].slice(-LOOKS_MAX));
}

export function draw({ models, nodes }) {
  const gateways = nodes.filter((node) => node.gateway).map((node) => h("li", null, h("code", null, node.gateway), ` on ${node.node}`));
  return [
    models.size === 0 && h("p", { class: "quiet" }, "No model is served: `stoke serve` does that."),
    [...models].map(([model, list]) => section(model, words(list), table(`Jobs of ${model}`, ["Job", "Revision", "Requests it gets", "State", "Running", "Waiting", "Tokens a second", "First token, median", "First token, 99 %", "Answers"], list.map(row)), pictures(model))),
    section("Routes", gateways.length === 0 ? h("p", { class: "quiet" }, "No node has a gateway.") : h("ul", null, gateways)),
  ];
}

function words(list) {
  const { replicas, answering, held, scale } = list[0].serves;
  const bounds = scale ? `; scales itself between ${scale.min} and ${scale.max}` : "";
  return h("p", null, `${answering} of ${count(replicas, "replica")} answer${bounds}. ${count(held, "question")} wait at gateways.`);
}

const traffic = (job) => ({ rest: "all that no share takes", share: `a share of ${job.share}`, shadow: "copies, for nobody", leaving: "none: it leaves" })[job.traffic] ?? "–";

function row(job) {
  const { load, weights, precision, ready } = job.serves;
  const ms = (value) => (value === null || value === undefined ? "–" : `${value} ms`);
  const of = (key) => (load ? figure(load[key]) : "–");
  const state = ready ? badge("ready") : badge(job.state === "running" ? "loading" : job.state);
  return {
    key: job.job,
    cells: [jobLink(job.job), `${weights.split("/").at(-1)}, ${precision}`, traffic(job), state, of("running"), of("waiting"), of("tokens_per_second"), ms(load?.first_token_p50_ms), ms(load?.first_token_p99_ms), of("answers")],
  };
}

function pictures(model) {
  const looks = seen.get(model);
  const width = widthIn(document.querySelector("main"));
  const of = (key) => looks.map((look) => [(look.at - looks[0].at) / 1000, look[key]]).filter(([, y]) => y !== null);
  const xName = "seconds since this page looks";
  const draw = (name, series) => chart({ name, xName, series, width });
  return h(
    "div",
    { class: "charts" },
    draw("Tokens a second, of all its jobs", [{ name: "tokens a second", points: of("tokens") }]),
    draw("First token, ms", [{ name: "median", points: of("p50") }, { name: "99 %", points: of("p99") }]),
    draw("Requests", [{ name: "running", points: of("running") }, { name: "waiting", points: of("waiting") }]),
  );
}
