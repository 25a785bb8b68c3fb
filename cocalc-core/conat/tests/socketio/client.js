// Drives a broker with the socket.io client that existing programs use, in
// the way they use it. Prints each step; the first that fails ends it.
import assert from "node:assert/strict";
import { decode, encode } from "@msgpack/msgpack";
import { io } from "socket.io-client";

const url = process.argv[2];
const LIMIT = 10_000;

const connect = async (bearer) => {
  const socket = io(url, {
    path: "/conat/",
    transports: ["websocket"],
    auth: { bearer },
    forceNew: true,
    reconnection: false,
  });
  const info = await new Promise((resolve, reject) => {
    socket.on("connect_error", reject);
    socket.once("info", (info, ack) => {
      ack();
      resolve(info);
    });
  });
  return { socket, info };
};

const ask = (socket, event, ...args) => socket.timeout(LIMIT).emitWithAck(event, ...args);

const once = (socket, event) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${event}`)), LIMIT);
    socket.once(event, (...args) => {
      clearTimeout(timer);
      resolve(args);
    });
  });

let id = 0;
const message = (subject, value, headers) => {
  const frame = [subject, `id${id++}`, 0, 1, 0, encode(value)];
  return headers ? [...frame, headers] : frame;
};

const step = async (name, body) => {
  await body();
  console.log(`ok ${name}`);
};

const a = await connect("all-a");
const b = await connect("all-b");

await step("info", () => {
  assert.equal(a.info.max_payload, 8000000);
  assert.equal(a.info.user.account_id, "all-a");
  assert.equal(typeof a.info.id, "string");
});

await step("subscribe", async () => {
  assert.deepEqual(await ask(b.socket, "subscribe", { subject: "open.*", queue: "q" }), { status: "added" });
  assert.deepEqual(await ask(b.socket, "subscribe", { subject: "open.*", queue: "q" }), {
    status: "already-added",
  });
  assert.deepEqual(
    await ask(b.socket, "subscribe", [
      { subject: "x.>", queue: "q" },
      { subject: "x.>.y", queue: "q" },
    ]),
    [{ status: "added" }, { error: "Error: invalid subject", code: 400 }],
  );
  assert.deepEqual(await ask(b.socket, "subscriptions", null), ["open.*", "x.>"]);
});

await step("publish and receive", async () => {
  const delivery = once(b.socket, "open.*");
  const sent = message("open.hello", { text: "ü", list: [1, null] }, { "CN-Reply": "_INBOX.all-a.y", n: { deep: [1] } });
  const ack = await ask(a.socket, "publish", sent);
  assert.equal(ack.count, 1);
  assert.equal(typeof ack.serverAuthMs, "number");
  const [got] = await delivery;
  assert.equal(got.subject, "open.hello");
  const [gotId, seq, done, encoding, raw, headers] = got.data;
  assert.deepEqual([gotId, seq, done, encoding], [sent[1], 0, 1, 0]);
  assert.deepEqual(decode(raw), { text: "ü", list: [1, null] });
  assert.deepEqual(headers, sent[6]);
});

await step("large binary", async () => {
  const delivery = once(b.socket, "open.*");
  const bytes = new Uint8Array(7_900_000).fill(7);
  const ack = await ask(a.socket, "publish", ["open.big", "big", 0, 1, 0, bytes]);
  assert.equal(ack.count, 1);
  const [got] = await delivery;
  assert.equal(Buffer.compare(Buffer.from(got.data[4]), Buffer.from(bytes)), 0);
});

await step("chunks keep to one member", async () => {
  const c = await connect("all-c");
  await ask(c.socket, "subscribe", { subject: "open.*", queue: "q" });
  const seen = [];
  for (const [name, { socket }] of Object.entries({ b, c })) {
    socket.on("open.*", ({ data }) => seen.push([data[0], data[1], name]));
  }
  for (let m = 0; m < 20; m++) {
    for (let seq = 0; seq < 3; seq++) {
      const ack = await ask(a.socket, "publish", ["open.c", `m${m}`, seq, seq === 2 ? 1 : 0, 0, encode(seq)]);
      assert.equal(ack.count, 1);
    }
  }
  // An acknowledgement may overtake a delivery: they are different sockets.
  const deadline = Date.now() + LIMIT;
  while (seen.length < 60) {
    assert.ok(Date.now() < deadline, `only ${seen.length} chunks arrived`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  const members = new Set();
  for (let m = 0; m < 20; m++) {
    const chunks = seen.filter(([id]) => id === `m${m}`);
    assert.deepEqual(chunks.map(([, seq]) => seq), [0, 1, 2]);
    assert.equal(new Set(chunks.map(([, , name]) => name)).size, 1);
    members.add(chunks[0][2]);
  }
  assert.equal(members.size, 2, "both members get work");
  b.socket.off("open.*");
  c.socket.close();
});

await step("invalid subject", async () => {
  const ack = await ask(a.socket, "publish", message("open.*", 1));
  assert.equal(ack.error, "Error: invalid subject");
});

await step("unsubscribe", async () => {
  assert.equal(await ask(b.socket, "unsubscribe", { subject: "open.*" }), null);
  assert.deepEqual(await ask(b.socket, "unsubscribe", [{ subject: "x.>" }]), [null]);
  assert.equal((await ask(a.socket, "publish", message("open.hello", 1))).count, 0);
});

await step("wait for interest", async () => {
  assert.equal(await ask(a.socket, "wait-for-interest", { subject: "open.w", timeout: 0 }), false);
  assert.equal(await ask(a.socket, "wait-for-interest", { subject: "open.w", timeout: 12.5 }), false);
  const waiting = ask(a.socket, "wait-for-interest", { subject: "open.w", timeout: 9000 });
  await ask(b.socket, "subscribe", { subject: "open.w", queue: "q" });
  assert.equal(await waiting, true);
});

await step("permission", async () => {
  const d = await connect("open-d");
  const event = once(d.socket, "permission");
  const ack = await ask(d.socket, "publish", message("secret.x", 1));
  assert.equal(ack.code, 403);
  const [permission] = await event;
  assert.equal(permission.subject, "secret.x");
  assert.equal(permission.type, "pub");
  assert.equal((await ask(d.socket, "subscribe", { subject: "_INBOX.all-a.>", queue: "q" })).code, 403);
  assert.equal((await ask(d.socket, "subscribe", { subject: ">", queue: "q" })).code, 403);
  d.socket.close();
});

await step("request and reply through an inbox", async () => {
  await ask(a.socket, "subscribe", { subject: "_INBOX.all-a.abc.*", queue: "1" });
  b.socket.once("open.w", ({ data }) => {
    ask(b.socket, "publish", message(data[5]["CN-Reply"], decode(data[4]) + 1));
  });
  const reply = once(a.socket, "_INBOX.all-a.abc.*");
  await ask(a.socket, "publish", message("open.w", 41, { "CN-Reply": "_INBOX.all-a.abc.1" }));
  const [got] = await reply;
  assert.equal(decode(got.data[4]), 42);
});

await step("fast-rpc without a service", async () => {
  const ack = await ask(a.socket, "fast-rpc", { subject: "open.rpc", payload: { raw: encode(1) }, timeout: 5000 });
  assert.match(ack.error, /no services matching/);
  assert.equal(ack.code, 503);
});

await step("fast-rpc and rpc", async () => {
  assert.deepEqual(await ask(b.socket, "rpc-service", { subject: "open.rpc" }), { status: "added" });
  b.socket.on("fast-rpc-request", ({ subject, pattern, payload }, ack) => {
    assert.deepEqual([subject, pattern], ["open.rpc", "open.rpc"]);
    ack({ raw: encode(decode(payload.raw) * 2) });
  });
  b.socket.on("rpc-request", ({ encoding, raw, headers }, ack) => {
    ack({ encoding, raw, headers });
  });
  const fast = await ask(a.socket, "fast-rpc", { subject: "open.rpc", payload: { raw: encode(21) }, timeout: 5000 });
  assert.equal(decode(fast.raw), 42);
  assert.equal(fast.count, 1);
  assert.equal(typeof fast.serverTargetAckMs, "number");
  const rpc = await ask(a.socket, "rpc", {
    subject: "open.rpc",
    encoding: 0,
    raw: encode("same"),
    headers: { h: 1 },
    timeout: 5000,
  });
  assert.equal(decode(rpc.raw), "same");
  assert.deepEqual(rpc.headers, { h: 1 });
});

await step("rpc-raw", async () => {
  b.socket.on("rpc-raw-request", ({ requestId, encoding, raw }) => {
    b.socket.emit("rpc-raw-response", { requestId, encoding, raw });
  });
  const response = once(a.socket, "rpc-raw-response");
  a.socket.emit("rpc-raw", { requestId: "mine", subject: "open.rpc", encoding: 0, raw: encode([1]), timeout: 5000 });
  const [got] = await response;
  assert.equal(got.requestId, "mine");
  assert.deepEqual(decode(got.raw), [1]);
  assert.deepEqual(await ask(b.socket, "rpc-service-close", { subject: "open.rpc" }), null);
  const failure = once(a.socket, "rpc-raw-response");
  a.socket.emit("rpc-raw", { requestId: "two", subject: "open.rpc", encoding: 0, raw: encode([1]), timeout: 5000 });
  assert.match((await failure)[0].error, /no services matching/);
});

await step("cluster", async () => {
  assert.deepEqual(await ask(a.socket, "cluster"), []);
});

await step("a wrong token is told so, and closed", async () => {
  const wrong = await connect("nobody");
  assert.match(wrong.info.user.error, /Error: unknown token/);
  const [reason] = wrong.socket.connected ? await once(wrong.socket, "disconnect") : ["io server disconnect"];
  assert.equal(reason, "io server disconnect");
});

await step("a Rust program answers", async () => {
  const reply = once(a.socket, "_INBOX.all-a.abc.*");
  const headers = { "CN-Reply": "_INBOX.all-a.abc.2" };
  const ack = await ask(a.socket, "publish", ["rust.echo", "r1", 0, 1, 1, Buffer.from('{"a":1}'), headers]);
  assert.equal(ack.count, 1);
  const [got] = await reply;
  assert.equal(got.data[3], 1, "JSON");
  assert.deepEqual(JSON.parse(Buffer.from(got.data[4]).toString()), { a: 1 });
});

await step("revocation disconnects", async () => {
  const gone = once(b.socket, "disconnect");
  console.log("revoke all-b");
  await gone;
});

a.socket.close();
console.log("done");
