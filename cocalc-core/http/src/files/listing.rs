//! What a directory shows: for programs as JSON, for people as a small page.

use std::fmt::Write as _;

use cocalc_core::ids::SnapshotName;
use rustix::fs::{FileType, Stat};
use serde_json::json;

use super::{
    conditions::seconds,
    path::{FilePath, encode},
    tree::{Entry, Page, version},
};
use crate::problem::{escape, page as html_page};

/// The listing as JSON.
pub(crate) fn json(path: &FilePath, state: Option<&SnapshotName>, page: &Page, max: usize) -> String {
    let entries: Vec<_> = page
        .entries
        .iter()
        .map(|entry| {
            json!({
                // For people: what is not text is replaced in it.
                "name": String::from_utf8_lossy(&entry.name),
                "href": href(entry),
                "kind": kind(&entry.stat),
                "bytes": bytes(&entry.stat),
                "modified": entry.stat.st_mtime,
                // For `If-Match`.
                "etag": version(&entry.stat).tag,
                "mode": format!("{:04o}", entry.stat.st_mode & 0o7777),
            })
        })
        .collect();
    json!({ "path": path.encoded(), "snapshot": state, "entries": entries, "next": next(page, state, max) })
        .to_string()
}

/// The listing as a page that needs no script.
pub(crate) fn html(path: &FilePath, state: Option<&SnapshotName>, page: &Page, max: usize) -> String {
    let mut rows = String::new();
    let same = question(state, '?');
    if path.name().is_some() {
        let _ = writeln!(rows, "<tr><td><a href=\"../{same}\">../</a></td><td></td><td></td></tr>");
    }
    for entry in &page.entries {
        let name = escape(&String::from_utf8_lossy(&entry.name));
        let (kind, when) = (kind(&entry.stat), httpdate::fmt_http_date(seconds(entry.stat.st_mtime)));
        let shown = match kind {
            "file" => format!("<a href=\"{}{same}\">{name}</a>", href(entry)),
            "directory" => format!("<a href=\"{}{same}\">{name}/</a>", href(entry)),
            "link" => format!("{name} (a link)"),
            _ => format!("{name} (not a file)"),
        };
        let size = bytes(&entry.stat).map(|bytes| bytes.to_string()).unwrap_or_default();
        // Writing to a string does not fail.
        let _ = writeln!(rows, "<tr><td>{shown}</td><td align=\"right\">{size}</td><td>{when}</td></tr>");
    }
    let more = next(page, state, max).map(|next| format!("<p><a href=\"{}\">More</a></p>", escape(&next)));
    let also = escape(&question(state, '&'));
    let body = format!(
        "<table><thead><tr><th align=\"left\">Name</th><th align=\"right\">Bytes</th>\
         <th align=\"left\">Modified</th></tr></thead><tbody>\n{rows}</tbody></table>{}\
         <p>Download all of it: <a href=\"?archive=zip{also}\">zip</a> <a href=\"?archive=tar{also}\">tar</a></p>",
        more.unwrap_or_default()
    );
    let title = state.map_or_else(|| path.shown(), |state| format!("{} in {state}", path.shown()));
    html_page(&title, "", &body)
}

/// The question for what comes next.
fn next(page: &Page, state: Option<&SnapshotName>, max: usize) -> Option<String> {
    let last = page.entries.last().filter(|_| page.more)?;
    Some(format!("?after={}&max={max}{}", encode(&last.name), question(state, '&')))
}

/// What keeps to a former state.
fn question(state: Option<&SnapshotName>, before: char) -> String {
    let name = |state: &SnapshotName| format!("{before}snapshot={}", encode(state.as_str().as_bytes()));
    state.map(name).unwrap_or_default()
}

/// Relative to the directory. Every special character is escaped, so it is
/// never read as an address of another kind.
fn href(entry: &Entry) -> String {
    let slash = if kind(&entry.stat) == "directory" { "/" } else { "" };
    format!("{}{slash}", encode(&entry.name))
}

fn kind(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "link",
        _ => "other",
    }
}

fn bytes(stat: &Stat) -> Option<u64> {
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_file { u64::try_from(stat.st_size).ok() } else { None }
}
