// A spec becomes a job: the same text sent twice is one job.

import { post } from "./api.js";
import { h } from "./dom.js";
import { may } from "./live.js";

const BYTES_MAX = 1 << 20;

/** What the next submission is known by, and for which text. */
let submission = { text: null, key: null };

export const title = () => "Submit a job";

export const load = async () => ({});

export function draw() {
  if (!may("submit")) return [h("p", null, "Your role may look, not submit: ask an admin for a token of another role.")];
  return [
    h("p", null, "A job spec in TOML (docs/spec.md has every key). Paths are those that nodes see. Without ", h("code", null, "[resources] ranks"), " a job gets a rank a node."),
    h(
      "form",
      { "data-submit": "submit", class: "spec" },
      h("label", { for: "spec" }, "Spec"),
      h("textarea", { id: "spec", name: "spec", rows: 22, spellcheck: "false", required: true, placeholder: 'name = "digits"\ntrainer = "digits"\n…' }),
      h("div", { class: "row" }, h("button", { type: "submit" }, "Submit job"), h("label", null, "or from a file ", h("input", { type: "file", "data-file": "spec", accept: ".toml,text/plain" }))),
    ),
  ];
}

const randomKey = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export const forms = {
  async submit(_, form) {
    const text = form.get("spec");
    // After an answer that did not come, the same text is the same job.
    if (submission.text !== text) submission = { text, key: `dashboard-${randomKey()}` };
    const { job } = await post("/v1/jobs", text, "application/toml", { "idempotency-key": submission.key });
    submission = { text: null, key: null };
    location.hash = `#/jobs/${job}`;
    return { said: `${job} was submitted` };
  },
};

/** A file's text goes into the form, to be looked at first. */
export async function take(file, form) {
  if (file.size > BYTES_MAX) throw new Error(`${file.name} has ${file.size} bytes: a spec has a megabyte at most`);
  form.elements.spec.value = await file.text();
}
