// Apps as their authors have them, declared in the project, in the frame of the
// master's page: JupyterLab runs a cell and saves, a dev server replaces a module
// without loading the page anew.

import assert from "node:assert";
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { HOSTS, MASTER, api, browser, enter, framed, project, run, shot, told, until } from "./driver.mjs";

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

  const cell = { cell_type: "code", id: "one", execution_count: null, metadata: {}, outputs: [], source: "print(6 * 7)" };
  const kernel = { kernelspec: { name: "python3", display_name: "Python 3", language: "python" }, language_info: { name: "python" } };
  writeFileSync(join(home, "nb.ipynb"), JSON.stringify({ cells: [cell], metadata: kernel, nbformat: 4, nbformat_minor: 5 }));
  // It lets itself be shown in frames of its own origin only, unless it is told.
  writeFileSync(join(home, "jupyter_config.py"), `
c.ServerApp.tornado_settings = {"headers": {"Content-Security-Policy": "frame-ancestors 'self' ${MASTER}"}}
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
  writeFileSync(join(site, "vite.config.js"), `export default { cacheDir: "${site}/.vite", server: { allowedHosts: true } };\n`);
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
    return apps.length === 2 && apps.every((app) => JSON.stringify(app.state).includes("up")) ? apps : null;
  });
  console.log(running.map((app) => `${app.name}: ${JSON.stringify(app.state)}`).join(", "));

  const { page, complaints } = await browser("owner");
  await enter(page, id, told.admin);
  await framed(page, HOSTS[0]);
  const choose = async (name) => {
    const option = await until(name + " in the choice", () => page.locator("#app option").filter({ hasText: name }).first().getAttribute("value").catch(() => null));
    await page.getByLabel("Show", { exact: true }).selectOption(option);
    return until("its frame", () => page.frames().find((one) => one.name() === "project" && one.url().includes(`//${option}--${id}.${HOSTS[0]}/`)));
  };

  // JupyterLab: a cell through its kernel's WebSocket, and a save, which needs a
  // cookie of its own.
  let frame = await choose("jupyterlab");
  const input = frame.locator(".jp-Notebook .jp-Cell .cm-content").first();
  await input.waitFor();
  await frame.locator(".jp-NotebookPanel-toolbar").first().waitFor();
  await until("the kernel", async () => (await frame.locator(".jp-Notebook-ExecutionIndicator").first().getAttribute("data-status").catch(() => "")) === "idle");
  await input.click();
  await page.keyboard.press("Shift+Enter");
  await frame.locator(".jp-OutputArea-output").getByText("42", { exact: true }).waitFor();
  await page.keyboard.press("Control+s");
  await until("a saved notebook", () => {
    const saved = JSON.parse(readFileSync(join(home, "nb.ipynb"), "utf8"));
    return JSON.stringify(saved.cells[0].outputs).includes("42");
  });
  await shot(page, "jupyterlab");

  // A dev server: what is changed in the project shows without a reload.
  frame = await choose("vite");
  await frame.getByRole("heading", { name: "first" }).waitFor();
  await frame.evaluate(() => { window.here = true; });
  writeFileSync(join(site, "text.js"), `export const text = "second";\n`);
  await frame.getByRole("heading", { name: "second" }).waitFor();
  assert.equal(await frame.evaluate(() => window.here), true, "the page was loaded anew");
  await shot(page, "vite");

  // The same at the project's own origin, where it sees its prefix, too.
  await page.getByLabel("Show", { exact: true }).selectOption("ports");
  frame = await framed(page, HOSTS[0]);
  await frame.getByRole("link", { name: `port/${dev}/`, exact: true }).click();
  frame = await until("its frame", () => page.frames().find((one) => one.url() === `https://${id}.${HOSTS[0]}/port/${dev}/`));
  await frame.getByRole("heading", { name: "second" }).waitFor();
  await frame.evaluate(() => { window.here = true; });
  writeFileSync(join(site, "text.js"), `export const text = "third";\n`);
  await frame.getByRole("heading", { name: "third" }).waitFor();
  assert.equal(await frame.evaluate(() => window.here), true, "the page was loaded anew");
  assert.deepEqual(complaints.filter((one) => !one.includes("frame-ancestors")), []);
  console.log("apps work in the frame");
});
