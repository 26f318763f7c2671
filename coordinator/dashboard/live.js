// The pulse: asks for what has happened, tells pages to look again, waits longer and longer while nobody answers. Owns what is known of the connection.

import { Refusal, get } from "./api.js";

const EVERY_MS = 1000;
const WAIT_MS_MAX = 15000;
/** As many as the coordinator keeps. */
const EVENTS_MAX = 256;

export const live = { cluster: null, events: [], away: null, retryAt: 0 };

let wake = () => {};
let heard = 0;

/** A function that runs `work`, one at a time; asked while it runs, it runs once more after that, so that no change is dropped. */
export function coalesced(work) {
  let running = null;
  let again = false;
  const turn = async () => {
    do {
      again = false;
      await work();
    } while (again);
  };
  return () => {
    if (running) again = true;
    else running = turn().finally(() => (running = null));
    return running;
  };
}

/** Looks at once. */
export function hurry() {
  wake();
}

async function beat() {
  const last = live.events.at(-1)?.index ?? 0;
  const { events, ...cluster } = await get(`/v1/pulse?after=${last}`);
  live.cluster = cluster;
  const numbered = events.map((event) => ({ ...event, number: (heard += 1) }));
  live.events = [...live.events, ...numbered].slice(-EVENTS_MAX);
  return last === 0 ? [] : events;
}

/** Calls `look` with what is new after each answer, and `changed` when somebody is away or back. */
export async function run(look, changed) {
  let wait = EVERY_MS;
  document.addEventListener("visibilitychange", () => document.hidden || hurry());
  for (;;) {
    const began = performance.now();
    try {
      await look(await beat());
      if (live.away) changed((live.away = null));
      // A cluster that takes long to answer is asked less.
      wait = Math.max(EVERY_MS, 4 * (performance.now() - began));
    } catch (error) {
      if (!(error instanceof Refusal)) console.error(error);
      wait = Math.min(live.away ? wait * 2 : EVERY_MS, WAIT_MS_MAX);
      live.retryAt = Date.now() + wait;
      changed((live.away = error));
    }
    await new Promise((resolve) => {
      wake = resolve;
      if (!document.hidden || live.away) setTimeout(resolve, wait);
    });
  }
}

/** What this user's role allows. The coordinator decides; this only leaves out what it would refuse. */
export function may(verb, job) {
  const [, role, name] = live.cluster?.you?.split("/") ?? [];
  const isStrong = role === "admin" || role === "operator";
  if (verb === "nodes" || (verb === "change" && job?.owner !== name)) return isStrong;
  return isStrong || role === "submitter";
}
