//! What a project's control group uses, and what it may use, in either version
//! of control groups.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cocalc_core::runner::{LimitKind, Limits, Stats};

use crate::oom::Notices;

const MOUNT: &str = "/sys/fs/cgroup";
/// In what time a CPU quota is used, in microseconds.
const PERIOD_MICROS: u64 = 100_000;
/// The weight of who says nothing.
const WEIGHT: u16 = 100;

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
    kind_at(Path::new(MOUNT))
}

fn kind_at(root: &Path) -> CgroupKind {
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

/// The limits that this machine's control groups can't keep.
pub(crate) fn unenforced() -> Vec<LimitKind> {
    unenforced_at(Path::new(MOUNT), Path::new("/sys/block"))
}

fn unenforced_at(root: &Path, disks: &Path) -> Vec<LimitKind> {
    let kind = kind_at(root);
    let has = |controller: &str| match kind {
        CgroupKind::Unified => fs::read_to_string(root.join("cgroup.controllers"))
            .is_ok_and(|all| all.split_whitespace().any(|one| one == controller)),
        _ => root.join(controller).exists(),
    };
    let mut lacks = Vec::new();
    let mut need = |there: bool, kinds: &[LimitKind]| {
        if !there {
            lacks.extend_from_slice(kinds);
        }
    };
    need(has("memory"), &[LimitKind::Memory]);
    let swap = match kind {
        CgroupKind::Unified => has("memory"),
        _ => root.join("memory/memory.memsw.limit_in_bytes").exists(),
    };
    need(swap, &[LimitKind::Swap]);
    need(has("cpu"), &[LimitKind::Cpu, LimitKind::CpuWeight]);
    need(has("pids"), &[LimitKind::Pids]);
    let io = if kind == CgroupKind::Unified { has("io") } else { has("blkio") };
    need(io && weighs_io(root, disks), &[LimitKind::IoWeight]);
    lacks
}

/// Whether any disk's time is shared by weight: its scheduler is the one that
/// does, or version 2 does it by cost.
fn weighs_io(root: &Path, disks: &Path) -> bool {
    let by_cost = fs::read_to_string(root.join("io.cost.qos")).is_ok_and(|text| text.contains("enable=1"));
    let mut disks = fs::read_dir(disks).into_iter().flatten().flatten();
    by_cost
        || disks.any(|disk| {
            fs::read_to_string(disk.path().join("queue/scheduler")).is_ok_and(|text| text.contains("[bfq]"))
        })
}

/// The groups of one process.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    root: PathBuf,
    text: String,
}

/// One file of a control group, and what to write to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Write {
    file: PathBuf,
    value: String,
}

