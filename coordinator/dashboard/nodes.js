// Nodes: what they have, how hot they run, who is on them; draining.

import { get, post } from "./api.js";
import { badge, h, jobLink, section, table } from "./dom.js";
import { bytes, count, duration, percent } from "./format.js";
import { may } from "./live.js";

export const title = ([node]) => (node ? node : "Nodes");

export const load = () => get("/v1/nodes");

/** A share as a number on a tint: never by colour alone. */
function heat(part, text) {
  const level = Math.max(0, Math.min(4, Math.floor(part * 5)));
  return h("td", { class: `heat${level}` }, text);
}

/** Whether there was a heartbeat. */
const isTold = (node) => node.state !== "lost" && node.cpu_load !== null && node.memory_used_bytes > 0;

function device(gpu) {
  if (gpu.busy === null) return `${gpu.name}, ${bytes(gpu.memory_bytes)}`;
  return `${gpu.name}: ${percent(gpu.busy)} busy, ${bytes(gpu.memory_used_bytes)} of ${bytes(gpu.memory_bytes)}`;
}

export function draw({ nodes }, [only]) {
  const shown = only ? nodes.filter((node) => node.node === only) : nodes;
  const rows = shown.map((node) => ({
    key: node.node,
    grave: ["silent", "lost", "quarantined"].includes(node.state),
    cells: [
      h("td", null, node.node, h("br"), h("span", { class: "quiet" }, node.name)),
      h("td", null, badge(node.state), node.reason && h("div", { class: "quiet" }, node.reason), node.state !== "up" && node.silent_ms > 5000 && h("div", { class: "quiet" }, `silent for ${duration(node.silent_ms)}`)),
      isTold(node) ? heat(node.cpu_load, `${percent(node.cpu_load)} of ${count(node.cpus, "CPU")}`) : `– of ${count(node.cpus, "CPU")}`,
      isTold(node) ? heat(node.memory_used_bytes / Math.max(1, node.memory_bytes), `${bytes(node.memory_used_bytes)} of ${bytes(node.memory_bytes)}`) : `– of ${bytes(node.memory_bytes)}`,
      node.temperature_c === null ? "–" : heat((node.temperature_c - 40) / 60, `${Math.round(node.temperature_c)} °C`),
      node.gpus.length === 0 ? "–" : heat(Math.max(...node.gpus.map((gpu) => gpu.busy ?? 0)), node.gpus.map((gpu) => h("div", null, device(gpu)))),
      [count(node.cpus_used, "CPU"), bytes(node.memory_reserved_bytes), node.gpus.length > 0 && count(node.gpus_used, "GPU")].filter(Boolean).join(", "),
      h("td", null, node.ranks.length === 0 ? "none" : node.ranks.map(({ job, rank }) => h("div", null, jobLink(job), ` rank ${rank}`))),
      h("td", null, Object.entries(node.labels).map(([key, value]) => h("div", null, `${key}=${value}`))),
      h("td", null, may("nodes") && action(node)),
    ],
  }));
  const headings = ["Node", "State", "CPU", "Memory", "Hottest sensor", "GPUs", "Reserved by jobs", "Ranks", "Labels", "Action"];
  return [
    section("Devices and heat", table("Nodes", headings, rows, "None: `stoke node` on a machine joins it.")),
    only && h("p", null, h("a", { href: "#/nodes" }, "All nodes")),
  ];
}

function action(node) {
  const verb = node.drain ? "undrain" : "drain";
  return node.state !== "lost" && h("button", { "data-do": verb, "data-of": node.node, "aria-label": `${verb} ${node.node}` }, verb === "drain" ? "Drain" : "Undrain");
}

export const actions = {
  drain: (node) => post(`/v1/nodes/${node}/drain`),
  undrain: (node) => post(`/v1/nodes/${node}/undrain`),
};
