// The way to the API: the key of this session, questions with a time limit, refusals in words, streams of lines.

const ANSWER_MS_MAX = 6000;

const key = (() => {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem("key", given);
    history.replaceState(null, "", "/#/");
  }
  return sessionStorage.getItem("key");
})();

/** What was said instead of an answer. `away`: nobody was there to say it. */
export class Refusal extends Error {
  constructor({ code, message, mend, away = false }) {
    super(message);
    Object.assign(this, { code, mend, away });
  }
}

const headers = (more) => ({ ...(key ? { authorization: `Bearer ${key}` } : {}), ...more });

async function refusal(response) {
  const fallback = { code: "unavailable", message: `the answer was ${response.status}`, mend: "try again" };
  const { error = fallback } = await response.json().catch(() => ({}));
  return new Refusal({ ...error, away: response.status === 503 });
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { signal: AbortSignal.timeout(ANSWER_MS_MAX), ...options, headers: headers(options.headers) });
  } catch {
    const mend = "see whether `stoke dashboard` and the coordinator run";
    throw new Refusal({ code: "unavailable", message: "there is no answer", mend, away: true });
  }
  if (!response.ok) throw await refusal(response);
  return response.json().catch(() => {
    throw new Refusal({ code: "unavailable", message: "the answer was cut off", mend: "try again", away: true });
  });
}

export const get = (path) => ask(path);

export const post = (path, body, kind = "application/json", more = {}) =>
  ask(path, { method: "POST", headers: { "content-type": kind, ...more }, body: kind === "application/json" ? JSON.stringify(body ?? {}) : body });

/** Objects, one a line, until the stream ends or `signal` does. */
export async function* lines(path, signal) {
  const response = await fetch(path, { signal, headers: headers() });
  if (!response.ok) throw await refusal(response);
  let rest = "";
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
    const parts = (rest + piece).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}
