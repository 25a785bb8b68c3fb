//! What processes of this machine take, by the kernel's own account.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::Result;

/// `USER_HZ`, which programs see on every architecture of Linux but Alpha and
/// IA-64, whatever the kernel's own clock.
const TICKS_PER_SEC: f64 = 100.0;

/// Resident memory in KiB, each shared page counted by its share. Processes that
/// have ended meanwhile count nothing.
pub(crate) fn memory_kib(pids: &[u32]) -> f64 {
    pids.iter().filter_map(|pid| pss(*pid)).sum::<u64>() as f64
}

fn pss(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse().ok())
}

/// The processor time that they have used so far.
pub(crate) fn cpu(pids: &[u32]) -> Result<Duration> {
    let mut ticks = 0;
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let after = stat.rsplit_once(") ").ok_or("no name in stat")?.1;
        // The 14th and 15th word of all, of which two are before.
        let of = |word: usize| after.split(' ').nth(word).and_then(|ticks| ticks.parse::<u64>().ok());
        ticks += of(11).zip(of(12)).map(|(user, system)| user + system).ok_or("no times in stat")?;
    }
    Ok(Duration::from_secs_f64(ticks as f64 / TICKS_PER_SEC))
}

/// A process and all below it, of which it is the first.
pub(crate) fn family(root: u32) -> Result<Vec<u32>> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, after)| after.split(' ').nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        found.extend(children.remove(pid).unwrap_or_default());
        at += 1;
    }
    Ok(found)
}

/// As [`family`], only those with this name.
pub(crate) fn named(root: u32, name: &str) -> Result<Vec<u32>> {
    let mut found = family(root)?;
    found.retain(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    });
    Ok(found)
}

/// The directory of a process's control group that holds this file.
pub(crate) fn group_file(pid: u32, file: &str) -> Result<PathBuf> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        for root in ["", controllers, "unified"] {
            let found = Path::new("/sys/fs/cgroup").join(root).join(path.trim_start_matches('/')).join(file);
            if found.is_file() {
                return Ok(found);
            }
        }
    }
    Err(format!("process {pid} has no control group with {file}").into())
}

/// A number that a file of a control group begins with.
pub(crate) fn number(file: &Path) -> Result<f64> {
    let text = std::fs::read_to_string(file)?;
    Ok(text.split_whitespace().next().ok_or("an empty file")?.parse()?)
}

/// The processor time, in milliseconds, that a process's control group has used
/// since it was made.
pub(crate) fn group_cpu_ms(pid: u32) -> Result<f64> {
    let used = match group_file(pid, "cpuacct.usage") {
        Ok(file) => number(&file)? / 1e6,
        Err(_) => {
            let stat = std::fs::read_to_string(group_file(pid, "cpu.stat")?)?;
            let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
            micros.map_or(0.0, |micros: f64| micros / 1e3)
        }
    };
    // Its start took something, so nothing at all is an account that is not kept.
    if used > 0.0 {
        Ok(used)
    } else {
        Err("the kernel keeps no account of a project's processor time".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_something_and_has_a_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let own = std::process::id();
        let found = family(own).unwrap();
        assert!(found[0] == own && found.contains(&child.id()));
        assert!(memory_kib(&found) > 100.0);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        // Between fork and exec it still has this program's name.
        while named(own, "sleep").unwrap() != [child.id()] {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(cpu(&[child.id()]).is_err());
        assert!(cpu(&[own]).is_ok());
    }
}
