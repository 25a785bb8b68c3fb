// Apps as their authors have them, declared in the project, in the frame of the
// master's page: JupyterLab runs a cell and saves, a dev server replaces a module
// without loading the page anew.

import assert from "node:assert";
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { HOSTS, MASTER, SAME_SITE, api, browser, enter, framed, project, run, shot, told, until } from "./driver.mjs";

const free = () => new Promise((resolve) => {
  const server = createServer().listen(0, "127.0.0.1", () => {
    const { port } = server.address();
    server.close(() => resolve(port));
  });
});

await run(async () => {
  const { hosts } = await api("GET", "/hosts");
  const id = await project("with apps", hosts.find((host) => host.name === "alpha").id);
  const home = join(told.volume, id, "live/tree/home");
  const [lab, dev] = [await free(), await free()];

  const notebook = (source) => {
    const cell = { cell_type: "code", id: "one", execution_count: null, metadata: {}, outputs: [], source };
    const kernelspec = { name: "python3", display_name: "Python 3", language: "python" };
    const metadata = { kernelspec, language_info: { name: "python" } };
    writeFileSync(join(home, "nb.ipynb"), JSON.stringify({ cells: [cell], metadata, nbformat: 4, nbformat_minor: 5 }));
  };
  // It lets itself be shown in frames of its own origin only, unless it is told.
  writeFileSync(join(home, "jupyter_config.py"), `
c.ServerApp.tornado_settings = {"headers": {"Content-Security-Policy": "frame-ancestors 'self' ${MASTER} ${SAME_SITE}"}}
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port = ${lab}
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.allow_root = True
c.ServerApp.allow_remote_access = True
c.ServerApp.base_url = "/port/${lab}/"
c.IdentityProvider.token = ""
c.LabApp.default_url = "/lab/tree/nb.ipynb"
c.LabApp.news_url = None
`);
  const site = join(home, "site");
  mkdirSync(site);
  symlinkSync(join(told.vite, "node_modules"), join(site, "node_modules"));
  writeFileSync(join(site, "index.html"), `<!doctype html><title>dev</title><h1 id="said"></h1><script type="module" src="./main.js"></script>`);
  writeFileSync(join(site, "main.js"), `import { text } from "./text.js";
const show = (text) => { document.getElementById("said").textContent = text; };
show(text);
import.meta.hot?.accept("./text.js", (fresh) => show(fresh.text));
`);
  writeFileSync(join(site, "text.js"), `export const text = "first";\n`);
  // Not every file system tells of changes.
  writeFileSync(join(site, "vite.config.js"), `export default { cacheDir: "${site}/.vite", server: { allowedHosts: true, watch: { usePolling: true, interval: 100 } } };\n`);
  mkdirSync(join(home, ".cocalc"), { recursive: true });
  const pieces = [
    ["jupyterlab", lab, `exec ${told.jupyter}/bin/jupyter-lab --config=$HOME/jupyter_config.py`],
    ["vite", dev, `cd site && exec node node_modules/vite/bin/vite.js --host 127.0.0.1 --port ${dev} --strictPort --base /port/${dev}/`],
  ];
  writeFileSync(join(home, ".cocalc/apps.toml"),
    pieces.map(([name, port, command]) => `[apps.${name}]\ncommand = '${command}'\nport = ${port}\n`).join("\n"));
  const running = await until("both apps", async () => {
    const { apps, complaint } = await api("GET", `/projects/${id}/apps`);
    assert.equal(complaint, null);
    return apps.length === 2 && apps.every((app) => app.state === "ready") ? apps : null;
  });
  console.log(running.map((app) => `${app.name}: ${JSON.stringify(app.state)}`).join(", "));

  // A cell through its kernel's WebSocket, and a save, which needs a cookie.
  const works = async (page, frame, said) => {
    const input = frame.locator(".jp-Notebook .jp-Cell .cm-content").first();
    await input.waitFor();
    await until("the kernel", async () => (await frame.locator(".jp-Notebook-ExecutionIndicator").first().getAttribute("data-status").catch(() => "")) === "idle");
    // It says that its kernel is idle before it listens to it.
    const output = frame.locator(".jp-OutputArea-output").getByText(said, { exact: true });
    await until("what the cell prints", async () => {
      await input.click();
      await page.keyboard.press("Control+Enter");
      return output.waitFor({ timeout: 3000 }).then(() => true, () => false);
    });
    await page.keyboard.press("Control+s");
    await until("a saved notebook", () => {
      try {
        return JSON.stringify(JSON.parse(readFileSync(join(home, "nb.ipynb"), "utf8")).cells[0].outputs).includes(said);
      } catch { return false; }
    });
  };

  // Where third-party cookies are blocked, pages in frames have no storage, and
  // JupyterLab does not begin without: it is for a tab of its own.
  notebook("print(6 * 7)");
  const strict = await browser("strict");
  await enter(strict.page, id, told.admin);
  await framed(strict.page, HOSTS[0]);
  await strict.page.getByLabel("Show", { exact: true }).selectOption("ports");
  const list = await framed(strict.page, HOSTS[0]);
  const popup = strict.page.context().waitForEvent("page");
  await list.getByRole("button", { name: `Open port ${lab} at port/${lab}/ in a new tab` }).click();
  const tab = await popup;
  await works(tab, tab, "42");
  await shot(tab, "jupyterlab-in-a-tab");
  await strict.page.getByLabel("Show", { exact: true }).selectOption(String(dev));
  await strict.page.getByText("This browser keeps nothing for pages in frames").waitFor();
  // But where the master's name and the project's are of one site, it has them,
  // and works in the frame of that browser, too.
  notebook("print(5 * 5)");
  await enter(strict.page, id, told.admin, SAME_SITE);
  await framed(strict.page, HOSTS[0]);
  await strict.page.getByLabel("Show", { exact: true }).selectOption("ports");
  await (await framed(strict.page, HOSTS[0])).getByRole("link", { name: `port/${lab}/`, exact: true }).click();
  await works(strict.page, await until("its frame", () => strict.page.frames().find((one) =>
    one.url().startsWith(`https://${id}.${HOSTS[0]}/port/${lab}/`))), "25");
  await shot(strict.page, "jupyterlab-of-one-site");
  await strict.context.close();

  // Elsewhere it works in the frame, at the project's own origin, where an app
  // sees its prefix.
  notebook("print(7 * 7)");
  const { page, complaints } = await browser("owner", true);
  await enter(page, id, told.admin);
  await framed(page, HOSTS[0]);
  const below = async (port) => {
    await page.getByLabel("Show", { exact: true }).selectOption("ports");
    const ports = await framed(page, HOSTS[0]);
    await ports.getByRole("link", { name: `port/${port}/`, exact: true }).click();
    return until("its frame", () => page.frames().find((one) => one.url().startsWith(`https://${id}.${HOSTS[0]}/port/${port}/`)));
  };
  const choose = async (name) => {
    const option = await until(name + " in the choice", () => page.locator("#app option").filter({ hasText: name }).first().getAttribute("value").catch(() => null));
    await page.getByLabel("Show", { exact: true }).selectOption(option);
    return until("its frame", () => page.frames().find((one) => one.name() === "project" && one.url().includes(`//${option}--${id}.${HOSTS[0]}/`)));
  };
  let frame = await below(lab);
  await works(page, frame, "49");
  await shot(page, "jupyterlab");

  // A dev server: what is changed in the project shows without a reload.
  // What is changed before its client listens would be missed.
  const listens = () => page.waitForEvent("console", (message) => message.text() === "[vite] connected.");
  let connected = listens();
  frame = await choose("vite");
  await connected;
  await frame.getByRole("heading", { name: "first" }).waitFor();
  await frame.evaluate(() => { window.here = true; });
  writeFileSync(join(site, "text.js"), `export const text = "second";\n`);
  await frame.getByRole("heading", { name: "second" }).waitFor();
  assert.equal(await frame.evaluate(() => window.here), true, "the page was loaded anew");
  await shot(page, "vite");

  // The same below the project's page.
  connected = listens();
  frame = await below(dev);
  await connected;
  await frame.getByRole("heading", { name: "second" }).waitFor();
  await frame.evaluate(() => { window.here = true; });
  writeFileSync(join(site, "text.js"), `export const text = "third";\n`);
  await frame.getByRole("heading", { name: "third" }).waitFor();
  assert.equal(await frame.evaluate(() => window.here), true, "the page was loaded anew");
  assert.deepEqual(complaints.filter((one) => !one.includes("frame-ancestors")), []);
  console.log("apps work in the frame");
});
