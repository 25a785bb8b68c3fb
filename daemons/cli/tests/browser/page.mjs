// A project in the frame of the master's page: terminal, files, ports, a move, a
// stop, a revocation, signing out.

import assert from "node:assert";
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { HOSTS, MASTER, api, browser, enter, framed, person, project, run, settle, shot, shows, screen, told, types, until } from "./driver.mjs";

await run(async () => {
  const { hosts } = await api("GET", "/hosts");
  const alpha = hosts.find((host) => host.name === "alpha").id;
  const beta = hosts.find((host) => host.name === "beta").id;
  const id = await project("in a frame", alpha);

  // The owner opens it, and types.
  const { page, complaints } = await browser("owner");
  await page.goto(`${MASTER}/projects/${id}`);
  await shot(page, "master-signed-out");
  await enter(page, id, told.admin);
  let frame = await framed(page, HOSTS[0]);
  await frame.locator(".screen:not([hidden]) .xterm").waitFor();
  await types(page, frame, "echo typed-$((40+2)); kept=7\n");
  await shows(frame, "typed-42");
  await shot(page, "terminal");
  assert.equal(new URL(frame.url()).origin, `https://${id}.${HOSTS[0]}`);
  assert(!frame.url().includes("cocalc_token") && !page.url().includes("cocalc_token"));

  // Text of every kind, typed and pasted: in one piece, as a shell wants it.
  await types(page, frame, "printf '%s|' ü 漢字 🙂 e\u0301; echo end\n");
  await shows(frame, "ü|漢字|🙂|e\u0301|end");
  await frame.locator(".screen:not([hidden]) textarea").evaluate((area) => {
    const data = new DataTransfer();
    data.setData("text/plain", "cat <<'END'\npasted ä 🙂\nand a second line\nEND\n");
    area.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
  });
  await page.keyboard.press("Enter");
  await shows(frame, "\npasted ä 🙂\r\nand a second line");
  // Much of it, which waits for who reads it and loses nothing.
  await types(page, frame, "echo now-$((1+1)); head -n 4000 | sha256sum\n");
  await shows(frame, "now-2");
  const lines = Array.from({ length: 4000 }, (_, at) => "line " + at + " ünï\n").join("");
  await frame.locator(".screen:not([hidden]) textarea").evaluate((area, lines) => {
    const data = new DataTransfer();
    data.setData("text/plain", lines);
    area.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
  }, lines);
  await shows(frame, createHash("sha256").update(lines).digest("hex"));

  // A terminal is as large as it is shown, also on a small screen, where nothing
  // is beside the page.
  const sized = async (mark) => {
    await types(page, frame, `clear; echo ${mark}-$(stty size | tr ' ' x)-\n`);
    await shows(frame, mark + "-");
    return until("a size", async () => (await screen(frame)).match(new RegExp(mark + "-(\\d+)x(\\d+)-"))?.slice(1).map(Number));
  };
  const [rows, columns] = await sized("large");
  await page.setViewportSize({ width: 360, height: 640 });
  await until("fewer columns", async () => (await frame.evaluate(() => innerWidth)) <= 360);
  const small = await until("a smaller terminal", async () => {
    const now = await sized("small" + Math.floor(Math.random() * 1e6));
    return now[1] < columns ? now : null;
  });
  assert(small[1] >= 30 && small[0] >= 5, `${rows}x${columns} became ${small}`);
  for (const view of ["terminal", "files", "ports"]) {
    await frame.evaluate((view) => { location.hash = view; }, view);
    await frame.locator("#" + view).waitFor();
    const wide = await frame.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert(wide[0] <= wide[1], `${view} is wider than the screen: ${wide}`);
    assert(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "the page around it");
    await shot(page, "small-" + view);
  }
  await page.setViewportSize({ width: 1000, height: 700 });

  // Many terminals, each with its own shell; one is ended, the others go on.
  await frame.evaluate(() => { location.hash = "terminal/1"; });
  for (let number = 2; number <= 6; number += 1) {
    await frame.getByRole("button", { name: "New terminal" }).click();
    await frame.getByRole("button", { name: "Terminal " + number, exact: true }).waitFor();
    await types(page, frame, `mine=${number}; echo shell-$mine\n`);
    await shows(frame, "shell-" + number);
  }
  await frame.getByRole("button", { name: "End this terminal" }).click();
  await shows(frame, "this terminal was ended");
  await frame.getByRole("button", { name: "Terminal 3", exact: true }).click();
  await types(page, frame, "echo still-mine-$mine\n");
  await shows(frame, "still-mine-3");
  await frame.getByRole("button", { name: "Terminal 1", exact: true }).click();
  await shows(frame, "typed-42");

  // Another site in the frame, whose ordinary cookies are blocked: the session
  // is kept apart for this page, and that is enough.
  const cookies = await frame.evaluate(() => {
    document.cookie = "plain=1; SameSite=None; Secure";
    document.cookie = "apart=1; SameSite=None; Secure; Partitioned";
    return document.cookie;
  });
  assert.equal(cookies, "apart=1", "third-party cookies are not blocked");

  // Nobody else may have it in a frame: a page of another name shows nothing.
  const other = await page.context().newPage();
  await other.goto(`https://other.example:${new URL(MASTER).port}/healthz`);
  await other.evaluate((url) => { document.body.innerHTML = `<iframe name="project" src="${url}"></iframe>`; }, frame.url());
  await until("a refused frame", () => other.frames().some((one) => one.url().startsWith("chrome-error:")
    || one.url().includes(HOSTS[0])));
  const strange = other.frames().find((one) => one !== other.mainFrame());
  assert.equal(await strange.evaluate(() => typeof cocalc).catch(() => "undefined"), "undefined");
  await other.close();

  // Keyboard alone leads through the page's parts.
  await page.getByLabel("Show", { exact: true }).selectOption("files");
  frame = await until("the files", async () => {
    const found = await framed(page, HOSTS[0]);
    return (await found.locator("#files").isVisible().catch(() => false)) ? found : null;
  });

  // Upload, download, edit.
  mkdirSync(told.dir, { recursive: true });
  const big = join(told.dir, "big file ü.bin");
  const bytes = Buffer.alloc(3_000_000, "0123456789abcdef");
  writeFileSync(big, bytes);
  const text = join(told.dir, "text.txt");
  writeFileSync(text, "one\r\ntwo\r\n");
  await frame.locator("#upload").setInputFiles([big, text]);
  await frame.getByText("big file ü.bin: uploaded").waitFor();
  await frame.getByText("text.txt: uploaded").waitFor();
  const download = page.waitForEvent("download");
  await frame.getByRole("link", { name: "Download big file ü.bin" }).click();
  const saved = await (await download).path();
  assert(readFileSync(saved).equals(bytes), "what comes back is what was sent");
  await frame.getByRole("button", { name: "Edit text.txt" }).click();
  const area = frame.getByLabel("Text of the file");
  await until("the text", async () => (await area.inputValue()) === "one\ntwo\n");
  await area.fill("one\ntwo\nthree\n");
  await frame.getByRole("button", { name: "Save" }).click();
  await frame.getByText("Saved.").waitFor();
  await shot(page, "files");
  // A file that is there is not replaced without a question.
  writeFileSync(text, "other");
  await frame.locator("#upload").setInputFiles([text]);
  await frame.getByRole("dialog").getByRole("button", { name: "No" }).click();
  await frame.getByText("text.txt: left as it was").waitFor();

  // Folders are made, renamed, and deleted with what is in them.
  const answer = async (label, text) => {
    const dialog = frame.getByRole("dialog");
    if (text !== undefined) await dialog.getByRole("textbox").fill(text);
    await dialog.getByRole("button", { name: label }).click();
  };
  await frame.getByRole("button", { name: "New folder" }).click();
  await answer("OK", "work #1");
  await frame.getByRole("button", { name: "Rename text.txt" }).click();
  await answer("OK", "/work #1/text.txt");
  await frame.getByRole("button", { name: "Rename work #1" }).click();
  await answer("OK", "work");
  await frame.getByRole("link", { name: "work/" }).click();
  await frame.getByRole("button", { name: "Rename text.txt" }).waitFor();
  await frame.getByRole("link", { name: "../" }).click();

  // What is deleted comes back from a snapshot: in its place, and as a copy.
  await settle(await api("POST", `/projects/${id}/snapshots`, { name: "before" }));
  await frame.getByRole("button", { name: "Delete work" }).click();
  await answer("Yes");
  await frame.getByRole("link", { name: "work/" }).waitFor({ state: "hidden" });
  await frame.evaluate(() => { location.hash = "ports"; });
  await frame.evaluate(() => { location.hash = "files"; });
  const state = frame.locator("#then");
  const before = await until("the snapshot", () => state.evaluate((all) => [...all.options].find((one) => one.text.endsWith("(before)"))?.value));
  await state.selectOption(before);
  await frame.getByRole("link", { name: "work/" }).waitFor();
  assert(!await frame.getByRole("button", { name: "New folder" }).isVisible());
  await shot(page, "files-of-a-snapshot");
  await frame.getByRole("button", { name: "Restore work", exact: true }).click();
  await answer("Yes");
  await frame.getByText("work is restored.").waitFor();
  await frame.getByRole("link", { name: "work/" }).click();
  const past = page.waitForEvent("download");
  await frame.getByRole("link", { name: "Download text.txt" }).click();
  assert.equal(readFileSync(await (await past).path(), "utf8"), "one\r\ntwo\r\nthree\r\n");
  await frame.getByRole("button", { name: "Restore a copy of text.txt" }).click();
  await answer("OK", "again.txt");
  await frame.getByText("again.txt is restored.").waitFor();
  await frame.getByRole("button", { name: "Restore a copy of text.txt" }).click();
  await answer("OK", "again.txt");
  await frame.getByText("There is something of this name.").waitFor();
  await state.selectOption("");
  await frame.getByRole("button", { name: "Rename again.txt" }).waitFor();
  await frame.getByRole("button", { name: "Rename text.txt" }).click();
  await answer("OK", "/text.txt");
  await frame.getByRole("link", { name: "../" }).click();
  await frame.getByRole("button", { name: "Delete work" }).click();
  await answer("Yes");
  await frame.getByRole("link", { name: "work/" }).waitFor({ state: "hidden" });
  await frame.getByRole("button", { name: "Edit text.txt" }).waitFor();

  // The terminal of before goes on: another part of the page is another
  // connection, to the same shell.
  await frame.getByRole("link", { name: "Terminal" }).click();
  await shows(frame, "typed-42");
  await types(page, frame, "echo still-$kept; od -c text.txt | head -1\n");
  await shows(frame, "still-7");
  await shows(frame, "t   h   r   e   e  \\r");

  // Ports: one that answers, which may be shown, and one that may not.
  await types(page, frame, "python3 -m http.server --bind 127.0.0.1 8123 >/dev/null 2>&1 &\n");
  await types(page, frame, `python3 -c 'import http.server as h
class H(h.BaseHTTPRequestHandler):
 def do_GET(s): s.send_response(200); s.send_header("Content-Type", "text/html"); s.send_header("X-Frame-Options", "DENY"); s.end_headers(); s.wfile.write(b"<h1>alone</h1>")
h.HTTPServer(("127.0.0.1", 8124), H).serve_forever()' 2>/dev/null &\n`);
  await until("both ports", async () => {
    await frame.evaluate(() => { location.hash = ""; location.hash = "ports"; });
    await frame.getByText("Looking…").waitFor({ state: "hidden" });
    const list = await frame.locator("#port-list").innerText();
    return /8123\s+HTTP\s/.test(list) && /8124\s+HTTP, not in a frame/.test(list);
  });
  await shot(page, "ports");
  const popup = page.context().waitForEvent("page");
  await frame.getByRole("button", { name: /Open port 8124 at proxy/ }).click();
  const tab = await popup;
  await tab.getByText("alone").waitFor();
  assert(!tab.url().includes("token"), tab.url());
  await shot(tab, "app-in-a-tab");
  await tab.close();

  // An app in the frame, chosen at the master: on an origin of its own.
  await page.getByLabel("Show", { exact: true }).selectOption("8123");
  const listed = await until("the app", () => page.frames().find((one) => one.url() === `https://8123--${id}.${HOSTS[0]}/`));
  await listed.getByRole("heading", { name: /Directory listing/ }).waitFor();
  await listed.getByRole("link", { name: "text.txt" }).waitFor();
  await shot(page, "app-in-the-frame");
  // And below the project's page, where it does not see its prefix.
  await page.getByLabel("Show", { exact: true }).selectOption("ports");
  frame = await framed(page, HOSTS[0]);
  await frame.getByRole("link", { name: "proxy/8123/", exact: true }).click();
  const below = await until("the app", () => page.frames().find((one) => one.url() === `https://${id}.${HOSTS[0]}/proxy/8123/`));
  await below.getByRole("link", { name: "text.txt" }).click();
  await until("its file", () => page.frames().some((one) => one.url() === `https://${id}.${HOSTS[0]}/proxy/8123/text.txt`));
  await page.getByLabel("Show", { exact: true }).selectOption("terminal");
  frame = await framed(page, HOSTS[0]);

  // It moves while somebody types.
  await frame.getByRole("link", { name: "Terminal" }).click();
  await types(page, frame, "echo before-the-move\n");
  await shows(frame, "before-the-move");
  let typing = true;
  const typist = (async () => {
    while (typing) {
      await page.keyboard.type("x").catch(() => {});
      await new Promise((resolve) => setTimeout(resolve, 40));
    }
  })();
  await settle(await api("POST", `/projects/${id}/move`, { to: beta }));
  frame = await framed(page, HOSTS[1]);
  typing = false;
  await typist;
  // What was shown is there, and a new shell answers, without anybody's doing.
  await shows(frame, "before-the-move");
  await shows(frame, "the project has moved; this is a new shell");
  await types(page, frame, "\x15echo after-$((1+1)); cat text.txt\n");
  await shows(frame, "after-2");
  await shows(frame, "three");
  await shot(page, "after-a-move");

  // Somebody else, whose access is withdrawn while a terminal shows things.
  const bob = await person("bob");
  await api("POST", `/projects/${id}/members`, { account_id: bob.id, role: "collaborator" });
  const theirs = await browser("bob");
  await enter(theirs.page, id, bob.token);
  const inTheirs = await framed(theirs.page, HOSTS[1]);
  await shows(inTheirs, "after-2");
  await types(theirs.page, inTheirs, "while sleep 0.1; do echo tick-$((n++)); done\n");
  await shows(inTheirs, "tick-3");
  await api("DELETE", `/projects/${id}/members/${bob.id}?wait=true`);
  await inTheirs.getByText("Your access to this project was withdrawn.").waitFor();
  const last = await screen(inTheirs);
  await shot(theirs.page, "revoked");
  // The shell goes on, as its owner sees; who was removed sees no more of it.
  const ticks = (text) => Number([...text.matchAll(/tick-(\d+)/g)].pop()?.[1] ?? -1);
  await until("more ticks", async () => ticks(await screen(frame)) > ticks(last) + 2);
  assert.equal(await screen(inTheirs), last);
  await types(page, frame, "\x03");

  // Stopped: the page says so, and what starts it is asked for.
  await settle(await api("POST", `/projects/${id}/stop`, {}));
  await frame.getByText("The project is stopped, or moving.").waitFor();
  await shot(page, "stopped");
  await frame.getByRole("button", { name: "Start it" }).click();
  await until("a new shell", async () => {
    frame = await framed(page, HOSTS[1]);
    return (await frame.locator("#gone").isHidden().catch(() => false)) && (await screen(frame).catch(() => "")).length > 0;
  });
  await types(page, frame, "echo woken-$((1+1))\n");
  await shows(frame, "woken-2");
  assert.equal((await api("GET", `/projects/${id}`)).state, "running");

  // Signing out everywhere, in one of two windows, ends both.
  const carol = await person("carol");
  await api("POST", `/projects/${id}/members`, { account_id: carol.id, role: "collaborator" });
  const hers = await browser("carol");
  await enter(hers.page, id, carol.token);
  await shows(await framed(hers.page, HOSTS[1]), "woken-2");
  const second = await hers.page.context().newPage();
  await enter(second, id, carol.token);
  const inSecond = await framed(second, HOSTS[1]);
  await shows(inSecond, "woken-2");
  await hers.page.getByRole("button", { name: "Sign out everywhere" }).click();
  await hers.page.getByText("You are signed out.").waitFor();
  await until("an empty frame", () => hers.page.frames().every((one) => !one.url().includes("beta.test")));
  await inSecond.locator("#gone").waitFor();
  await second.getByLabel("API token").waitFor();
  await shot(second, "signed-out-elsewhere");

  // A viewer has files, and no shell.
  const dave = await person("dave");
  await api("POST", `/projects/${id}/members`, { account_id: dave.id, role: "viewer" });
  const his = await browser("dave");
  await enter(his.page, id, dave.token);
  const listing = await until("the files", () => his.page.frames().find((one) => one.url().endsWith("/files/")));
  await listing.getByText("text.txt").waitFor();
  await shot(his.page, "viewer");
  // Without scripts: the page that says how far the start is looks again by
  // itself, and what comes then leads to the files.
  await settle(await api("POST", `/projects/${id}/stop`, {}));
  const plain = await browser("plain", false, false);
  const { token } = await api("POST", `/projects/${id}/connect`, { ttl_secs: 300 });
  await plain.page.goto(`https://${id}.${HOSTS[1]}/?cocalc_token=${token}`);
  await plain.page.getByText("is running. Terminals need JavaScript").waitFor();
  assert(!plain.page.url().includes("token"), plain.page.url());
  await plain.page.getByRole("link", { name: "its files" }).click();
  await plain.page.getByRole("link", { name: "text.txt" }).waitFor();
  await plain.page.getByRole("link", { name: "zip" }).waitFor();
  await shot(plain.page, "without-scripts");
  assert.deepEqual(complaints, []);
  console.log("the page is used in a frame of another site");
});
