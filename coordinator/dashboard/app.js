// The dashboard: what the API says, drawn. Loads nothing from elsewhere and keeps nothing but the key of this session.

const key = (() => {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem("key", given);
    history.replaceState(null, "", "/");
  }
  return sessionStorage.getItem("key");
})();

async function ask(path) {
  const response = await fetch(path, { headers: key ? { authorization: `Bearer ${key}` } : {} });
  const body = await response.json();
  if (!response.ok) throw new Error(`${body.error.message} (${body.error.mend})`);
  return body;
}

function table(caption, headings, rows) {
  const made = document.createElement("table");
  made.createCaption().textContent = caption;
  const head = made.createTHead().insertRow();
  for (const heading of headings) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = heading;
    head.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const text of row) line.insertCell().textContent = text ?? "";
  }
  return made;
}

async function draw() {
  const main = document.querySelector("main");
  try {
    const [{ nodes }, { jobs }] = await Promise.all([ask("/v1/nodes"), ask("/v1/jobs")]);
    main.replaceChildren(
      table("Nodes", ["node", "name", "state"], nodes.map((node) => [node.node, node.name, node.state])),
      table("Jobs", ["job", "name", "state"], jobs.map((job) => [job.job, job.name, job.state])),
    );
  } catch (error) {
    main.textContent = error.message;
  }
}

draw();
setInterval(draw, 2000);