impl Groups {
    /// Those of `pid`.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        Ok(Self { root: MOUNT.into(), text })
    }

    /// The groups of this container, of which those of its processes may be
    /// parts; `None` if the process is of another one.
    pub(crate) fn of_container(&self, container: &str) -> Option<Self> {
        if container.is_empty() || !self.text.contains(container) {
            return None;
        }
        let line = |line: &str| {
            let end = line.find(container).map_or(line.len(), |at| {
                let name = &line[at..];
                at + name.find('/').unwrap_or(name.len())
            });
            format!("{}\n", &line[..end])
        };
        Some(Self { root: self.root.clone(), text: self.text.lines().map(line).collect() })
    }

    /// The directory of a version 1 controller.
    fn legacy(&self, controller: &str) -> Option<PathBuf> {
        self.text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers
                .split(',')
                .any(|one| one == controller)
                .then(|| self.root.join(controllers).join(path.trim_start_matches('/')))
        })
    }

    /// The directory in the version 2 tree.
    fn unified(&self) -> Option<PathBuf> {
        let path = self.text.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some(self.root.join(path.trim_start_matches('/')))
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
        if kind_at(&self.root) == CgroupKind::Unified {
            let unified = self.unified();
            let (read_bytes, written_bytes) = io_stat(&text(&unified, "io.stat").unwrap_or_default());
            return Stats {
                memory_bytes: count(&unified, "memory.current").unwrap_or(0),
                memory_limit_bytes: count(&unified, "memory.max"),
                cpu_micros: named(text(&unified, "cpu.stat"), "usage_usec").unwrap_or(0),
                pids: count(&unified, "pids.current").unwrap_or(0),
                oom_kills: self.oom_kills(),
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
            oom_kills: self.oom_kills(),
            read_bytes,
            written_bytes,
            ..Stats::default()
        }
    }

    /// What has to be written, in this order, for `limits` to hold. What the
    /// machine can't limit is left out.
    pub(crate) fn plan(&self, limits: &Limits) -> Vec<Write> {
        let mut writes = Vec::new();
        let mut write = |directory: &Option<PathBuf>, file: &str, value: Option<String>| {
            let path = directory.as_ref().map(|directory| directory.join(file));
            if let (Some(file), Some(value)) = (path.filter(|path| path.exists()), value) {
                writes.push(Write { file, value });
            }
        };
        let quota = limits.cpu_millis.map(|millis| u64::from(millis) * PERIOD_MICROS / 1000);
        let cpu_weight = limits.cpu_weight.unwrap_or(WEIGHT);
        let io_weight = limits.io_weight.unwrap_or(WEIGHT);
        // The scheduler that weighs disks' time knows less of a range.
        let bfq = io_weight.clamp(1, 1000).to_string();
        let (memory, swap) = (limits.memory_bytes, limits.swap_bytes.unwrap_or(0));
        if kind_at(&self.root) == CgroupKind::Unified {
            let unified = &self.unified();
            write(unified, "memory.swap.max", memory.map(|_| swap.to_string()));
            write(unified, "memory.max", memory.map(|bytes| bytes.to_string()));
            write(unified, "cpu.max", quota.map(|quota| format!("{quota} {PERIOD_MICROS}")));
            write(unified, "cpu.weight", Some(cpu_weight.to_string()));
            write(unified, "pids.max", limits.pids.map(|pids| pids.to_string()));
            write(unified, "io.weight", Some(format!("default {io_weight}")));
            write(unified, "io.bfq.weight", Some(bfq));
            return writes;
        }
        let group = &self.legacy("memory");
        let (alone, both) = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes");
        let before = group.as_ref().and_then(|group| number(&group.join(both)));
        let all = memory.map(|bytes| bytes.saturating_add(swap));
        // Memory with swap is never less than memory alone, not for a moment.
        let order =
            if all < before { [(alone, memory), (both, all)] } else { [(both, all), (alone, memory)] };
        for (file, bytes) in order {
            write(group, file, bytes.map(|bytes| bytes.to_string()));
        }
        let cpu = &self.legacy("cpu");
        write(cpu, "cpu.cfs_period_us", quota.map(|_| PERIOD_MICROS.to_string()));
        write(cpu, "cpu.cfs_quota_us", quota.map(|quota| quota.to_string()));
        write(cpu, "cpu.shares", Some((u64::from(cpu_weight) * 1024 / 100).max(2).to_string()));
        write(&self.legacy("pids"), "pids.max", limits.pids.map(|pids| pids.to_string()));
        let disk = &self.legacy("blkio");
        // Of its own scale: 500 says nothing there.
        write(disk, "blkio.weight", Some((u32::from(io_weight) * 5).clamp(10, 1000).to_string()));
        write(disk, "blkio.bfq.weight", Some(bfq));
        writes
    }

    /// How much memory can't be given back: what a lower limit must hold.
    pub(crate) fn memory_in_use(&self) -> u64 {
        let unified = kind_at(&self.root) == CgroupKind::Unified;
        let group = if unified { self.unified() } else { self.legacy("memory") };
        let text =
            group.and_then(|group| fs::read_to_string(group.join("memory.stat")).ok()).unwrap_or_default();
        let wanted: &[&str] = if unified { &["anon", "shmem"] } else { &["total_rss", "total_shmem"] };
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(name, _)| wanted.contains(name))
            .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
            .sum()
    }

    /// Counts from now on how often their memory is used up, where the counter of
    /// [`oom_kills`](Self::oom_kills) is all there is otherwise, and goes with them.
    pub(crate) fn notices(&self) -> Option<Notices> {
        if kind_at(&self.root) == CgroupKind::Unified {
            return None;
        }
        let notices = Notices::ask(self.legacy("memory")?);
        notices.inspect_err(|error| tracing::debug!(%error, "no notices of memory that is used up")).ok()
    }

    /// How often the kernel has killed a process of these groups because their
    /// memory was used up.
    pub(crate) fn oom_kills(&self) -> u64 {
        let file = if kind_at(&self.root) == CgroupKind::Unified {
            self.unified().map(|group| group.join("memory.events"))
        } else {
            self.legacy("memory").map(|group| group.join("memory.oom_control"))
        };
        let text = file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
    }
}

