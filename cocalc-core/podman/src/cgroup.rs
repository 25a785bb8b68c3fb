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

    /// What is used now. Zero where the kernel does not say. What only the
    /// network knows is not in it.
    pub(crate) fn stats(&self) -> Stats {
        let text =
            |directory: &Option<PathBuf>, file: &str| fs::read_to_string(directory.as_ref()?.join(file)).ok();
        let count = |directory: &Option<PathBuf>, file: &str| number(&directory.as_ref()?.join(file));
        let named = |text: Option<String>, name: &str| {
            text?.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
        };
        if kind() == CgroupKind::Unified {
            let unified = self.unified();
            let (read_bytes, written_bytes) = io_stat(&text(&unified, "io.stat").unwrap_or_default());
            return Stats {
                memory_bytes: count(&unified, "memory.current").unwrap_or(0),
                memory_limit_bytes: count(&unified, "memory.max"),
                cpu_micros: named(text(&unified, "cpu.stat"), "usage_usec").unwrap_or(0),
                pids: count(&unified, "pids.current").unwrap_or(0),
                oom_kills: named(text(&unified, "memory.events"), "oom_kill").unwrap_or(0),
                read_bytes,
                written_bytes,
                ..Stats::default()
            };
        }
        let (memory, disks) = (self.legacy("memory"), self.legacy("blkio"));
        let (read_bytes, written_bytes) =
            blkio(&text(&disks, "blkio.throttle.io_service_bytes_recursive").unwrap_or_default());
        // Without a limit it is the largest multiple of a page.
        let limit = count(&memory, "memory.limit_in_bytes").filter(|limit| *limit < 1 << 60);
        Stats {
            memory_bytes: count(&memory, "memory.usage_in_bytes").unwrap_or(0),
            memory_limit_bytes: limit,
            cpu_micros: count(&self.legacy("cpuacct"), "cpuacct.usage").unwrap_or(0) / 1000,
            pids: count(&self.legacy("pids"), "pids.current").unwrap_or(0),
            oom_kills: named(text(&memory, "memory.oom_control"), "oom_kill").unwrap_or(0),
            read_bytes,
            written_bytes,
            ..Stats::default()
        }
    }
}

/// Bytes read and written, of version 2's `io.stat`, over all devices.
fn io_stat(text: &str) -> (u64, u64) {
    let sum = |name: &str| {
        let fields =
            text.split_whitespace().filter_map(|field| field.strip_prefix(name)?.parse::<u64>().ok());
        fields.fold(0, u64::saturating_add)
    };
    (sum("rbytes="), sum("wbytes="))
}

/// The same of version 1's: `8:0 Read 4096` for each device and kind.
fn blkio(text: &str) -> (u64, u64) {
    let sum = |kind: &str| {
        let counts = text.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            (fields.next()? == kind).then(|| fields.next()?.parse::<u64>().ok()).flatten()
        });
        counts.fold(0, u64::saturating_add)
    };
    (sum("Read"), sum("Write"))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_disks_are_summed_in_both_versions() {
        let text = "8:0 rbytes=10 wbytes=20 rios=1 wios=1\n7:1 rbytes=5 wbytes=1 rios=0 wios=0 dbytes=9\n";
        assert_eq!(io_stat(text), (15, 21));
        let text = "8:0 Read 10\n8:0 Write 20\n8:0 Sync 3\n7:1 Read 5\n8:0 Total 33\nTotal 33\n";
        assert_eq!(blkio(text), (15, 20));
        assert_eq!((io_stat(""), blkio("")), ((0, 0), (0, 0)));
    }
}
