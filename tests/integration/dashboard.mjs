// What a person does with the dashboard, in Chromium and by keyboard. Started by dashboard.rs; waits for conditions, never for a time.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const { STOKE_URL: url, STOKE_PACKAGES: packages, STOKE_PICTURES: pictures, STOKE_SPEC: spec } = process.env;
const [node, coordinator] = [process.env.STOKE_NODE, process.env.STOKE_COORDINATOR].map(Number);

/** Two loaded cores run a cluster and a browser. */
const LIMIT_MS = 60_000;
const TABS_MAX = 60;

const load = createRequire(join(packages, "package.json"));
const { chromium } = load("playwright-core");
const axe = readFileSync(load.resolve("axe-core/axe.min.js"), "utf8");

const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 860 }, colorScheme: "light", reducedMotion: "reduce" });
page.setDefaultTimeout(LIMIT_MS);
const devtools = await page.context().newCDPSession(page);
let isAway = false;
const complaints = [];
page.on("pageerror", (error) => complaints.push(error.stack));
page.on("console", (message) => {
  // The browser itself notes each answer that is an error; while the coordinator is away there are some.
  if (["error", "warning"].includes(message.type()) && !isAway) complaints.push(message.text());
});

const text = (words) => page.waitForFunction((words) => document.body.innerText.includes(words), words);

/** Presses tab until it is there, as somebody without a mouse does. */
async function reach(target) {
  await target.waitFor();
  for (let tabs = 0; tabs < TABS_MAX; tabs += 1) {
    if (await target.evaluate((element) => element === document.activeElement).catch(() => false)) return;
    await page.keyboard.press("Tab");
  }
  assert.fail(`tab does not reach ${target}`);
}

async function press(target, key = "Enter") {
  await reach(target);
  await page.keyboard.press(key);
}

const role = (name, words) => page.getByRole(name, { name: words, exact: true });

async function open(name) {
  await press(role("link", name));
  await page.waitForFunction((name) => document.title.startsWith(name) && !document.querySelector("main").innerText.includes("Loading"), name);
}

/** What axe finds, in both themes, and a picture of each. */
async function look(name) {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    // The page's own policy lets in no script but its own.
    if (!(await page.evaluate(() => Boolean(globalThis.axe)))) await devtools.send("Runtime.evaluate", { expression: axe });
    const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
    const violations = found.violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html, failureSummary }) => `${html} ${failureSummary}`).join("; ")}`);
    assert.deepEqual(violations, [], `axe on ${name}, ${colorScheme}`);
    await page.screenshot({ path: join(pictures, `${name}-${colorScheme}.png`) });
  }
  await page.emulateMedia({ colorScheme: "light" });
}

const points = () => page.evaluate(() => Math.max(0, ...[...document.querySelectorAll("figure path.c0")].map((path) => path.getAttribute("d").split(/[ML]/).length - 1)));

const grows = (least) => page.waitForFunction((least) => [...document.querySelectorAll("figure path.c0")].some((path) => path.getAttribute("d").split(/[ML]/).length - 1 > least), least);

await page.goto(url);
await text("3 of 3 nodes up");
assert.equal(await page.evaluate(() => location.hash), "#/", "the key is not left in the address");

// The first stop is over the header.
await page.keyboard.press("Tab");
assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
await page.keyboard.press("Enter");
assert.equal(await page.evaluate(() => document.activeElement.id), "main");

// A spec that is wrong is answered on the page, at its place.
await open("Submit");
await reach(page.getByLabel("Spec"));
await page.keyboard.insertText("name = 1");
isAway = true;
await press(role("button", "Submit job"));
await text("Not done: spec: line 1");
isAway = false;
await look("submit");
await reach(page.getByLabel("Spec"));
await page.keyboard.press("ControlOrMeta+A");
await page.keyboard.insertText(spec);
await press(role("button", "Submit job"));
await page.waitForFunction(() => location.hash === "#/jobs/job-1");

// Its curve grows while one looks, and what has the focus keeps it.
await grows(2);
await reach(role("button", "Open logs"));
await grows(await points());
assert.equal(await page.evaluate(() => document.activeElement.textContent), "Open logs");
assert.ok(await page.evaluate(() => [...document.querySelectorAll("figure text")].every((text) => parseFloat(getComputedStyle(text).fontSize) >= 12)));
assert.equal(await page.locator("line.flag").count(), 0, "nothing has happened to it yet");

// Logs of all ranks, then of one.
await page.keyboard.press("Enter");
const lines = page.locator("pre[role=log]");
await page.waitForFunction(() => /rank 0 \|/.test(document.querySelector("pre[role=log]").textContent));
await reach(page.locator("select[name=rank]"));
await page.keyboard.type("rank 1");
await press(role("button", "Open logs"));
await page.waitForFunction(() => /^(g\d+ rank 1 \|.*\n)+$/.test(document.querySelector("pre[role=log]").textContent));
assert.ok((await lines.textContent()).length > 0);

// A node is gone: the event, the alert, and the job goes on without it.
process.kill(node, "SIGSTOP");
await open("Events");
await page.waitForFunction(() => [...document.querySelectorAll("td")].some((cell) => cell.innerText.includes("is lost")));
await look("events");
await reach(page.locator("table[role=grid] [tabindex='0']"));
const cell = () => page.evaluate(() => {
  const cell = document.activeElement.closest("td");
  return [cell.parentElement.rowIndex, cell.cellIndex];
});
await page.keyboard.press("ArrowDown");
await page.keyboard.press("ArrowRight");
const [row, column] = await cell();
await page.keyboard.press("ArrowUp");
assert.deepEqual(await cell(), [row - 1, column]);
await open("Overview");
await text("2 of 3 nodes up");
await page.getByLabel("Alerts").getByText("node-3").waitFor();
await look("overview");
await open("Nodes");
await page.waitForFunction(() => document.querySelectorAll("tbody tr").length === 3);
await look("nodes");
process.kill(node, "SIGCONT");
await open("Serving");
await look("serving");
await open("Jobs");
await page.waitForFunction(() => /\b1 job\b/.test(document.querySelector("main [role=status]").innerText));
await look("jobs");
await press(role("link", "job-1"));
await page.waitForFunction(() => document.title.startsWith("job-1"));
await page.waitForFunction(() => document.querySelector("[aria-label=Timeline]")?.innerText.includes("ended: "));
await grows(await points());
await page.locator("line.flag").first().waitFor({ state: "attached" });
await look("job");

// The coordinator stands: the page says so, and is back by itself.
isAway = true;
process.kill(coordinator, "SIGSTOP");
await text("running jobs go on");
process.kill(coordinator, "SIGCONT");
await page.locator("#away").waitFor({ state: "hidden" });
isAway = false;

await reach(page.getByLabel("Theme"));
await page.keyboard.type("dark");
await page.waitForFunction(() => document.documentElement.dataset.theme === "dark");

// The first answer to the question is no.
await press(role("button", "Cancel job"));
await page.getByRole("dialog").waitFor();
await page.keyboard.press("Escape");
await page.getByRole("dialog").waitFor({ state: "detached" });
await press(role("button", "Cancel job"));
await press(role("button", "Yes"));
await page.waitForFunction(() => document.querySelector("main .badge").textContent === "cancelled");
assert.equal(await role("button", "Cancel job").count(), 0);
assert.deepEqual(complaints, []);
await browser.close();
console.log("done");
