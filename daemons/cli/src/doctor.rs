//! `cocalc doctor`: what this machine can and cannot do, and what mends it.

use std::{net::TcpListener, process::ExitCode};

use serde::Serialize;

use crate::{
    args::{DirOption, Output},
    failure::{Exit, Failure},
    output::print,
    up::btrfs_lack,
    verbs::size,
};

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    /// `ok`, `weaker` (works, but less well) or `missing`.
    state: &'static str,
    found: String,
    /// The command that mends it, if one does.
    mend: String,
}

/// Free bytes below which the demonstration may not fit.
const FREE_MIN: u64 = 6 << 30;

/// Looks at everything, and exits 1 if something that a real host needs is
/// missing.
pub(crate) fn run(options: &DirOption, output: Output) -> Result<ExitCode, Failure> {
    let findings = look(options);
    let value = serde_json::to_value(&findings)
        .map_err(|e| Failure::new(Exit::Failed, format!("cannot print the findings: {e}")))?;
    print(output, &value, &["what", "state", "found", "mend"]);
    let missing = findings.iter().any(|finding| finding.state == "missing");
    if missing && output == Output::Table {
        eprintln!(
            "\nWithout these, projects run as plain processes in plain directories: good for development,\n\
             not for people who don't trust each other."
        );
    }
    Ok(if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn look(options: &DirOption) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |what, state, found: String, mend: &str| {
        findings.push(Finding { what, state, found, mend: mend.to_owned() });
    };
    let uname = rustix::system::uname();
    add("kernel", "ok", uname.release().to_string_lossy().into_owned(), "");

    let probe = cocalc_podman::probe();
    match (&probe.podman, &probe.runtime) {
        (Some(podman), Some(runtime)) => add("containers", "ok", format!("podman {podman}, {runtime}"), ""),
        (podman, _) => add(
            "containers",
            "missing",
            podman.as_ref().map_or("no podman".into(), |v| format!("podman {v}, no OCI runtime that works")),
            "apt-get install -y --no-install-recommends podman conmon runc",
        ),
    }
    add("cgroups", "ok", format!("{:?}", probe.cgroups).to_lowercase(), "");
    if probe.landlock && !probe.landlock_scopes {
        let what = "can be confined by Landlock (confine_processes = true), but not in whom they signal: that \
            needs Linux 6.12";
        add("plain processes", "weaker", what.into(), "");
    } else if probe.landlock {
        add("plain processes", "ok", "can be confined by Landlock: confine_processes = true".into(), "");
    } else {
        add("plain processes", "weaker", "not confined: the kernel has no Landlock".into(), "");
    }
    match probe.nofile_hard {
        Some(limit) => add("open files", if limit < 8192 { "weaker" } else { "ok" }, limit.to_string(), ""),
        None => add("open files", "ok", "unlimited".into(), ""),
    }
    for lack in &probe.lacks {
        add("requirement", if lack.optional { "weaker" } else { "missing" }, lack.what.clone(), &lack.mend);
    }

    match btrfs_lack() {
        None => add("btrfs", "ok", "volumes can be made".into(), ""),
        Some(lack) => add("btrfs", "missing", lack, "apt-get install -y btrfs-progs"),
    }
    // Simple quotas came with Linux 6.7.
    let simple = kernel_at_least(&uname.release().to_string_lossy(), 6, 7);
    add(
        "quotas",
        if simple { "ok" } else { "weaker" },
        if simple { "simple quotas" } else { "none: the kernel is older than 6.7" }.into(),
        "",
    );

    let place = if options.dir.exists() { options.dir.clone() } else { ".".into() };
    match rustix::fs::statvfs(&place) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            add("free space", if free < FREE_MIN { "weaker" } else { "ok" }, size(free), "");
        }
        Err(error) => add("free space", "weaker", format!("unknown: {error}"), ""),
    }
    let taken: Vec<String> = [7800, 7801, 7802, 7810, 7811, 7812, 7820, 7821, 7822]
        .iter()
        .filter(|port| TcpListener::bind(("127.0.0.1", **port)).is_err())
        .map(u16::to_string)
        .collect();
    if taken.is_empty() {
        add("ports", "ok", "7800 and those after it are free".into(), "");
    } else {
        add("ports", "weaker", format!("taken: {}", taken.join(", ")), "cocalc up --base-port N");
    }
    findings
}

/// Whether a kernel release such as `6.18.1-amd64` is at least this version.
fn kernel_at_least(release: &str, major: u32, minor: u32) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(a)), Some(Ok(b))) => (a, b) >= (major, minor),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::kernel_at_least;

    #[test]
    fn kernel_releases_compare_by_number() {
        assert!(kernel_at_least("6.18.44-fc", 6, 7) && kernel_at_least("7.0", 6, 7));
        assert!(!kernel_at_least("6.1.0-13-amd64", 6, 7) && !kernel_at_least("5.10", 6, 7));
        assert!(!kernel_at_least("next", 6, 7));
    }
}
