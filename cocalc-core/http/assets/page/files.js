"use strict";
// Files: browse, upload, download, edit a text; and what they were.

(() => {
  const { byId, made, button, ask, question } = cocalc;
  const TEXT_BYTES_MAX = 1 << 20;
  // Encoded segments, each with its slash, as the listing has them.
  let folder = "";
  let editing = null;
  // The snapshot that is looked at; nothing for what there is now.
  let past = "";

  const at = (href) => "files/" + folder + href;
  // An address of what is looked at.
  const seen = (href, query) => at(href) + [query, past && "snapshot=" + encode(past)].filter(Boolean)
    .map((one, index) => (index ? "&" : "?") + one).join("");
  const said = (text) => { byId("files-said").textContent = text; };
  const report = (error) => said(error.message);
  const encode = (name) => encodeURIComponent(name).replace(/[!'()*]/g, (c) => "%" + c.charCodeAt(0).toString(16));
  const shown = (path) => { try { return decodeURIComponent(path); } catch { return path; } };

  function row(entry) {
    const name = made("td", "");
    const act = made("td", "");
    if (entry.kind === "directory") {
      const link = made("a", entry.name + "/");
      link.href = "#files/" + folder + entry.href;
      name.append(link);
    } else {
      name.textContent = entry.name + (entry.kind === "file" ? "" : " (" + entry.kind + ")");
    }
    if (entry.kind === "file") {
      const save = made("a", "Download");
      // Not the attribute: what browsers save by that, they ask for without the
      // session that belongs to this frame.
      save.href = seen(entry.href, "download");
      save.setAttribute("aria-label", "Download " + entry.name);
      act.append(save);
      if (!past && entry.bytes <= TEXT_BYTES_MAX) act.append(button("Edit", "Edit " + entry.name, () => edit(entry.name, entry.href)));
    }
    if (past) {
      act.append(button("Restore", "Restore " + entry.name, () => restore(entry, false).catch(report)));
      act.append(button("Restore a copy", "Restore a copy of " + entry.name, () => restore(entry, true).catch(report)));
    } else {
      act.append(button("Rename", "Rename " + entry.name, () => rename(entry).catch(report)));
      act.append(button("Delete", "Delete " + entry.name, () => remove(entry).catch(report)));
    }
    const when = new Date(entry.modified * 1000);
    const bytes = entry.bytes === null || entry.bytes === undefined ? "" : String(entry.bytes);
    return made("tr", "", name, made("td", bytes), made("td", when.toLocaleString()), act);
  }

  // The whole address, as programs say it: path routing has more before files/.
  const destination = (path) => new URL("files/" + path, location.href).pathname;
  const taken = (error) => error.status === 412 ? new Error("There is something of this name. Delete or rename that first.") : error;
  async function restore(entry, beside) {
    let name = entry.name;
    if (beside) name = await question("Name of the copy", true, name + ".restored");
    else if (!(await question("Replace what " + name + " is now with this? The present state is kept as a snapshot."))) return;
    if (!name) return;
    const href = beside ? encode(name) : entry.href.replace(/\/$/, "");
    const headers = { Destination: destination(folder + href), Overwrite: beside ? "F" : "T" };
    said("Restoring " + name + "…");
    try {
      await ask(seen(entry.href), { method: "COPY", headers });
    } catch (error) {
      throw error.code === "no_parent" ? new Error("Its folder is no more. Restore that.") : taken(error);
    }
    await states();
    said(name + " is restored.");
  }
  // Which snapshots there are; who may only look sees none.
  async function states() {
    if (!cocalc.terminals) return;
    const { snapshots } = await (await ask(".cocalc/snapshots")).json();
    const options = snapshots.reverse().map((one) => {
      const when = new Date(one.taken * 1000).toLocaleString();
      const option = made("option", "were at " + when + (one.automatic ? "" : " (" + one.name + ")"));
      option.value = one.name;
      return option;
    });
    const now = made("option", "are now");
    now.value = "";
    byId("then").replaceChildren(now, ...options);
    byId("then").value = past;
    byId("former").hidden = !options.length;
  }
  function look(state) {
    past = state;
    byId("changing").hidden = Boolean(past);
    byId("past").hidden = !past;
    if (past) byId("editor").hidden = true;
    list().catch((error) => {
      if (error.status === 404 && folder) { location.hash = "files"; return; }
      report(error);
    });
  }
  byId("then").addEventListener("change", () => look(byId("then").value));

  async function rename(entry) {
    const name = await question("New name of " + entry.name + ", or its new path from the top, beginning with /", true, entry.name);
    if (!name || name === entry.name) return;
    const path = name.startsWith("/") ? name.slice(1).split("/").map(encode).join("/") : folder + encode(name);
    const headers = { Destination: destination(path), Overwrite: "F" };
    try { await ask(at(entry.href), { method: "MOVE", headers }); } catch (error) { throw taken(error); } finally { await list(); }
  }
  async function remove(entry) {
    const folder = entry.kind === "directory";
    if (!(await question("Delete " + entry.name + (folder ? " and all that is in it?" : "?")))) return;
    const href = at(entry.href) + (folder ? "?recursive=true" : "");
    for (let worked = false; !worked;) {
      try {
        await ask(href, { method: "DELETE" });
        worked = true;
      } catch (error) {
        // So much goes at a time only.
        if (error.code !== "unfinished") throw error;
        said(entry.name + ": " + error.message);
      }
    }
    await list();
  }

  async function list(next) {
    const page = await (await ask(next ? at("") + next + "&format=json" : seen("", "format=json"))).json();
    const rows = page.entries.map(row);
    if (!next && folder) {
      const up = made("a", "../");
      up.href = "#files/" + folder.split("/").slice(0, -2).map((one) => one + "/").join("");
      rows.unshift(made("tr", "", made("td", "", up), made("td", ""), made("td", ""), made("td", "")));
    }
    if (next) byId("entries").append(...rows); else byId("entries").replaceChildren(...rows);
    byId("where").textContent = "/" + shown(folder);
    byId("archive").href = seen("", "archive=zip");
    const more = byId("more");
    more.hidden = !page.next;
    more.onclick = () => list(page.next).catch(report);
    if (!next) said(page.entries.length ? "" : "This folder is empty.");
  }

  // An upload says how far it is; a file that is there is replaced only if that
  // is wished.
  function put(file, line, bar, replace) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("PUT", at(encode(file.name)));
      if (!replace) request.setRequestHeader("If-None-Match", "*");
      request.upload.onprogress = (event) => { if (event.lengthComputable) { bar.max = event.total || 1; bar.value = event.loaded; } };
      request.onload = () => {
        if (request.status < 300) { resolve(true); return; }
        if (request.status === 412 && !replace) { resolve(false); return; }
        let told = {};
        try { told = JSON.parse(request.responseText); } catch { /* not the host's own */ }
        reject(new Error(failure(told, "The host answered " + request.status + ".")));
      };
      request.onerror = () => reject(new Error("The connection broke."));
      request.onabort = () => reject(new Error("It was cancelled."));
      line.append(button("Cancel", "Cancel the upload of " + file.name, () => request.abort()));
      request.send(file);
    });
  }
  async function upload(file) {
    const bar = made("progress", "");
    bar.setAttribute("aria-label", "How much of " + file.name + " is there");
    const text = made("span", file.name + " ");
    const line = made("li", "", text, bar);
    byId("uploads").append(line);
    try {
      let done = await put(file, line, bar, false);
      if (!done && await question(file.name + " is there already. Replace it?")) done = await put(file, line, bar, true);
      text.textContent = file.name + (done ? ": uploaded " : ": left as it was ");
      bar.max = bar.value = 1;
    } catch (error) {
      text.textContent = file.name + ": " + error.message + " ";
      bar.remove();
    }
    for (const old of line.querySelectorAll("button")) old.remove();
    line.append(button("Hide", "Hide the upload of " + file.name, () => line.remove()));
  }
  async function uploads(files) {
    for (const file of files) await upload(file);
    await list();
  }

  async function edit(name, href) {
    const answer = await ask(at(href));
    const bytes = new Uint8Array(await answer.arrayBuffer());
    let text;
    try { text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes); } catch {
      said(name + " is not text. Download it.");
      return;
    }
    // A text area knows one kind of line end only.
    const crlf = text.includes("\r\n") && !/[^\r]\n/.test(text);
    editing = { name, href: at(href), tag: answer.headers.get("etag"), crlf };
    byId("editor-name").textContent = name;
    byId("text").value = text;
    byId("editor-said").textContent = "";
    byId("editor").hidden = false;
    byId("text").focus();
  }
  async function save(replace) {
    const headers = replace ? {} : editing.tag ? { "If-Match": editing.tag } : { "If-None-Match": "*" };
    const text = byId("text").value;
    const body = editing.crlf ? text.replace(/\r?\n/g, "\r\n") : text;
    try {
      const answer = await ask(editing.href, { method: "PUT", headers, body });
      editing.tag = answer.headers.get("etag");
      byId("editor-said").textContent = "Saved.";
      await list();
    } catch (error) {
      if (error.status === 412 && !replace) {
        if (await question("Somebody else has changed this file meanwhile. Replace it with your text?")) await save(true);
        else byId("editor-said").textContent = "Not saved: the file was changed meanwhile.";
        return;
      }
      byId("editor-said").textContent = "Not saved: " + error.message;
    }
  }
  byId("editor").addEventListener("submit", (event) => { event.preventDefault(); save(false); });
  byId("close").addEventListener("click", () => { byId("editor").hidden = true; editing = null; });
  byId("upload").addEventListener("change", (event) => {
    uploads([...event.target.files]).catch(report);
    event.target.value = "";
  });
  byId("new-folder").addEventListener("click", async () => {
    const name = await question("Name of the folder", true);
    if (name) ask(at(encode(name)), { method: "MKCOL" }).then(() => list()).catch(report);
  });
  byId("new-file").addEventListener("click", async () => {
    const name = await question("Name of the file", true);
    if (!name) return;
    editing = { name, href: at(encode(name)), tag: null, crlf: false };
    byId("editor-name").textContent = name;
    byId("text").value = "";
    byId("editor-said").textContent = "It is there once it is saved.";
    byId("editor").hidden = false;
    byId("text").focus();
  });
  const files = byId("files");
  files.addEventListener("dragover", (event) => event.preventDefault());
  files.addEventListener("drop", (event) => {
    event.preventDefault();
    if (past) return said("A snapshot is not changed. Choose what the files are now first.");
    uploads([...event.dataTransfer.files]).catch(report);
  });

  cocalc.views.files = {
    show(rest) {
      const parts = rest.split("/").filter((one) => one && one !== "." && one !== "..");
      folder = parts.map((one) => one + "/").join("");
      states().catch(report);
      look(past);
    },
  };
})();
