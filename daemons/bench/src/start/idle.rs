//! What a project takes that runs and does nothing.

use std::time::Duration;

use super::peer::{Kind, Peer};
use crate::{
    Effort, Result,
    container::{Image, first_process},
    federation::Federation,
    processes,
    projects::Projects,
    table::{Better, Goal, Table},
};

/// Idle: less than a ten-thousandth of a core.
const CPU_MS_PER_MINUTE: f64 = 6.0;
const MEMORY_MIB: f64 = 15.0;

pub(super) fn measure(
    federation: &Federation,
    image: &Image,
    effort: Effort,
    table: &mut Table,
) -> Result<()> {
    let count = effort.at_once;
    let mut projects = Projects::none(federation);
    let mut ours = vec![Taken::new(federation.first_process(federation.project())?)?];
    for number in 1..count {
        let project = projects.copy(&format!("idle {number}"))?;
        ours.push(Taken::new(federation.first_process(&project)?)?);
    }
    let mut peers = Vec::new();
    let mut theirs = Vec::new();
    for number in 0..count {
        let peer = Peer::new(federation, image, Kind::Start, 10 + number)?;
        peer.start()?;
        theirs.push(Taken::new(first_process(&peer.name())?)?);
        peers.push(peer);
    }
    // What the start has done is over by then.
    std::thread::sleep(Duration::from_secs(u64::from(effort.seconds) * 3));
    let minute = Duration::from_secs(effort.idle_secs);
    let host = federation.hosts()?[0].pid;
    let used = |all: &[Taken]| all.iter().map(Taken::cpu_ms).collect::<Result<Vec<f64>>>();
    let before = (used(&ours)?, used(&theirs)?, processes::cpu(&[host])?);
    std::thread::sleep(minute);
    let after = (used(&ours)?, used(&theirs)?, processes::cpu(&[host])?);
    let per_minute = |before: &[f64], after: &[f64]| -> Vec<f64> {
        before
            .iter()
            .zip(after)
            .map(|(before, after)| (after - before) * 60.0 / minute.as_secs_f64())
            .collect()
    };
    let (ours_cpu, peers_cpu) = (per_minute(&before.0, &after.0), per_minute(&before.1, &after.1));
    let memory = |all: &[Taken]| all.iter().map(Taken::processes_mib).collect::<Result<Vec<f64>>>();
    let (ours_memory, peers_memory) = (memory(&ours)?, memory(&theirs)?);
    let mib = ("MiB", Better::Less);
    let what = "memory of an idle project's processes (app, helper, conmon)";
    table.add(what, "podman start, published port", mib, &ours_memory, &peers_memory);
    table.number(what, "MiB", &ours_memory, Some(Goal::AtMost(MEMORY_MIB)));
    let groups = |all: &[Taken]| all.iter().map(Taken::group_mib).collect::<Result<Vec<f64>>>();
    let (ours_group, peers_group) = (groups(&ours)?, groups(&theirs)?);
    let what = "memory of an idle project's control group, without files that may be dropped";
    table.add(what, "podman start, published port", mib, &ours_group, &peers_group);
    table.number(what, "MiB", &ours_group, Some(Goal::AtMost(MEMORY_MIB)));
    table.number(
        "processor time of an idle project in a minute",
        "ms",
        &ours_cpu,
        Some(Goal::AtMost(CPU_MS_PER_MINUTE)),
    );
    table.number("processor time of podman's idle container in a minute", "ms", &peers_cpu, None);
    let daemon = (after.2 - before.2).as_secs_f64() * 60.0 / minute.as_secs_f64() * 1e3;
    table.note(format!("the host daemon with {count} idle projects: {daemon:.0} ms of processor a minute"));
    drop(peers);
    projects.end()
}

/// A running container, by its first process.
struct Taken {
    first: u32,
    /// Its monitor.
    monitor: u32,
}

impl Taken {
    fn new(first: u32) -> Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{first}/stat"))?;
        let parent = stat.rsplit_once(") ").and_then(|(_, after)| after.split(' ').nth(1)?.parse().ok());
        let monitor: u32 = parent.ok_or("a process without a parent")?;
        let name = std::fs::read_to_string(format!("/proc/{monitor}/comm"))?;
        if name.trim_end() != "conmon" {
            return Err(format!("{} started process {first}, not conmon", name.trim_end()).into());
        }
        Ok(Self { first, monitor })
    }

    fn processes_mib(&self) -> Result<f64> {
        let mut pids = processes::family(self.first)?;
        pids.push(self.monitor);
        Ok(processes::memory_kib(&pids) / 1024.0)
    }

    /// As `docker stats` counts it: what the kernel would drop for the asking is
    /// nobody's.
    fn group_mib(&self) -> Result<f64> {
        let (used, stat, idle) = match processes::group_file(self.first, "memory.current") {
            Ok(current) => (current, processes::group_file(self.first, "memory.stat")?, "inactive_file "),
            Err(_) => (
                processes::group_file(self.first, "memory.usage_in_bytes")?,
                processes::group_file(self.first, "memory.stat")?,
                "total_inactive_file ",
            ),
        };
        let stat = std::fs::read_to_string(stat)?;
        let idle: f64 = stat.lines().find_map(|line| line.strip_prefix(idle)?.parse().ok()).unwrap_or(0.0);
        Ok((processes::number(&used)? - idle) / f64::from(1 << 20))
    }

    /// Since it began.
    fn cpu_ms(&self) -> Result<f64> {
        processes::group_cpu_ms(self.first)
    }
}
