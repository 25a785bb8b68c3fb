//! Which processes are ours, so that `cocalc down` ends those and no others.
//!
//! A file holds the process id and its start time in clock ticks since boot
//! (field 22 of `/proc/<pid>/stat`, proc(5)): a reused id has another.

use std::path::{Path, PathBuf};

use crate::failure::{Failure, While};

/// Records a process that was just started.
pub(crate) fn write(path: &Path, pid: u32) -> Result<(), Failure> {
    let started = start_time(pid).unwrap_or_default();
    cocalc_daemon::files::write_atomic(path, format!("{pid} {started}\n").as_bytes())
        .during(format!("cannot write {}", path.display()))
}

/// Forgets it.
pub(crate) fn remove(path: &Path) {
    // Missing already is as good.
    let _ = std::fs::remove_file(path);
}

/// The recorded processes below `dir` that still run.
pub(crate) fn running(dir: &Path) -> Vec<(PathBuf, u32)> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let text = std::fs::read_to_string(&path).ok()?;
            let (pid, started) = text.trim().split_once(' ')?;
            let pid: u32 = pid.parse().ok()?;
            (start_time(pid)?.to_string() == started).then_some((path, pid))
        })
        .collect()
}

/// When a process was started, in clock ticks since boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may contain
    // both spaces and parentheses; fields count from after the last one.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // A zombie is gone for our purposes.
    (*fields.first()? != "Z").then_some(())?;
    fields.get(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_runs_and_not_a_reused_id() {
        let dir = tempfile::tempdir().unwrap();
        let this = std::process::id();
        write(&dir.path().join("me"), this).unwrap();
        std::fs::write(dir.path().join("reused"), format!("{this} 1\n")).unwrap();
        std::fs::write(dir.path().join("junk"), "junk").unwrap();
        let found: Vec<u32> = running(dir.path()).into_iter().map(|(_, pid)| pid).collect();
        assert_eq!(found, [this]);
    }
}
