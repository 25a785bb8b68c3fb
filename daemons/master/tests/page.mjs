// Runs the script of the project page on a document that knows text only: whoever
// sets markup, or a handler as text, fails. Argument: the page as it is served.

import { readFileSync } from "node:fs";
import vm from "node:vm";
import assert from "node:assert";

const page = readFileSync(process.argv[2], "utf8");
const script = page.split("<script>")[1].split("</script>")[0];
const HOSTILE = [
  'home/<img src=x onerror=alert(1)>', "home/\"'><script>alert(1)</script>", "home/javascript:alert(1)",
  "home/a%0Ab", "home/&lt;b&gt;", "home/\u202egnp.exe", "home/__proto__", "home/${alert(1)}",
];

class Node {
  constructor(kind) { this.kind = kind; this.children = []; this.text = ""; this.attributes = {}; this.handlers = {}; }
  get textContent() { return this.text + this.children.map((one) => one.textContent).join(""); }
  set textContent(text) { assert.equal(typeof text, "string"); this.text = text; this.children = []; }
  set innerHTML(_) { throw new Error("markup"); }
  set outerHTML(_) { throw new Error("markup"); }
  insertAdjacentHTML() { throw new Error("markup"); }
  append(...nodes) { for (const node of nodes) { assert(node instanceof Node); this.children.push(node); } }
  replaceChildren(...nodes) { this.children = []; this.text = ""; this.append(...nodes); }
  replaceWith(node) { byId.set(node.id, node); }
  setAttribute(name, value) { assert(!/^on|^href$|^src$|^style$/.test(name), name); this.attributes[name] = value; }
  removeAttribute(name) { delete this.attributes[name]; delete this[name]; }
  addEventListener(name, act) { assert.equal(typeof act, "function"); this.handlers[name] = act; }
  all(kind) { return this.children.flatMap((one) => [...(one.kind === kind ? [one] : []), ...one.all(kind)]); }
}
const byId = new Map();
for (const [, id] of page.matchAll(/ id="([^"]+)"/g)) byId.set(id, new Node("static"));
const used = new Set([...script.matchAll(/byId\("([^"]+)"\)/g)].map(([, id]) => id));
for (const id of used) assert(byId.has(id), "the page has no " + id);

const calls = [];
const backup = { id: "b".repeat(64), taken: new Date(Date.now() - 3 * 3600e3).toISOString(), kind: "manual", bytes: 1536 };
const answers = (method, path) => {
  if (path.endsWith("/backups")) {
    return { backups: [backup], state: { pending: true, failure: "<b>no</b>" }, damage: ["<i>x</i>"] };
  }
  if (path.includes("/ls?")) {
    const entries = HOSTILE.map((path, at) => ({ path, kind: at % 2 ? "directory" : "file", bytes: 3 }));
    return { entries, truncated: true };
  }
  if (path.endsWith("/restore")) return { operation_id: "o" };
  if (path.includes("/operations/o/")) {
    return { state: "done", phase: "done", progress: { bytes: 3, bytes_expected: 3, bytes_per_sec: 1, remaining_secs: 0 } };
  }
  throw new Error("nobody expects " + method + " " + path);
};
let sure = true;
const asked = [];
const world = {
  document: { getElementById: (id) => byId.get(id) ?? null, createElement: (kind) => new Node(kind) },
  sessionStorage: {}, location: { origin: "http://master.example" }, URL, URLSearchParams, Date, Math, Number, JSON, String, Error,
  setInterval: () => 0, setTimeout: () => 0, clearTimeout() {}, addEventListener() {}, window: {}, Map, Object, Array, Promise,
  confirm: (text) => { asked.push(text); return sure; },
  fetch: async (path, { method, body }) => {
    calls.push({ method, path, body: body && JSON.parse(body) });
    return { ok: true, status: 200, json: async () => answers(method, path) };
  },
};
vm.runInNewContext(script, world);
const settled = () => new Promise((resolve) => setTimeout(resolve, 20));
const click = async (node) => { node.handlers.click(); await settled(); };

byId.get("backups").open = true;
byId.get("backups").handlers.toggle();
await settled();
const rows = byId.get("backup-list");
assert.match(rows.textContent, /3 h1\.5 KiBmanual/);
assert.match(byId.get("backup-state").textContent, /<b>no<\/b> Damaged: <i>x<\/i>/);
const [look, whole] = rows.all("button");
await click(look);
const list = byId.get("browse-list");
for (const path of HOSTILE) assert(list.textContent.includes(path.split("/").pop()), path);
assert.equal(byId.get("browse-more").hidden, false);
const restores = list.all("button").filter((one) => one.textContent === "Restore");
assert.equal(restores.length, HOSTILE.length);
for (const [at, path] of HOSTILE.entries()) {
  sure = at % 2 === 0;
  await click(restores[at]);
  const sent = calls.filter((one) => one.path.endsWith("/restore")).pop().body;
  const target = sure ? path : path + ".restored";
  assert.deepEqual(sent, { to: "path", path, target, replace: sure });
}
// A whole restore asks once, and says what is kept.
asked.length = 0;
const before = calls.length;
sure = false;
await click(whole);
assert.equal(calls.length, before, "nothing without a yes");
assert.equal(asked.length, 1);
assert.match(asked[0], /kept as a snapshot/);
console.log("the page is sound");
