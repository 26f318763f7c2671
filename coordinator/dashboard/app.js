// The dashboard: which page is in sight, and what people do on it. Loads nothing from elsewhere and keeps nothing but the key of this session and the theme.

import { Refusal } from "./api.js";
import { h, patch } from "./dom.js";
import * as events from "./events.js";
import * as grid from "./grid.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import { coalesced, hurry, live, run } from "./live.js";
import * as logs from "./logs.js";
import * as nodes from "./nodes.js";
import * as overview from "./overview.js";
import * as serving from "./serving.js";
import * as submit from "./submit.js";

const main = document.querySelector("#main");
const PAGES = { "": overview, nodes, jobs, serving, events, submit };

/** What the address names. `data` is what its page has loaded. */
let sight = null;

function named() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const page = name === "jobs" && rest[0] ? job : PAGES[name];
  return { page: page ?? overview, name: page ? name : "", rest };
}

const look = coalesced(async () => {
  const asked = sight;
  if (!live.cluster || document.hidden) return;
  try {
    asked.data = await asked.page.load(asked.rest);
    asked.refused = null;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    // Who is away is told above the page, which keeps what it knew.
    if (error.away) throw error;
    asked.refused = error;
  }
  if (asked === sight) draw();
});

function draw() {
  const { page, rest, data, refused } = sight;
  if (!data && !refused) return;
  const made = h("main", null, h("h1", { tabindex: -1 }, page.title(rest)), h("p", { id: "said", role: "alert" }, sight.said ?? ""));
  if (refused) made.append(h("p", { class: "grave" }, `${refused.message}: ${refused.mend}`));
  else made.append(...page.draw(data, rest).flat(Infinity).filter(Boolean));
  const isFirst = !sight.drawn;
  patch(main, made);
  grid.settle(main);
  if (!isFirst) return;
  sight.drawn = true;
  page.begin?.(main);
  if (sight.isGoing) main.querySelector("h1").focus({ preventScroll: true });
}

function go(isGoing) {
  logs.stop();
  sight = { ...named(), isGoing };
  document.title = `${sight.page.title(sight.rest)} · Stoke`;
  for (const link of document.querySelectorAll("nav a")) {
    const isHere = link.getAttribute("href") === `#/${sight.name}`;
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  patch(main, h("main", null, h("h1", { tabindex: -1 }, sight.page.title(sight.rest)), h("p", { class: "quiet" }, "Loading …")));
  if (isGoing) scrollTo(0, 0);
  return look().catch(hurry);
}

/** What came of what somebody did stands at the top of the page, also for those who listen. */
async function act(what) {
  const at = sight;
  const tell = (words) => {
    at.said = words;
    if (at === sight) draw();
  };
  try {
    tell("");
    const done = await what();
    tell(done?.said ?? "Done.");
  } catch (error) {
    tell(error.mend ? `Not done: ${error.message}. ${error.mend}.` : `Not done: ${error.message}`);
  }
  hurry();
}

/** Whether somebody means it. */
function sure(words) {
  const dialog = h(
    "dialog",
    { "aria-label": words },
    h("form", { method: "dialog" }, h("p", null, words), h("div", { class: "row" }, h("button", { value: "yes", class: "grave" }, "Yes"), h("button", { value: "no", autofocus: true }, "No"))),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    }),
  );
}

function listen() {
  main.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-do]");
    if (!button) return;
    const { do: verb, of, sure: words } = button.dataset;
    const action = sight.page.actions[verb];
    if (!words || (await sure(words))) await act(() => action(of));
    button.focus();
  });
  main.addEventListener("submit", (event) => {
    event.preventDefault();
    const form = event.target;
    if (form.dataset.logs) logs.open(form);
    else if (form.dataset.submit) act(() => sight.page.forms[form.dataset.submit](form.dataset.of, new FormData(form)));
  });
  main.addEventListener("input", (event) => {
    const name = event.target.dataset.input;
    if (!name) return;
    sight.page.inputs[name](event.target.value);
    draw();
  });
  main.addEventListener("change", (event) => {
    if (event.target.dataset.file) act(() => submit.take(event.target.files[0], event.target.form).then(() => ({ said: "The file is in the form." })));
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  addEventListener("hashchange", () => go(true));
  addEventListener("resize", () => sight.drawn && draw());
  grid.listen(main);
}

function theme() {
  const choice = document.querySelector("#theme");
  choice.value = localStorage.getItem("theme") ?? "";
  const show = () => (document.documentElement.dataset.theme = choice.value);
  choice.addEventListener("change", () => {
    localStorage.setItem("theme", choice.value);
    show();
  });
  show();
}

/** Tells whether somebody is away; running jobs do not need the coordinator. */
function connection() {
  const told = document.querySelector("#away");
  const { away } = live;
  told.hidden = !away;
  if (!away) return;
  const seconds = Math.max(1, Math.round((live.retryAt - Date.now()) / 1000));
  const words = away instanceof Refusal && !away.away ? `${away.message}: ${away.mend}.` : `The coordinator does not answer (${away.message}). Reconnecting; running jobs go on. What is shown is from before; next try in ${seconds} s.`;
  if (told.textContent !== words) told.textContent = words;
}

function hear(news) {
  document.querySelector("#you").textContent = live.cluster.you.split("/").slice(1).reverse().join(", ");
  const grave = news.filter((event) => event.grave);
  if (grave.length > 0) document.querySelector("#news").textContent = grave.map((event) => `${event.job ?? event.node}: ${event.text}`).join(". ");
}

theme();
listen();
go(false);
run(async (news) => {
  hear(news);
  await look();
}, connection);
