"use strict";
// Terminals. Each is a shell at the host that outlives its connections: a
// connection that breaks is made anew, and what was shown meanwhile follows.

cocalc.terminals && (() => {
  const { byId, made, button, say, check, idle } = cocalc;
  const KEPT_CHARS = 200000;
  const UNREAD_BYTES = 32 * 1024;
  const PIECE_BYTES = 8 * 1024;
  const open = new Map();
  let current = null;
  const encoder = new TextEncoder();

  class Session {
    constructor(name, kept) {
      this.name = name;
      this.shell = null;   // which shell this was, and how far it is shown
      this.at = 0;
      this.queue = [];     // typed and not sent
      this.sent = this.taken = this.seen = 0;
      this.tries = 0;
      this.over = false;
      this.place = made("div", "");
      this.place.className = "screen";
      this.place.hidden = true;
      byId("screens").append(this.place);
      this.term = new Terminal({ scrollback: 10000, cursorBlink: true, screenReaderMode: byId("reader").checked });
      this.fit = new FitAddon.FitAddon();
      this.term.loadAddon(this.fit);
      this.term.open(this.place);
      this.term.onData((text) => this.typed(encoder.encode(text)));
      this.term.onBinary((text) => this.typed(Uint8Array.from(text, (c) => c.charCodeAt(0))));
      this.term.onResize(({ cols, rows }) => this.send({ resize: { cols, rows } }));
      if (kept) this.term.write(kept + "\r\n");
      if (kept) this.note("the project has moved; this is a new shell");
    }

    note(text) { this.term.write("\r\n\x1b[7m " + text + " \x1b[0m\r\n"); }

    connect() {
      if (this.over) return;
      const where = new URL(".cocalc/terminal/" + this.name, document.baseURI);
      where.protocol = where.protocol === "https:" ? "wss:" : "ws:";
      where.hash = "";
      const query = { cols: this.term.cols, rows: this.term.rows };
      if (this.shell) Object.assign(query, { terminal: this.shell, at: this.at });
      where.search = new URLSearchParams(query);
      const socket = this.socket = new WebSocket(where);
      socket.binaryType = "arraybuffer";
      socket.onmessage = (event) => this.heard(event.data);
      socket.onclose = (event) => { if (socket === this.socket) this.closed(event); };
    }

    heard(data) {
      if (typeof data !== "string") {
        this.at += data.byteLength;
        const place = this.at;
        // Told when it is on the screen, so that a flood waits where it is made.
        this.term.write(new Uint8Array(data), () => {
          if (place - this.seen < PIECE_BYTES) return;
          this.seen = place;
          this.send({ seen: place });
        });
        return;
      }
      const said = JSON.parse(data);
      if (said.hello) {
        const { terminal, at, resumed } = said.hello;
        if (this.shell && this.shell !== terminal) {
          this.queue = [];
          this.note("the shell has ended; this is a new one");
        } else if (this.shell && !resumed) {
          this.note("some of what was shown is lost");
        }
        Object.assign(this, { shell: terminal, at, seen: at, sent: 0, taken: 0, tries: 0 });
        cocalc.back();
        say("");
        this.send({ resize: { cols: this.term.cols, rows: this.term.rows } });
        this.pump();
      }
      if (said.taken !== undefined) { this.taken = said.taken; this.pump(); }
      if (said.skipped) { this.at += said.skipped; this.note(said.skipped + " bytes were too much to be shown"); }
      if (said.idle !== undefined) idle(said.idle);
      if (said.ended) this.ended(said.ended);
    }

    ended({ why, code, signal }) {
      if (why === "stopped") {
        this.note("the project is being stopped or moved");
        return;
      }
      this.over = true;
      // Its shell may have noticed before the host has said why.
      this.note(why === "closed" || this.ending ? "this terminal was ended" : "the shell has ended with " + (signal || code) + "; press Enter for a new one");
    }

    closed(event) {
      this.socket = null;
      if (this.over) return;
      this.again();
    }

    async again() {
      say("Connecting again…");
      const state = await check();
      if (state === "denied" || state === "moved") { say(state === "moved" ? "The project has moved." : ""); return; }
      if (state === "stopped") cocalc.gone("The project is stopped, or moving.", "Start it");
      const wait = state === "running" && this.tries === 0 ? 0 : Math.min(5000, 250 * 2 ** this.tries);
      this.tries = Math.min(this.tries + 1, 5);
      setTimeout(() => (state === "running" ? this.connect() : this.again()), wait);
    }

    send(message) {
      if (this.socket && this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
    }

    typed(bytes) {
      if (this.over) {
        if (bytes[0] === 13) { this.over = this.ending = false; this.connect(); }
        return;
      }
      for (let at = 0; at < bytes.length; at += PIECE_BYTES) this.queue.push(bytes.subarray(at, at + PIECE_BYTES));
      this.pump();
    }

    pump() {
      while (this.queue.length && this.sent - this.taken < UNREAD_BYTES
        && this.socket && this.socket.readyState === WebSocket.OPEN && this.shell) {
        const piece = this.queue.shift();
        this.sent += piece.length;
        this.socket.send(piece);
      }
    }

    // What is on the screen and above it, as text.
    text() {
      const buffer = this.term.buffer.normal;
      const lines = [];
      for (let at = 0; at < buffer.length; at += 1) {
        const line = buffer.getLine(at);
        const text = line.translateToString(true);
        if (line.isWrapped && lines.length) lines[lines.length - 1] += text; else lines.push(text);
      }
      return lines.join("\r\n").trimEnd().slice(-KEPT_CHARS);
    }

    show() {
      for (const other of open.values()) other.place.hidden = other !== this;
      this.fit.fit();
      this.term.focus();
    }
  }

  function start(name, kept) {
    const session = new Session(name, kept);
    open.set(name, session);
    session.place.hidden = false;
    session.fit.fit();
    session.connect();
    return session;
  }

  function list() {
    byId("terminals").replaceChildren(...[...open.keys()].map((name) => {
      const tab = button(name, "Terminal " + name, () => { location.hash = "terminal/" + name; });
      tab.setAttribute("aria-pressed", String(current && current.name === name));
      return made("li", "", tab);
    }));
  }

  function show(name) {
    const wanted = /^[a-z0-9-]{1,32}$/.test(name) ? name : current ? current.name : "1";
    const kept = cocalc.kept();
    current = open.get(wanted) || start(wanted, kept && kept[wanted]);
    current.show();
    list();
  }

  // Those that are open already, perhaps since another visit.
  async function found() {
    const { terminals } = await (await cocalc.ask(".cocalc/terminals")).json();
    for (const { name } of terminals) if (!open.has(name)) start(name);
    if (current) current.show();
    list();
  }

  let first = true;
  cocalc.views.terminal = {
    show(rest) {
      show(rest);
      if (first) found().catch(() => {});
      first = false;
    },
    kept: () => Object.fromEntries([...open].map(([name, session]) => [name, session.text()])),
  };
  byId("new-terminal").addEventListener("click", () => {
    let number = 1;
    while (open.has(String(number))) number += 1;
    location.hash = "terminal/" + number;
  });
  byId("end-terminal").addEventListener("click", () => {
    if (!current) return;
    const ending = current;
    ending.ending = true;
    cocalc.ask(".cocalc/terminal/" + ending.name, { method: "DELETE" }).catch((error) => {
      ending.ending = false;
      say(error.message);
    });
  });
  byId("reader").addEventListener("change", () => {
    for (const session of open.values()) session.term.options.screenReaderMode = byId("reader").checked;
  });
  new ResizeObserver(() => { if (current && !byId("terminal").hidden) current.fit.fit(); }).observe(byId("screens"));
  // For tests and for who is curious: what the current terminal shows.
  cocalc.screen = () => (current ? current.text() : "");
})();
