// Elements, and how a picture that is on the screen becomes a newer one: what is the same stays, so that focus, selection and scrolling stay too.

const SVG = "http://www.w3.org/2000/svg";
/** Attributes that belong to the screen, not to the picture. */
const KEPT = new Set(["tabindex", "open"]);

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const keyOf = (node) => node.dataset?.key;

const isAlike = (old, made) =>
  old.nodeType === made.nodeType && old.nodeName === made.nodeName && keyOf(old) === keyOf(made) && old.id === made.id;

/** Makes the children of `old` those of `made`. */
export function patch(old, made) {
  const wanted = [...made.childNodes];
  const keys = new Set(wanted.map(keyOf).filter(Boolean));
  for (const child of [...old.childNodes]) if (keyOf(child) && !keys.has(keyOf(child))) child.remove();
  let at = old.firstChild;
  for (const next of wanted) {
    let found = at;
    if (keyOf(next)) {
      while (found && keyOf(found) !== keyOf(next)) found = found.nextSibling;
    }
    if (found && isAlike(found, next)) {
      if (found !== at) old.insertBefore(found, at);
      become(found, next);
      at = found.nextSibling;
    } else if (at && !keyOf(at) && !keyOf(next)) {
      const after = at.nextSibling;
      at.replaceWith(next);
      at = after;
    } else {
      old.insertBefore(next, at);
    }
  }
  while (at) {
    const after = at.nextSibling;
    at.remove();
    at = after;
  }
}

function become(old, made) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== made.data) old.data = made.data;
    return;
  }
  // What fills itself (logs) is left alone.
  if (old.hasAttribute("data-own")) return;
  for (const { name } of [...old.attributes]) {
    if (!made.hasAttribute(name) && !KEPT.has(name)) old.removeAttribute(name);
  }
  for (const { name, value } of made.attributes) {
    if (old.getAttribute(name) !== value && !KEPT.has(name)) old.setAttribute(name, value);
  }
  patch(old, made);
}

/** A table that arrow keys walk through (`grid.js`). A row is `{ key, cells }`, or `{ key, cells, grave }`. */
export function table(caption, headings, rows, nothing = "None.") {
  if (rows.length === 0) return h("p", { class: "quiet" }, nothing);
  const head = headings.map((heading) => h("th", { scope: "col" }, heading));
  const lines = rows.map(({ key, cells, grave }) =>
    h(
      "tr",
      { "data-key": key, class: grave ? "grave" : null },
      cells.map((cell) => {
        const isDrawn = cell instanceof Node && cell.nodeName === "TD";
        return isDrawn ? cell : h("td", null, cell ?? "");
      }),
    ),
  );
  return h(
    "div",
    { class: "scroll" },
    h("table", { role: "grid", "aria-label": caption }, h("thead", null, h("tr", null, head)), h("tbody", null, lines)),
  );
}

export const facts = (pairs) =>
  h("dl", null, pairs.filter(Boolean).map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));

export const section = (heading, ...children) => h("section", { "aria-label": heading, "data-key": heading }, h("h2", null, heading), children);

export const badge = (state) => h("span", { class: `badge ${state}` }, state);

export const link = (href, text) => h("a", { href }, text);

export const jobLink = (job) => link(`#/jobs/${job}`, job);

export const nodeLink = (node) => link(`#/nodes/${node}`, node);
