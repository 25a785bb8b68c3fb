//! A control group for each worker, in either version of cgroups.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::bounds::Bounds;

/// Where the kernel shows its trees of groups.
pub(crate) const MOUNT: &str = "/sys/fs/cgroup";

/// The group of one worker, in each tree that limits something. It is removed
/// when this is dropped, which works once the worker has ended.
#[derive(Debug)]
pub(crate) struct Group {
    directories: Vec<PathBuf>,
}

impl Drop for Group {
    fn drop(&mut self) {
        for directory in &self.directories {
            // One that is still in use is swept when the next daemon starts.
            let _ = fs::remove_dir(directory);
        }
    }
}

impl Group {
    /// Makes one below `parent`, which is relative to the root of the trees at
    /// `mount`. `None` if there are none, or none that this process may change.
    pub(crate) fn make(mount: &Path, parent: &Path, bounds: &Bounds) -> Option<Self> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let mut group = Self { directories: Vec::new() };
        for (tree, limits) in trees(mount, bounds) {
            let directory = tree.join(parent).join(&name);
            if tree.join("cgroup.controllers").exists() {
                delegate(&tree, parent);
            }
            if fs::create_dir_all(&directory).is_err() {
                continue;
            }
            group.directories.push(directory.clone());
            let set: Vec<_> = limits.iter().map(|(file, value)| set(&directory.join(file), value)).collect();
            if !set.iter().any(Result::is_ok) {
                let _ = fs::remove_dir(&directory);
                group.directories.pop();
            }
        }
        (!group.directories.is_empty()).then_some(group)
    }

    /// What a worker joins.
    pub(crate) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }
}

/// Removes the groups of daemons that are no more.
pub(crate) fn sweep(mount: &Path, parent: &Path) {
    for (tree, _) in trees(mount, &Bounds::default()) {
        for entry in fs::read_dir(tree.join(parent)).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let daemon = name.to_str().and_then(|name| name.split_once('-')).map(|(pid, _)| pid);
            if daemon.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
            {
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}

/// The trees that can limit something, and what is set in them.
fn trees(mount: &Path, bounds: &Bounds) -> Vec<(PathBuf, Vec<(&'static str, String)>)> {
    let cpu = bounds.cpu_weight.clamp(1, 10_000);
    let io = bounds.io_weight.clamp(1, 10_000);
    let memory = bounds.memory_bytes_max.to_string();
    if mount.join("cgroup.controllers").exists() {
        let limits = vec![
            ("memory.max", memory),
            ("cpu.weight", cpu.to_string()),
            ("io.weight", format!("default {io}")),
        ];
        return vec![(mount.to_owned(), limits)];
    }
    // Version 1, with or without an empty tree of version 2 beside it. Others
    // have 1024 there on the processor, and 500 on the disk, or 100 with BFQ.
    let shares = (u32::from(cpu) * 1024 / 100).max(2).to_string();
    let weight = (u32::from(io) * 5).clamp(10, 1000).to_string();
    [
        ("memory", vec![("memory.limit_in_bytes", memory)]),
        ("cpu", vec![("cpu.shares", shares)]),
        ("blkio", vec![("blkio.bfq.weight", u32::from(io).min(1000).to_string()), ("blkio.weight", weight)]),
    ]
    .into_iter()
    .map(|(controller, limits)| (mount.join(controller), limits))
    .filter(|(tree, _)| tree.join("cgroup.procs").exists())
    .collect()
}

/// Passes the controllers on, from the root down to `parent`. One that is not
/// there, or not given to us, stays off.
fn delegate(tree: &Path, parent: &Path) {
    let mut directory = tree.to_owned();
    for part in std::iter::once(Path::new("")).chain(parent.iter().map(Path::new)) {
        directory.push(part);
        if fs::create_dir_all(&directory).is_err() {
            return;
        }
        for controller in ["+memory", "+cpu", "+io"] {
            let _ = set(&directory.join("cgroup.subtree_control"), controller);
        }
    }
}

/// Writes to a file that the kernel has made.
fn set(file: &Path, value: &str) -> io::Result<()> {
    use io::Write as _;
    fs::OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(root: &Path, directory: &str, files: &[&str]) {
        fs::create_dir_all(root.join(directory)).unwrap();
        for file in files {
            fs::write(root.join(directory).join(file), "").unwrap();
        }
    }

    #[test]
    fn each_version_of_the_trees_is_told_apart() {
        let bounds = Bounds { memory_bytes_max: 4096, cpu_weight: 50, io_weight: 10, ..Bounds::default() };
        let values = |mount: &Path| -> Vec<String> {
            let limits = trees(mount, &bounds).into_iter();
            limits.flat_map(|(_, limits)| limits).map(|(file, value)| format!("{file}={value}")).collect()
        };
        let unified = tempfile::tempdir().unwrap();
        tree(unified.path(), "", &["cgroup.controllers", "cgroup.procs"]);
        assert_eq!(values(unified.path()), ["memory.max=4096", "cpu.weight=50", "io.weight=default 10"]);
        let hybrid = tempfile::tempdir().unwrap();
        for controller in ["memory", "cpu"] {
            tree(hybrid.path(), controller, &["cgroup.procs"]);
        }
        tree(hybrid.path(), "unified", &["cgroup.controllers", "cgroup.procs"]);
        assert_eq!(values(hybrid.path()), ["memory.limit_in_bytes=4096", "cpu.shares=512"]);
        let none = tempfile::tempdir().unwrap();
        assert!(Group::make(none.path(), Path::new("x"), &bounds).is_none());
    }

    #[test]
    fn a_group_that_limits_nothing_is_none() {
        // A directory is not a kernel: it makes no files in a new one.
        let unified = tempfile::tempdir().unwrap();
        tree(unified.path(), "", &["cgroup.controllers", "cgroup.procs"]);
        assert!(Group::make(unified.path(), Path::new("a/b"), &Bounds::default()).is_none());
        let left = unified.path().join("a/b");
        assert_eq!(fs::read_dir(&left).unwrap().count(), 0);
        fs::create_dir(left.join("4294967295-0")).unwrap();
        fs::create_dir(left.join(format!("{}-0", std::process::id()))).unwrap();
        fs::create_dir(left.join("of somebody else")).unwrap();
        sweep(unified.path(), Path::new("a/b"));
        assert_eq!(fs::read_dir(&left).unwrap().count(), 2);
    }
}
