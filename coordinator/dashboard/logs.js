// What a job's ranks print: opened when asked for, followed while it is open, bounded. Lines fill themselves: a page that is drawn anew leaves them alone.

import { lines } from "./api.js";
import { h } from "./dom.js";

const TAIL = 200;
const LINES_MAX = 2000;

let reading = null;

/** Ends what is being read. */
export function stop() {
  reading?.abort();
  reading = null;
}

export function logs(job) {
  const ranks = [...new Set(job.placement.map(({ rank }) => rank))].sort((a, b) => a - b);
  return h(
    "section",
    { id: "logs", "aria-label": "Logs", "data-key": `logs-${job.job}` },
    h("h2", null, "Logs"),
    h(
      "form",
      { class: "row", "data-logs": job.job },
      h("label", null, "Rank ", h("select", { name: "rank" }, h("option", { value: "" }, "all ranks"), ranks.map((rank) => h("option", { value: rank }, `rank ${rank}`)))),
      h("label", null, h("input", { type: "checkbox", name: "follow", checked: true }), " Follow"),
      h("button", { type: "submit" }, "Open logs"),
      h("span", { role: "status", "data-own": true }),
    ),
    h("pre", { role: "log", "aria-label": "Lines", "aria-live": "off", tabindex: 0, hidden: true, "data-own": true }),
  );
}

/** The form was sent: reads anew. */
export async function open(form) {
  stop();
  const mine = (reading = new AbortController());
  const [shown, said] = [form.parentElement.querySelector("pre"), form.querySelector("[role=status]")];
  const asked = new FormData(form);
  const query = new URLSearchParams({ tail: TAIL, follow: asked.get("follow") === "on" });
  if (asked.get("rank")) query.set("rank", asked.get("rank"));
  shown.replaceChildren();
  shown.hidden = false;
  said.textContent = "reading";
  let many = 0;
  const add = adder(shown);
  try {
    for await (const line of lines(`/v1/jobs/${form.dataset.logs}/logs?${query}`, mine.signal)) {
      many += 1;
      add(line.error ? `(${line.error})` : `${line.generation === undefined ? "" : `g${line.generation} `}rank ${line.rank} | ${line.line}`);
      if (many === 1) said.textContent = asked.get("follow") === "on" ? "following" : "reading";
    }
    said.textContent = many === 0 ? "nothing was printed" : "that is all";
  } catch (error) {
    if (!mine.signal.aborted) said.textContent = `${error.message}: open the logs again`;
  }
}

/** Draws what has come since the last picture at once. */
function adder(shown) {
  let waiting = [];
  const draw = () => {
    const isAtEnd = shown.scrollHeight - shown.scrollTop - shown.clientHeight < 40;
    shown.append(...waiting.map((line) => `${line}\n`));
    waiting = [];
    while (shown.childNodes.length > LINES_MAX) shown.firstChild.remove();
    if (isAtEnd) shown.scrollTop = shown.scrollHeight;
  };
  return (line) => {
    if (waiting.length === 0) requestAnimationFrame(draw);
    waiting.push(line);
  };
}
