"use strict";
// What the pages of a project have in common: its own, and the master's around it.
// Names of files, and whatever else is somebody's text, become text nodes and
// nothing else.
const byId = (id) => document.getElementById(id);
const made = (kind, text, ...inside) => {
  const node = document.createElement(kind);
  node.textContent = text;
  node.append(...inside);
  return node;
};
// Makes buttons; what goes wrong when one is pressed is for `failed` to say.
const buttons = (failed) => (text, label, act) => {
  const node = made("button", text);
  node.type = "button";
  node.setAttribute("aria-label", label);
  node.addEventListener("click", () => { Promise.resolve(act()).catch(failed); });
  return node;
};
// What helps, by the codes of hosts, proxies and the master.
const HELP = {
  unauthenticated: "Sign in, and open the project again.",
  token_expired: "Open the project again.",
  access_denied: "Ask its owner to add you, or sign in with another account.",
  session_conflict: "Delete the cookies of this site, and open the project again.",
  origin_refused: "Open the project at its own address.",
  rate_limited: "Wait a moment, and try again.",
  too_many_terminals: "Close a terminal that you do not need.",
  app_refused: "Start the app in a terminal, or choose another port.",
  app_timeout: "See in a terminal what the app does.",
  project_stopped: "Open the project again: that starts it.",
  project_failed: "Ask whoever runs this place, if starting it again does not help.",
  project_busy: "Try again when what is under way has ended.",
  host_unreachable: "Try again in a minute; then ask whoever runs this place.",
  host_unavailable: "Try again in a minute; then ask whoever runs this place.",
  host_fenced: "Its host is lost. It is there again once it has been restored elsewhere.",
  not_empty: "Choose to delete all that is in it.",
  precondition_failed: "Somebody else has changed it: look at it again first.",
  changed: "Look at it again first.",
  link_refused: "Use the file that the link names.",
  file_refused: "See in a terminal whose it is, and what may be done with it.",
  too_large: "Upload it in parts, or with rsync or sftp.",
  repository_unavailable: "Try again later; backups wait for their storage.",
  operation_ended: "Look what became of it, and begin again.",
};
// The text of a failure, and what helps, unless the text says so itself.
const failure = (said, otherwise) => {
  const text = said.message || said.detail || otherwise;
  const help = Object.hasOwn(HELP, said.code) ? HELP[said.code] : "";
  return help && !text.endsWith(help) ? text.replace(/([^.!?])$/, "$1.") + " " + help : text;
};
// An answer that is a success; others are errors with status, code and location.
async function succeeded(answer, who) {
  if (answer.ok) return answer;
  let said = {};
  try { said = await answer.json(); } catch { /* not their own answer */ }
  const error = new Error(failure(said, who + " answered " + answer.status + "."));
  throw Object.assign(error, { status: answer.status, code: said.code, location: said.location });
}
