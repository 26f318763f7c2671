// All jobs, and those that one looks for.

import { get } from "./api.js";
import { h } from "./dom.js";
import { count } from "./format.js";
import * as parts from "./parts.js";

const ENDED = 200;
const STATES = ["all states", "live", "queued", "running", "succeeded", "failed", "cancelled"];

const wanted = { state: STATES[0], words: "" };

export const title = () => "Jobs";

export const load = () => get(`/v1/jobs?ended=${ENDED}`);

function isWanted(job) {
  const { state, words } = wanted;
  const text = [job.job, job.name, job.owner, parts.kind(job), job.state, job.reason].join(" ").toLowerCase();
  const fits = state === STATES[0] || job.state === state || (state === "live" && !parts.hasEnded(job));
  return fits && words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

export function draw({ jobs }) {
  const found = jobs.filter(isWanted);
  return [
    h(
      "form",
      { class: "row", role: "search" },
      h("label", null, "State ", h("select", { "data-input": "state" }, STATES.map((state) => h("option", null, state)))),
      h("label", null, "Words ", h("input", { type: "search", "data-input": "words", placeholder: "name, owner, reason" })),
      h("span", { role: "status" }, count(found.length, "job")),
    ),
    parts.jobs("Jobs", found, jobs.length === 0 ? ["None yet: ", h("a", { href: "#/submit" }, "submit one"), "."] : "None like that."),
    jobs.filter(parts.hasEnded).length >= ENDED && h("p", { class: "quiet" }, `Of those that have ended, the ${ENDED} newest; \`stoke jobs --all\` has the rest.`),
  ];
}

export const inputs = {
  state: (value) => (wanted.state = value),
  words: (value) => (wanted.words = value),
};

/** A page that is opened again shows what it shows. */
export function begin(main) {
  main.querySelector("[data-input=state]").value = wanted.state;
  main.querySelector("[data-input=words]").value = wanted.words;
}
