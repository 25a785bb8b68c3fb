//! Ends a federation, and checks that nothing of it is left: after an orderly
//! stop, after Ctrl-C, and after a kill -9 of everything.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{
    federation::Federation,
    narrator::{Narrator, told},
    pidfile,
    plan::Plan,
    slots, volumes,
};
use crate::failure::{Exit, Failure, While};

/// How long a daemon may take to end before it is killed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// `cocalc down`: ends what runs for the federation in `dir`.
///
/// # Errors
///
/// What could not be removed, and what to look at.
pub(crate) fn down(dir: &Path) -> Result<(), Failure> {
    let Ok(dir) = std::fs::canonicalize(dir) else {
        println!("{} does not exist: nothing to clean up", dir.display());
        return Ok(());
    };
    // A `cocalc up` that still runs would start everything again.
    end_processes(&dir.join("up"))?;
    clear(&dir)?;
    let left = leftovers(&dir);
    if left.is_empty() {
        println!("nothing of the federation in {} is left running or mounted", dir.display());
        Ok(())
    } else {
        Err(Failure::failed(format!("still there:\n  {}", left.join("\n  "))))
    }
}

/// Ends processes, containers, networks, mounts and loop devices. Files stay.
pub(super) fn clear(dir: &Path) -> Result<(), Failure> {
    end_processes(&dir.join("run"))?;
    Federation::remove(dir);
    // One host that cannot be cleaned up must not keep the others from it.
    let mut first = Ok(());
    for host in hosts(dir) {
        first = first.and(volumes::stop_projects(&host).and_then(|()| volumes::unmount(&host)));
        volumes::forget(&host);
    }
    slots::release(dir);
    first
}

/// The directories of the federation's hosts.
fn hosts(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("hosts"));
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn end_processes(run: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + END_LIMIT;
    let mut signal = Signal::TERM;
    loop {
        let running = pidfile::running(run);
        if running.is_empty() {
            break;
        }
        if Instant::now() >= deadline {
            if signal == Signal::KILL && Instant::now() >= deadline + END_LIMIT {
                return Err(Failure::failed(format!("processes do not end: {running:?}")));
            }
            signal = Signal::KILL;
        }
        for (_, pid) in &running {
            if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
                // It may have ended meanwhile.
                let _ = kill_process(pid, signal);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    match std::fs::remove_dir_all(run) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).during(format!("cannot remove {}", run.display()))
        }
        _ => Ok(()),
    }
}

/// Tears down, checks, and says what was checked.
pub(super) fn verify(plan: &Plan, narrator: &Narrator, remove_files: bool) -> Result<(), Failure> {
    narrator.step("daemons, containers, networks, mounts, loop devices", || {
        clear(&plan.dir)?;
        told((), "")
    })?;
    if remove_files {
        narrator.step("files", || {
            // The lock file stays with its directory: it is held by this process.
            for entry in std::fs::read_dir(&plan.dir)? {
                let path = entry?.path();
                if path.file_name().is_some_and(|name| name == "lock") {
                    continue;
                }
                let removed =
                    if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                removed.during(format!("cannot remove {}", path.display()))?;
            }
            told((), "")
        })?;
    }
    narrator.step("checked", || {
        let left = leftovers(&plan.dir);
        if left.is_empty() {
            told((), "no process, container, namespace, network, mount or loop device of ours is left")
        } else {
            Err(Failure::new(Exit::Failed, format!("left behind:\n  {}", left.join("\n  "))))
        }
    })
}

/// What of a federation in `dir` is still there.
fn leftovers(dir: &Path) -> Vec<String> {
    let mut left: Vec<String> = pidfile::running(&dir.join("run"))
        .into_iter()
        .map(|(path, pid)| format!("process {pid} ({})", path.display()))
        .collect();
    let text = dir.to_string_lossy();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(
        mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| point.starts_with(&format!("{text}/")))
            .map(|point| format!("mount {point}")),
    );
    if let Ok(output) = Command::new("losetup").args(["-l", "-n", "-O", "NAME,BACK-FILE"]).output() {
        let devices = String::from_utf8_lossy(&output.stdout);
        left.extend(
            devices
                .lines()
                .filter(|line| line.contains(&format!("{text}/")))
                .map(|line| format!("loop device {line}")),
        );
    }
    left.extend(orphans(&text));
    for host in hosts(dir) {
        left.extend(volumes::project_leftovers(&host));
    }
    left
}

/// Daemons of the federation in `dir`, by their command lines: also those that
/// no file names.
fn orphans(dir: &str) -> Vec<String> {
    let config = format!("{dir}/");
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
            let mut words = line.split('\0');
            let ours = words.any(|word| word == "--config") && words.next()?.starts_with(&config);
            ours.then(|| format!("daemon {pid}"))
        })
        .collect()
}
