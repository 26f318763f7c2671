// What has happened, newest first.

import { h } from "./dom.js";
import { count } from "./format.js";
import { live } from "./live.js";
import * as parts from "./parts.js";

const KINDS = ["all events", "losses and failures", "of jobs", "of nodes"];

const wanted = { kind: KINDS[0], words: "" };

export const title = () => "Events";

export const load = async () => ({});

function isWanted(event) {
  const fits = [true, event.grave, event.job !== null, event.node !== null][KINDS.indexOf(wanted.kind)];
  return fits && `${event.text} ${event.job ?? ""} ${event.node ?? ""}`.toLowerCase().includes(wanted.words.toLowerCase());
}

export function draw() {
  const found = live.events.filter(isWanted);
  return [
    h(
      "form",
      { class: "row", role: "search" },
      h("label", null, "Kind ", h("select", { "data-input": "kind" }, KINDS.map((kind) => h("option", null, kind)))),
      h("label", null, "Words ", h("input", { type: "search", "data-input": "words", placeholder: "job-7, killed" })),
      h("span", { role: "status" }, count(found.length, "event")),
    ),
    parts.events("Events", parts.newest(found, found.length)),
    h("p", { class: "quiet" }, "The newest 256. Committed checkpoints stand with their jobs; a job's own timeline has all of its events."),
  ];
}

export const inputs = {
  kind: (value) => (wanted.kind = value),
  words: (value) => (wanted.words = value),
};

export function begin(main) {
  main.querySelector("[data-input=kind]").value = wanted.kind;
  main.querySelector("[data-input=words]").value = wanted.words;
}
