// What the browser tests share: a Chromium that knows the test's names and blocks
// third-party cookies; TLS before the daemons; and the master's API.

import { createRequire } from "node:module";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import net from "node:net";
import tls from "node:tls";
import { join } from "node:path";
import assert from "node:assert";

export const told = JSON.parse(process.argv[2]);
const { chromium } = createRequire(join(told.place, "x"))("playwright-core");

/// Every wait has an end; none is what is measured.
export const LIMIT = Number(process.env.COCALC_BROWSER_LIMIT_MS) || 90_000;

const [alphaPort, betaPort, masterPort] = told.tls;
export const MASTER = `https://master.example:${masterPort}`;
/// The master under a name that is of one site with the first host's projects.
export const SAME_SITE = `https://master.alpha.test:${masterPort}`;
export const HOSTS = [`alpha.test:${alphaPort}`, `beta.test:${betaPort}`];

// Terminates TLS, byte by byte, as something before a daemon does.
const behind = [...told.hosts, Number(new URL(told.master).port)];
const secret = { key: readFileSync(told.key), cert: readFileSync(told.certificate) };
const fronts = told.tls.map((port, at) => tls.createServer(secret, (near) => {
  const far = net.connect(behind[at], "127.0.0.1");
  near.pipe(far).pipe(near);
  near.on("error", () => far.destroy()).on("close", () => far.destroy());
  far.on("error", () => near.destroy()).on("close", () => near.destroy());
}).on("tlsClientError", () => {}).listen(port, "127.0.0.1"));

export async function api(method, path, body, token = told.admin) {
  const answer = await fetch(told.master + "/api/v1" + path, {
    method,
    headers: { authorization: "Bearer " + token, "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  assert(answer.ok, `${method} ${path}: ${answer.status} ${text}`);
  return text ? JSON.parse(text) : null;
}

export async function settle(begun) {
  for (;;) {
    const seen = await api("GET", `/operations/${begun.operation_id}/wait?timeout_secs=10`);
    if (seen.state === "running") continue;
    assert.equal(seen.state, "done", JSON.stringify(seen));
    return;
  }
}

export async function project(name, host) {
  const begun = await api("POST", "/projects", host ? { name, host } : { name });
  await settle(begun);
  const { id } = begun.project;
  await settle(await api("POST", `/projects/${id}/start`, {}));
  return id;
}

// An account of its own, with a token of a log-in.
export async function person(name) {
  const { id } = await api("POST", "/accounts", { name });
  await api("PUT", `/accounts/${id}/password`, { login: name, password: "correct horse" });
  const { token } = await api("POST", "/login", { login: name, password: "correct horse" });
  return { id, token };
}

export async function until(what, look) {
  const end = Date.now() + LIMIT;
  for (;;) {
    const value = await look();
    if (value) return value;
    assert(Date.now() < end, "never: " + what);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

const contexts = [];

// A browser of somebody's own. With `lenient`, it keeps third-party cookies, and
// the storage of pages in frames of other sites. Without `scripts`, it runs none.
export async function browser(name, lenient = false, scripts = true) {
  const profile = join(told.dir, name);
  mkdirSync(join(profile, "Default"), { recursive: true });
  const preferences = { profile: { cookie_controls_mode: lenient ? 0 : 1, block_third_party_cookies: !lenient } };
  writeFileSync(join(profile, "Default", "Preferences"), JSON.stringify(preferences));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.COCALC_CHROMIUM || "/usr/bin/chromium",
    headless: true,
    acceptDownloads: true,
    javaScriptEnabled: scripts,
    viewport: { width: 1000, height: 700 },
    args: [
      "--no-sandbox",
      "--host-resolver-rules=MAP *.test 127.0.0.1, MAP *.example 127.0.0.1",
      "--ignore-certificate-errors",
    ],
  });
  contexts.push(context);
  context.setDefaultTimeout(LIMIT);
  const page = await context.newPage();
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (message) => { if (/Content Security Policy/.test(message.text())) complaints.push(message.text()); });
  return { context, page, complaints };
}

export const shot = (page, name) => page.screenshot({ path: join(told.screenshots, name + ".png") });

// Opens the master's page, with a token typed in.
export async function enter(page, id, token, master = MASTER) {
  await page.goto(`${master}/projects/${id}`);
  await page.getByLabel("API token").fill(token);
  await page.getByRole("button", { name: "Open", exact: true }).click();
}

// The frame, once it shows the page of the project at that host.
export async function framed(page, host) {
  return until("a project page of " + host, async () => {
    const frame = page.frames().find((one) => one.name() === "project" && one.url().includes("." + host + "/"));
    if (!frame) return null;
    const ready = await frame.evaluate(() => typeof cocalc === "object" && document.readyState !== "loading").catch(() => false);
    return ready ? frame : null;
  });
}

export const screen = (frame) => frame.evaluate(() => cocalc.screen());

export async function shows(frame, text) {
  let seen = "";
  await until("a terminal that shows " + text, async () => {
    seen = await screen(frame).catch(() => "");
    return seen.includes(text);
  }).catch((error) => { throw new Error(error.message + "\nit shows:\n" + seen); });
}

export async function types(page, frame, line) {
  await frame.locator(".screen:not([hidden]) textarea").focus();
  await page.keyboard.type(line);
}

export async function run(test) {
  let failed = null;
  try {
    await test();
  } catch (error) {
    failed = error;
    for (const [at, context] of contexts.entries()) {
      for (const page of context.pages()) await shot(page, "failed-" + at).catch(() => {});
      for (const page of context.pages()) {
        for (const frame of page.frames()) console.error(frame.url(), await frame.locator("body").innerText({ timeout: 1000 }).catch(() => ""));
      }
    }
  }
  for (const context of contexts) await context.close().catch(() => {});
  for (const front of fronts) front.close();
  if (failed) {
    console.error(failed);
  }
  process.exit(failed ? 1 : 0);
}
