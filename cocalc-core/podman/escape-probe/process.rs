//! Who the process is: namespaces, ids, capabilities, filter, descriptors.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt};

use crate::{Report, Told, sys};

/// chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap,
/// net_bind_service, sys_chroot, audit_write, setfcap.
const BOUNDING: u64 = 0xa004_05fb;
/// How many ids a project has.
const IDS: u64 = 65_536;

pub(crate) fn check(told: &Told, report: &mut Report) {
    namespaces(told, report);
    ids(report);
    status(told, report);
    descriptors(report);
    others(told, report);
}

fn namespaces(told: &Told, report: &mut Report) {
    for kind in ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"] {
        let name = format!("namespace {kind}");
        let Ok(about) = fs::metadata(format!("/proc/self/ns/{kind}")) else {
            report.note(&name, false, "not there");
            continue;
        };
        let mut foreign = told.foreign_ns.iter().filter(|(other, _)| other == kind).peekable();
        // Without one to compare with, nothing is known.
        let known = foreign.peek().is_some();
        let same = foreign.any(|(_, inode)| *inode == about.ino());
        report.note(&name, known && !same, about.ino().to_string());
    }
}

fn ids(report: &mut Report) {
    for file in ["uid_map", "gid_map"] {
        let text = fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
        let fields: Vec<u64> = text.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        // One range, of ids that are nobody's outside.
        let ok = matches!(fields[..], [0, outside, IDS] if outside >= IDS);
        report.note(file, ok, text.split_whitespace().collect::<Vec<_>>().join(" "));
    }
}

fn status(told: &Told, report: &mut Report) {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let fields: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.split_once(':')).map(|(a, b)| (a, b.trim())).collect();
    let field = |name: &str| fields.get(name).copied().unwrap_or_default();
    let caps = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(u64::MAX);
    let root = field("Uid").starts_with("0\t");
    report.note("capabilities bounding", caps("CapBnd") == BOUNDING, field("CapBnd"));
    for name in ["CapInh", "CapAmb"] {
        report.note(&format!("capabilities {name}"), caps(name) == 0, field(name));
    }
    // What root has there is within the bound; others have none.
    let own = if root { caps("CapEff") & !BOUNDING } else { caps("CapEff") | caps("CapPrm") };
    report.note("capabilities effective", own == 0, field("CapEff"));
    report.note("seccomp", field("Seccomp") == "2", field("Seccomp"));
    let wanted = if told.strict { "1" } else { "0" };
    report.note("no_new_privs", field("NoNewPrivs") == wanted, field("NoNewPrivs"));
}

/// Descriptors that were left open by whoever started this.
fn descriptors(report: &mut Report) {
    let mut more = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        let number = entry.file_name().to_string_lossy().parse().unwrap_or(0);
        let target = fs::read_link(entry.path()).unwrap_or_default();
        // The directory that is being read is one of them.
        if number > 2 && !target.ends_with("fd") {
            more.push(format!("{number}={}", target.display()));
        }
    }
    report.note("descriptors inherited", more.is_empty(), more.join(" "));
}

/// Processes that are not the project's.
fn others(told: &Told, report: &mut Report) {
    let mut count = 0;
    let mut foreign = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.parse::<u32>().is_err() {
            continue;
        }
        count += 1;
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let text = [read("cgroup"), read("cmdline"), read("environ"), read("mountinfo")].concat();
        let text = String::from_utf8_lossy(&text);
        for other in &told.foreign {
            // This process itself was told the word.
            if text.contains(other) && name != std::process::id().to_string() && !text.contains("--foreign") {
                foreign.push(format!("{name}: {other}"));
            }
        }
    }
    report.note(
        "processes of others",
        foreign.is_empty() && count > 0,
        format!("{count} seen; {}", foreign.join(", ")),
    );
    let first = fs::read_to_string("/proc/1/comm").unwrap_or_default();
    report.note("first process", first.trim() == "cocalc-init", first.trim());
    // A host's processes have numbers that are not there.
    let traced = sys::call(sys::Call(101, 117), [16, 0x7fff_fff0, 0, 0, 0, 0]);
    report.note("ptrace of a process that is not here", traced.is_err(), format!("{traced:?}"));
}
