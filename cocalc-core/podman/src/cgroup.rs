//! What a process's control group uses, in either version of cgroups.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cocalc_core::runner::Stats;

const MOUNT: &str = "/sys/fs/cgroup";

/// How this machine's control groups are mounted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum CgroupKind {
    /// One tree, version 2.
    Unified,
    /// Version 1 trees, with an empty version 2 tree beside them.
    Hybrid,
    /// Version 1 trees only.
    Legacy,
    /// None.
    Missing,
}

/// Finds out how control groups are mounted.
pub(crate) fn kind() -> CgroupKind {
    let root = Path::new(MOUNT);
    if root.join("cgroup.controllers").exists() {
        CgroupKind::Unified
    } else if root.join("unified/cgroup.controllers").exists() {
        CgroupKind::Hybrid
    } else if root.join("memory").exists() {
        CgroupKind::Legacy
    } else {
        CgroupKind::Missing
    }
}

/// The groups of one process.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    text: String,
}

impl Groups {
    /// Those of `pid`.
    pub(crate) fn of(pid: i32) -> std::io::Result<Self> {
        fs::read_to_string(format!("/proc/{pid}/cgroup")).map(|text| Self { text })
    }

    /// Whether the group is named after this container.
    pub(crate) fn names(&self, container: &str) -> bool {
        !container.is_empty() && self.text.contains(container)
    }

    /// The directory of a version 1 controller.
    fn legacy(&self, controller: &str) -> Option<PathBuf> {
        self.text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers
                .split(',')
                .any(|one| one == controller)
                .then(|| Path::new(MOUNT).join(controllers).join(path.trim_start_matches('/')))
        })
    }

    /// The directory in the version 2 tree.
    fn unified(&self) -> Option<PathBuf> {
        let path = self.text.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some(Path::new(MOUNT).join(path.trim_start_matches('/')))
    }

    /// What is used now. Zero where the kernel does not say.
    pub(crate) fn stats(&self) -> Stats {
        let read = |directory: Option<PathBuf>, file: &str| number(&directory?.join(file));
        if kind() == CgroupKind::Unified {
            let unified = self.unified();
            let cpu = unified.as_ref().and_then(|path| fs::read_to_string(path.join("cpu.stat")).ok());
            return Stats {
                memory_bytes: read(unified.clone(), "memory.current").unwrap_or(0),
                cpu_micros: cpu
                    .and_then(|text| {
                        text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok())
                    })
                    .unwrap_or(0),
                pids: read(unified, "pids.current").unwrap_or(0),
            };
        }
        Stats {
            memory_bytes: read(self.legacy("memory"), "memory.usage_in_bytes").unwrap_or(0),
            cpu_micros: read(self.legacy("cpuacct"), "cpuacct.usage").unwrap_or(0) / 1000,
            pids: read(self.legacy("pids"), "pids.current").unwrap_or(0),
        }
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
