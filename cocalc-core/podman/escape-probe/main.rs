//! Looks, from within a project, for whatever could lead out of it.
//!
//! Each check prints one line of JSON, `{"check", "ok", "found"}`, and the end
//! status is 1 if one of them is not `ok`. Nothing here changes anything: files
//! are opened and not written, calls are made so that the kernel refuses them
//! for their arguments where no policy refuses them before. So it can be run
//! outside a project too, where it has to fail: a probe that cannot is no test.
//!
//! What it cannot know by itself it is told: `--strict`, `--foreign-ns
//! KIND=INODE` (a namespace that must not be this one), `--deny ADDRESS:PORT`,
//! `--deny-udp ADDRESS:PORT`, `--allow ADDRESS:PORT`, `--abstract NAME` (a
//! socket that must not be there), `--absent PATH` (a path of the host),
//! `--foreign TEXT` (what must be named nowhere).

mod calls;
mod files;
mod network;
mod process;
mod sys;

use std::io::Write;

/// What was found, line by line.
#[derive(Debug, Default)]
pub(crate) struct Report {
    failed: bool,
}

impl Report {
    /// Notes one check.
    pub(crate) fn note(&mut self, check: &str, ok: bool, found: impl AsRef<str>) {
        self.failed |= !ok;
        let line =
            format!("{{\"check\":{},\"ok\":{ok},\"found\":{}}}\n", quoted(check), quoted(found.as_ref()));
        // Nobody to tell if that fails; the end status still says it.
        let _ = std::io::stdout().write_all(line.as_bytes());
    }
}

/// A string of JSON.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars().take(400) {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            control if u32::from(control) < 32 => out.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

/// What the probe was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) strict: bool,
    pub(crate) foreign_ns: Vec<(String, u64)>,
    pub(crate) deny: Vec<String>,
    pub(crate) deny_udp: Vec<String>,
    pub(crate) allow: Vec<String>,
    pub(crate) abstracts: Vec<String>,
    pub(crate) absent: Vec<String>,
    pub(crate) foreign: Vec<String>,
}

fn told(mut args: impl Iterator<Item = String>) -> Result<Told, String> {
    let mut told = Told::default();
    while let Some(option) = args.next() {
        if option == "--strict" {
            told.strict = true;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{option} needs a value"))?;
        match option.as_str() {
            "--foreign-ns" => {
                let (kind, inode) = value.split_once('=').ok_or("--foreign-ns: KIND=INODE")?;
                let inode = inode.parse().map_err(|_| "--foreign-ns: the inode is a number")?;
                told.foreign_ns.push((kind.into(), inode));
            }
            "--deny" => told.deny.push(value),
            "--deny-udp" => told.deny_udp.push(value),
            "--allow" => told.allow.push(value),
            "--abstract" => told.abstracts.push(value),
            "--absent" => told.absent.push(value),
            "--foreign" => told.foreign.push(value),
            _ => return Err(format!("unknown option {option}")),
        }
    }
    Ok(told)
}

fn main() {
    let mut args = std::env::args().skip(1).peekable();
    if args.peek().is_some_and(|first| first == "--try-unshare") {
        // A child of the check below: only a process with a single thread may.
        std::process::exit(calls::unshare_child());
    }
    let told = told(args).unwrap_or_else(|error| {
        eprintln!("escape-probe: {error}");
        std::process::exit(2)
    });
    let mut report = Report::default();
    process::check(&told, &mut report);
    calls::check(&mut report);
    files::check(&told, &mut report);
    network::check(&told, &mut report);
    std::process::exit(i32::from(report.failed));
}
