// How the cluster is, what needs a person, what waits and why.

import { get } from "./api.js";
import { h, jobLink, link, section } from "./dom.js";
import { count, moment } from "./format.js";
import { live } from "./live.js";
import * as parts from "./parts.js";

const ENDED = 8;
const EVENTS = 8;

export const title = () => "Overview";

export async function load() {
  const [{ nodes }, { jobs }] = await Promise.all([get("/v1/nodes"), get(`/v1/jobs?ended=${ENDED}`)]);
  return { nodes, jobs };
}

export function draw({ nodes, jobs }) {
  const { cluster } = live;
  const waiting = jobs.filter((job) => job.state === "queued");
  const found = parts.alerts(nodes, jobs);
  const tile = (number, words, href) => h("a", { class: "tile", href }, h("strong", null, number), ` ${words}`);
  return [
    h(
      "div",
      { class: "tiles" },
      tile(`${cluster.nodes_up} of ${cluster.nodes}`, cluster.nodes === 1 ? "node up" : "nodes up", "#/nodes"),
      tile(cluster.jobs_running, cluster.jobs_running === 1 ? "job running" : "jobs running", "#/jobs"),
      tile(cluster.jobs_queued, cluster.jobs_queued === 1 ? "job waiting" : "jobs waiting", "#/jobs"),
      tile(cluster.ranks_slow, cluster.ranks_slow === 1 ? "slow rank" : "slow ranks", "#/jobs"),
    ),
    section("Alerts", found.length === 0 ? h("p", { class: "quiet" }, "None: nothing needs a person.") : h("ul", { class: "alerts" }, found.map((words) => h("li", null, words)))),
    waiting.length > 0 && section("Why jobs wait", h("ul", null, waiting.map((job) => h("li", { "data-key": job.job }, jobLink(job.job), ` (${job.name}): ${job.reason || "it will be placed in a moment"}`)))),
    section("Jobs", parts.jobs("Jobs", jobs, ["None yet: ", link("#/submit", "submit one"), "."])),
    section("Newest events", parts.events("Newest events", parts.newest(live.events, EVENTS))),
    h("p", { class: "quiet" }, `stoke ${cluster.version}, epoch ${cluster.epoch}, ${count(cluster.index, "journal entry").replace("entrys", "entries")}, as of ${moment(cluster.now_ms)}`),
  ];
}