impl Write {
    /// Does it.
    pub(crate) fn apply(&self) -> io::Result<()> {
        fs::write(&self.file, &self.value).map_err(|error| {
            let name = self.file.file_name().unwrap_or_default().to_string_lossy();
            io::Error::new(error.kind(), format!("could not set {name} to {}: {error}", self.value))
        })
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

    const ID: &str = "0123456789abcdef";

    /// A tree of control groups with these files, as one of the layouts has it.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name.replace("ID", ID));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn groups(dir: &tempfile::TempDir, text: &str) -> Groups {
        let groups = Groups { root: dir.path().to_owned(), text: text.replace("ID", ID) };
        groups.of_container(ID).unwrap()
    }

    /// What is in each file after the plan was carried out, in its order.
    fn carried_out(dir: &tempfile::TempDir, groups: &Groups, limits: &Limits) -> Vec<String> {
        let plan = groups.plan(limits);
        plan.iter().for_each(|write| write.apply().unwrap());
        let shown = |write: &Write| {
            let name = write.file.strip_prefix(dir.path()).unwrap().display().to_string();
            format!("{} = {}", name.replace(ID, "ID"), fs::read_to_string(&write.file).unwrap())
        };
        plan.iter().map(shown).collect()
    }

    fn limits() -> Limits {
        Limits {
            memory_bytes: Some(1000),
            swap_bytes: Some(500),
            cpu_millis: Some(1500),
            cpu_weight: Some(200),
            pids: Some(64),
            io_weight: Some(50),
            ..Limits::default()
        }
    }

    #[test]
    fn version_2_has_one_directory() {
        let dir = tree(&[
            ("cgroup.controllers", "cpuset cpu io memory pids\n"),
            ("libpod_parent/libpod-ID/memory.max", "max"),
            ("libpod_parent/libpod-ID/memory.swap.max", "max"),
            ("libpod_parent/libpod-ID/cpu.max", "max 100000"),
            ("libpod_parent/libpod-ID/cpu.weight", "100"),
            ("libpod_parent/libpod-ID/pids.max", "max"),
            ("libpod_parent/libpod-ID/io.bfq.weight", "default 100"),
            ("libpod_parent/libpod-ID/memory.events", "low 0\noom 3\noom_kill 2\n"),
            ("libpod_parent/libpod-ID/memory.stat", "anon 10\nfile 20\nshmem 5\n"),
        ]);
        // The process has made itself a group within.
        let groups = groups(&dir, "0::/libpod_parent/libpod-ID/within\n");
        assert_eq!(
            carried_out(&dir, &groups, &limits()),
            [
                "libpod_parent/libpod-ID/memory.swap.max = 500",
                "libpod_parent/libpod-ID/memory.max = 1000",
                "libpod_parent/libpod-ID/cpu.max = 150000 100000",
                "libpod_parent/libpod-ID/cpu.weight = 200",
                "libpod_parent/libpod-ID/pids.max = 64",
                "libpod_parent/libpod-ID/io.bfq.weight = 50",
            ]
        );
        assert_eq!((groups.stats().oom_kills, groups.memory_in_use()), (2, 15));
    }

