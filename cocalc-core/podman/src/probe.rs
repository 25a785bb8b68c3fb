//! What this machine has of what the podman runner needs, and what mends it.

use std::{path::Path, process::Command};

use cocalc_core::runner::LimitKind;

use crate::{
    cgroup::{self, CgroupKind},
    command::run_blocking,
    podman::find_program,
};

/// What was found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunnerProbe {
    /// podman's version, if it is there.
    pub podman: Option<String>,
    /// The OCI runtime that works here, with its version.
    pub runtime: Option<String>,
    /// How control groups are mounted.
    pub cgroups: CgroupKind,
    /// The hard limit of open files, which no project's can exceed.
    pub nofile_hard: Option<u64>,
    /// The limits that this machine can't enforce.
    pub unenforced: Vec<LimitKind>,
    /// Whether the kernel has Landlock, which confines plain processes.
    pub landlock: bool,
    /// Whether it also keeps their signals and abstract sockets apart.
    pub landlock_scopes: bool,
    /// Whether this process is root.
    pub root: bool,
    /// What is missing; empty if everything is there.
    pub lacks: Vec<Lack>,
}

/// One thing that is missing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lack {
    /// What is missing, for people.
    pub what: String,
    /// The command that mends it on Debian and Ubuntu; empty if none does.
    pub mend: String,
    /// Whether the podman runner works without it.
    pub optional: bool,
}

/// Looks at this machine. Blocks for as long as `podman version` takes.
pub fn probe() -> RunnerProbe {
    let mut lacks = Vec::new();
    let mut lack = |what: &str, mend: &str, optional| {
        lacks.push(Lack { what: what.into(), mend: mend.into(), optional });
    };
    let root = rustix::process::geteuid().is_root();
    if !root {
        lack("this user is not root: containers of other users' ranges need it", "sudo -i", false);
    }
    let podman = find_program("podman").and_then(|program| version(&program));
    if podman.is_none() {
        lack("podman", "apt-get install -y --no-install-recommends podman conmon", false);
    }
    let runtime = working_runtime();
    if runtime.is_none() {
        lack("an OCI runtime that works here", "apt-get install -y runc", false);
    }
    for (program, package, optional) in
        [("ip", "iproute2", false), ("nft", "nftables", false), ("mmdebstrap", "mmdebstrap", true)]
    {
        if find_program(program).is_none() {
            lack(program, &format!("apt-get install -y {package}"), optional);
        }
    }
    for (path, what, mend) in [
        ("/proc/self/ns/user", "user namespaces in the kernel", ""),
        ("/proc/self/ns/net", "network namespaces in the kernel", ""),
    ] {
        if !Path::new(path).exists() {
            lack(what, mend, false);
        }
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        lack("the overlay file system in the kernel", "modprobe overlay", false);
    }
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    if limit.trim() == "0" {
        lack("user namespaces are turned off", "sysctl -w user.max_user_namespaces=65536", false);
    }
    let unenforced = cgroup::unenforced();
    for kind in &unenforced {
        let (why, mend) = unenforced_because(*kind);
        lack(&format!("limits of {kind} are not enforced: {why}"), mend, true);
    }
    let nofile_hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    if nofile_hard.is_some_and(|limit| limit < 8192) {
        lack("the hard limit of open files is below 8192", "ulimit -Hn 1048576", true);
    }
    RunnerProbe {
        podman,
        runtime: runtime.as_deref().map(runtime_version),
        cgroups: cgroup::kind(),
        nofile_hard,
        unenforced,
        landlock: crate::process::landlock(),
        landlock_scopes: crate::process::landlock_scopes(),
        root,
        lacks,
    }
}

/// The OCI runtime that works with this machine's control groups: crun refuses
/// version 1 and hybrid ones.
pub(crate) fn working_runtime() -> Option<String> {
    let candidates: &[&str] =
        if cgroup::kind() == CgroupKind::Unified { &["crun", "runc"] } else { &["runc"] };
    candidates.iter().find(|name| find_program(name).is_some()).map(|name| (*name).to_owned())
}

/// A runtime's name and version.
pub(crate) fn runtime_version(runtime: &str) -> String {
    let version = find_program(runtime).and_then(|program| version(&program));
    version.map_or_else(|| runtime.to_owned(), |version| format!("{runtime} {version}"))
}

/// Why a limit can't be enforced, and what mends it.
pub(crate) fn unenforced_because(kind: LimitKind) -> (&'static str, &'static str) {
    match kind {
        LimitKind::IoWeight => {
            ("no disk's scheduler shares its time by weight", "echo bfq > /sys/block/<disk>/queue/scheduler")
        }
        LimitKind::Swap => ("the kernel does not account swap (swapaccount=1)", ""),
        _ => ("the kernel has no control group for it", ""),
    }
}

/// The version that a program prints, as its first word that looks like one.
fn version(program: &Path) -> Option<String> {
    let mut command = Command::new(program);
    command.arg("--version");
    let text = run_blocking(command, "").ok()?;
    text.split_whitespace()
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()))
        .map(|word| word.trim_end_matches(',').to_owned())
}
