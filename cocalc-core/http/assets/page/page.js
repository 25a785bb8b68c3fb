"use strict";
// The project page: which part is shown, how the project does, and what the
// page that embeds this one is told.

const cocalc = (() => {
  const told = document.body.dataset;
  // Only with the origin that the user's token names, if it is really there.
  const embedder = told.embedder && parent !== window ? told.embedder : null;
  const views = {};
  let keep = null;
  let renewal = null;

  const say = (text) => { byId("state").textContent = text; };
  const button = buttons((error) => say(error.message));

  const tell = (message) => { if (embedder) parent.postMessage(message, embedder); };

  // Asks the host; answers that are no success are errors with their code.
  const ask = async (path, init) => succeeded(await fetch(path, { credentials: "same-origin", ...init }), "The host");

  function gone(text, again) {
    byId("gone").hidden = false;
    byId("gone-text").textContent = text;
    byId("again").textContent = again || "Open it again";
  }
  const back = () => { byId("gone").hidden = true; };

  // Waits until the page that embeds this one has got a new session for it.
  function renewed() {
    if (!embedder) return Promise.resolve(false);
    if (!renewal) {
      renewal = {};
      renewal.done = new Promise((resolve) => { renewal.resolve = resolve; });
      setTimeout(() => finish(false), 15000);
      tell({ type: "cocalc:expired" });
    }
    return renewal.done;
  }
  function finish(worked) {
    if (renewal) renewal.resolve(worked);
    renewal = null;
  }

  // How the project does: running, stopped, starting, moved, denied or away.
  let denials = 0;
  async function check() {
    try {
      const status = await (await ask(".cocalc/status")).json();
      denials = 0;
      idle(status.idle_stop_secs === null ? null : { secs: status.idle_stop_secs });
      if (status.state === "running") back();
      return status.state === "running" ? "running" : status.state === "starting" ? "starting" : "stopped";
    } catch (error) {
      if (error.code === "project_moved") {
        if (embedder) tell({ type: "cocalc:moved", keep: views.terminal ? views.terminal.kept() : null });
        else if (error.location) location.replace(new URL("../", error.location));
        return "moved";
      }
      if (error.status === 401 || error.status === 403) {
        denials += 1;
        // A session that has ended, or is for another place, can be had anew.
        if (denials === 1 && await renewed()) return check();
        tell({ type: "cocalc:denied" });
        gone(error.status === 401 ? "You are signed out of this project. Open it again where you found it."
          : "Your access to this project was withdrawn. Its owner can give it back.");
        return "denied";
      }
      return "away";
    }
  }

  // The warning before an idle project is stopped.
  function idle(warning) {
    byId("idle").hidden = !warning;
    if (!warning) return;
    const left = warning.secs === null || warning.secs === undefined ? "soon"
      : "in " + Math.max(1, Math.ceil(warning.secs / 60)) + " min";
    byId("idle-text").textContent = warning.text || "It is idle, and will be stopped " + left + " unless it is used.";
  }
  byId("stay").addEventListener("click", () => {
    ask(".cocalc/stay", { method: "POST" }).then(() => idle(null), (error) => say(error.message));
  });
  byId("again").addEventListener("click", () => {
    if (embedder) tell({ type: "cocalc:again" });
    else location.reload();
  });

  addEventListener("message", (event) => {
    if (!embedder || event.source !== parent || event.origin !== embedder || !event.data) return;
    if (event.data.type === "cocalc:renewed") finish(event.data.worked === true);
    if (event.data.type === "cocalc:sign-out") {
      fetch(".cocalc/session", { method: "DELETE", credentials: "same-origin" }).finally(() => {
        tell({ type: "cocalc:signed-out" });
        gone("You are signed out of this project.");
      });
    }
    if (event.data.type === "cocalc:show" && views[event.data.view]) location.hash = event.data.view;
    if (event.data.type === "cocalc:welcome") {
      keep = event.data.keep || null;
      // While it started, the address lost which part was asked for.
      if (!location.hash && views[event.data.view]) history.replaceState(null, "", "#" + event.data.view);
      welcome();
    }
  });
  let welcome = () => {};

  // Which part is shown is in the address, after the hash.
  function show() {
    const [wanted, ...rest] = location.hash.slice(1).split("/");
    const usual = views.terminal ? "terminal" : "files";
    const view = views[wanted] ? wanted : usual;
    for (const name of ["terminal", "files", "ports"]) {
      byId(name).hidden = name !== view;
      const link = byId("to-" + name);
      link.hidden = !views[name];
      if (name === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    views[view].show(rest.join("/"));
    tell({ type: "cocalc:view", view });
  }

  // Whether pages in this frame may keep anything: some apps need it.
  function storage() {
    try { return Boolean(window.localStorage); } catch { return false; }
  }

  // The ports that answer, and whether their apps may be shown in a frame.
  const policies = (headers) => (headers.get("content-security-policy") || "").split(",");
  function frameable(headers) {
    if (!embedder) return true;
    if (headers.has("x-frame-options")) return false;
    return policies(headers).every((policy) => {
      const found = policy.split(";").map((one) => one.trim().split(/\s+/)).find((one) => one[0] === "frame-ancestors");
      return !found || found.includes("*") || found.includes(embedder);
    });
  }
  async function probe(port) {
    const stop = new AbortController();
    const late = setTimeout(() => stop.abort(), 5000);
    try {
      const answer = await fetch("proxy/" + port + "/", { signal: stop.signal, credentials: "same-origin" });
      const own = answer.headers.get("cocalc-code");
      return { port, http: !own, frame: !own && frameable(answer.headers) };
    } catch {
      return { port, http: false, frame: false };
    } finally {
      clearTimeout(late);
      stop.abort();
    }
  }
  async function ports() {
    byId("ports-said").textContent = "Looking…";
    const { ports } = await (await ask(".cocalc/ports")).json();
    const found = await Promise.all(ports.map(probe));
    byId("port-list").replaceChildren(...found.map((one) => {
      const open = made("td", "");
      for (const form of ["port", "proxy"]) {
        const path = form + "/" + one.port + "/";
        if (one.frame) {
          const here = made("a", path);
          here.href = path;
          open.append(here);
        }
        open.append(button(path + " in a new tab", "Open port " + one.port + " at " + path + " in a new tab", () => {
          // The session of a frame is not that of a tab: the page around it opens that.
          if (embedder) tell({ type: "cocalc:tab", path });
          else window.open(path, "_blank", "noopener");
        }));
      }
      const speaks = !one.http ? "something else than HTTP" : one.frame ? "HTTP" : "HTTP, not in a frame";
      return made("tr", "", made("td", String(one.port)), made("td", speaks), open);
    }));
    byId("ports-said").textContent = found.length ? "" : "No port answers.";
    tell({ type: "cocalc:ports", ports: found });
  }
  byId("look").addEventListener("click", () => { ports().catch((error) => { byId("ports-said").textContent = error.message; }); });
  if (told.terminals === "yes") {
    views.ports = { show: () => { ports().catch((error) => { byId("ports-said").textContent = error.message; }); } };
  }

  // A question of our own: browsers show none of theirs in a frame of another
  // site. Yes is true, or the text that was asked for; no is null.
  function question(text, wantsText, before) {
    const [dialog, input] = [byId("dialog"), byId("dialog-input")];
    byId("dialog-text").textContent = text;
    input.hidden = !wantsText;
    input.value = before || "";
    byId("dialog-yes").textContent = wantsText ? "OK" : "Yes";
    byId("dialog-no").textContent = wantsText ? "Cancel" : "No";
    return new Promise((resolve) => {
      let said = null;
      const yes = () => { said = wantsText ? input.value : true; dialog.close(); };
      byId("dialog-yes").onclick = yes;
      byId("dialog-no").onclick = () => dialog.close();
      input.onkeydown = (event) => { if (event.key === "Enter") yes(); };
      dialog.onclose = () => resolve(said);
      dialog.showModal();
    });
  }

  addEventListener("hashchange", show);
  document.addEventListener("DOMContentLoaded", async () => {
    if (embedder) {
      // What a former place has shown comes from the page around this one.
      const asked = new Promise((resolve) => { welcome = resolve; setTimeout(resolve, 1500); });
      tell({ type: "cocalc:ready", storage: storage() });
      await asked;
    }
    show();
    if (embedder && views.ports) ports().catch(() => {});
    setInterval(() => { if (!document.hidden) check(); }, 20000);
  });

  return {
    byId, made, button, say, ask, question, check, idle, gone, back, tell, views,
    terminals: told.terminals === "yes",
    kept: () => keep,
  };
})();