    #[test]
    fn version_1_has_a_directory_for_each_and_an_order_for_memory() {
        let dir = tree(&[
            ("memory/m/ID/memory.limit_in_bytes", "100"),
            ("memory/m/ID/memory.memsw.limit_in_bytes", "200"),
            ("cpu,cpuacct/c/ID/cpu.cfs_period_us", "100000"),
            ("cpu,cpuacct/c/ID/cpu.cfs_quota_us", "-1"),
            ("cpu,cpuacct/c/ID/cpu.shares", "1024"),
            ("pids/p/ID/pids.max", "max"),
            ("blkio/b/ID/blkio.weight", "500"),
            ("memory/m/ID/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"),
        ]);
        let text = "9:memory:/m/ID\n4:cpu,cpuacct:/c/ID\n3:pids:/p/ID\n2:blkio:/b/ID\n1:name=systemd:/x\n";
        let groups = groups(&dir, text);
        let expected = [
            "memory/m/ID/memory.memsw.limit_in_bytes = 1500",
            "memory/m/ID/memory.limit_in_bytes = 1000",
            "cpu,cpuacct/c/ID/cpu.cfs_period_us = 100000",
            "cpu,cpuacct/c/ID/cpu.cfs_quota_us = 150000",
            "cpu,cpuacct/c/ID/cpu.shares = 2048",
            "pids/p/ID/pids.max = 64",
            "blkio/b/ID/blkio.weight = 250",
        ];
        assert_eq!(carried_out(&dir, &groups, &limits()), expected, "raised: with swap first");
        let less = Limits { memory_bytes: Some(300), swap_bytes: None, ..limits() };
        let lowered = carried_out(&dir, &groups, &less);
        assert_eq!(
            lowered[..2],
            ["memory/m/ID/memory.limit_in_bytes = 300", "memory/m/ID/memory.memsw.limit_in_bytes = 300"],
            "lowered: alone first"
        );
        assert_eq!(groups.stats().oom_kills, 7);
    }

    #[test]
    fn a_hybrid_is_version_1_beside_an_empty_tree() {
        let dir = tree(&[
            ("unified/cgroup.controllers", "\n"),
            ("memory/ID/memory.limit_in_bytes", "100"),
            ("pids/ID/pids.max", "max"),
        ]);
        let groups = groups(&dir, "8:pids:/ID\n4:memory:/ID\n0::/elsewhere/ID\n");
        // Without swap accounting there is no such file.
        assert_eq!(
            carried_out(&dir, &groups, &limits()),
            ["memory/ID/memory.limit_in_bytes = 1000", "pids/ID/pids.max = 64"]
        );
    }

    #[test]
    fn a_process_of_another_container_has_no_groups_here() {
        let groups = Groups { root: MOUNT.into(), text: "0::/libpod-other\n".into() };
        assert!(groups.of_container(ID).is_none() && groups.of_container("").is_none());
    }

    #[test]
    fn what_a_machine_lacks_is_named() {
        use LimitKind::{Cpu, CpuWeight, IoWeight, Memory, Pids, Swap};
        let disks = tree(&[("sda/queue/scheduler", "none [mq-deadline] bfq\n")]);
        let weighing = tree(&[("sda/queue/scheduler", "none [bfq]\n")]);
        let lacks = |files: &[(&str, &str)], disks: &tempfile::TempDir| {
            unenforced_at(tree(files).path(), disks.path())
        };
        let all = [("cgroup.controllers", "cpu io memory pids\n")];
        assert_eq!(lacks(&all, &weighing), []);
        assert_eq!(lacks(&all, &disks), [IoWeight]);
        let cost = [all[0], ("io.cost.qos", "254:0 enable=1 ctrl=auto\n")];
        assert_eq!(lacks(&cost, &disks), []);
        assert_eq!(
            lacks(&[("cgroup.controllers", "pids\n")], &disks),
            [Memory, Swap, Cpu, CpuWeight, IoWeight]
        );
        let legacy = [("memory/x", ""), ("cpu/x", ""), ("pids/x", ""), ("blkio/x", "")];
        assert_eq!(lacks(&legacy, &weighing), [Swap]);
        assert_eq!(lacks(&[], &weighing), [Memory, Swap, Cpu, CpuWeight, Pids, IoWeight]);
    }

    #[test]
    fn bytes_of_disks_are_summed_in_both_versions() {
        let text = "8:0 rbytes=10 wbytes=20 rios=1 wios=1\n7:1 rbytes=5 wbytes=1 rios=0 wios=0 dbytes=9\n";
        assert_eq!(io_stat(text), (15, 21));
        let text = "8:0 Read 10\n8:0 Write 20\n8:0 Sync 3\n7:1 Read 5\n8:0 Total 33\nTotal 33\n";
        assert_eq!(blkio(text), (15, 20));
        assert_eq!((io_stat(""), blkio("")), ((0, 0), (0, 0)));
    }
}
