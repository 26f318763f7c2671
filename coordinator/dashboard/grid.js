// Arrow keys in tables, as in the grid pattern of ARIA: one stop of the tab key a table, arrows from cell to cell, Home and End within a row, with Ctrl to the corners.

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

const rowsOf = (grid) => [...grid.tBodies[0].rows];

/** What takes the focus for a cell: what can be done in it, or the cell. */
const target = (cell) => cell.querySelector("a, button") ?? cell;

/** Sees to it that each table has one place that the tab key reaches. */
export function settle(root) {
  for (const grid of root.querySelectorAll("table[role=grid]")) {
    const places = rowsOf(grid).flatMap((row) => [...row.cells].flatMap((cell) => [cell, ...cell.querySelectorAll("a, button")]));
    const held = places.find((place) => place === document.activeElement);
    const before = places.find((place) => place.getAttribute("tabindex") === "0");
    const stop = held ?? before ?? (places[0] && target(places[0]));
    for (const place of places) place.setAttribute("tabindex", place === stop ? "0" : "-1");
  }
}

export function listen(root) {
  root.addEventListener("keydown", (event) => {
    const cell = event.target.closest?.("table[role=grid] tbody td");
    if (!cell || event.altKey || event.metaKey) return;
    const grid = cell.closest("table");
    const rows = rowsOf(grid);
    const [row, column] = [rows.indexOf(cell.parentElement), cell.cellIndex];
    const next = going(event, { row, column, rows });
    if (!next) return;
    event.preventDefault();
    target(next).focus();
  });
  root.addEventListener("focusin", (event) => {
    if (event.target.closest?.("table[role=grid]")) settle(root);
  });
}

function going(event, { row, column, rows }) {
  const step = STEPS[event.key];
  if (step && !event.ctrlKey) return rows[row + step[0]]?.cells[column + step[1]];
  const last = rows.length - 1;
  const line = rows[event.ctrlKey ? (event.key === "Home" ? 0 : last) : row];
  if (event.key === "Home") return line.cells[0];
  if (event.key === "End") return line.cells[line.cells.length - 1];
  return undefined;
}
