//! The processes below another, from `/proc`.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use cocalc_core::runner::Stats;
use rustix::process::{Pid, Signal};

struct Seen {
    pid: i32,
    parent: i32,
    zombie: bool,
    ticks: u64,
    start: u64,
    pages: u64,
}

/// When the kernel started a process, in its own unit, since the boot.
pub(super) fn start_ticks(pid: i32) -> Option<u64> {
    see(pid).map(|seen| seen.start)
}

fn see(pid: i32) -> Option<Seen> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything; the last parenthesis ends it. Fields are
    // counted from the third.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let number = |index: usize| fields.get(index)?.parse().ok();
    Some(Seen {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        zombie: *fields.first()? == "Z",
        ticks: number(11)? + number(12)?,
        start: number(19)?,
        pages: number(21)?,
    })
}

fn all() -> Vec<Seen> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| see(entry.ok()?.file_name().to_str()?.parse().ok()?)).collect()
}

/// The processes below `root`, and itself first.
fn tree(root: i32) -> Vec<Seen> {
    let (mut found, mut rest): (Vec<Seen>, Vec<Seen>) = all().into_iter().partition(|seen| seen.pid == root);
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|seen| seen.pid) {
        let (children, others) = rest.into_iter().partition(|seen| seen.parent == parent);
        found.extend::<Vec<Seen>>(children);
        rest = others;
        next += 1;
    }
    found
}

/// What the processes below `root` use.
pub(super) fn stats(root: i32) -> Stats {
    // Linux counts these in hundredths of a second for every program.
    const MICROS_PER_TICK: u64 = 10_000;
    let page = rustix::param::page_size() as u64;
    tree(root).iter().fold(Stats::default(), |sum, seen| Stats {
        memory_bytes: sum.memory_bytes + seen.pages * page,
        cpu_micros: sum.cpu_micros + seen.ticks * MICROS_PER_TICK,
        pids: sum.pids + 1,
        ..sum
    })
}

/// Whether a process below `root` listens on this TCP port.
pub(super) fn listens(root: i32, port: u16) -> bool {
    let sockets: BTreeSet<u64> = ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/net/{table}")).ok())
        .flat_map(|table| listening(&table, port))
        .collect();
    !sockets.is_empty() && tree(root).iter().any(|seen| holds(seen.pid, &sockets))
}

/// The inodes of the sockets that listen on `port`, from a table of `/proc/net`.
fn listening(table: &str, port: u16) -> Vec<u64> {
    let wanted = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (fields.get(1)?.ends_with(&wanted) && *fields.get(3)? == "0A")
                .then(|| fields.get(9)?.parse().ok())?
        })
        .collect()
}

fn holds(pid: i32, sockets: &BTreeSet<u64>) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries
        .filter_map(Result::ok)
        .any(|entry| fs::metadata(entry.path()).is_ok_and(|about| sockets.contains(&about.ino())))
}

/// Kills everything below `root`, but not itself.
pub(super) fn kill_below(root: i32, limit: Duration) -> io::Result<()> {
    until_none(limit, || {
        tree(root).into_iter().skip(1).filter(|seen| !seen.zombie).map(|seen| seen.pid).collect()
    })
}

/// Kills every process whose environment has this entry.
pub(super) fn kill_marked(mark: &str, limit: Duration) -> io::Result<()> {
    until_none(limit, || {
        all()
            .into_iter()
            .filter(|seen| !seen.zombie)
            .map(|seen| seen.pid)
            .filter(|pid| marked(*pid, mark))
            .collect()
    })
}

fn marked(pid: i32, mark: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
}

fn until_none(limit: Duration, find: impl Fn() -> Vec<i32>) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        let found = find();
        if found.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > limit {
            return Err(io::ErrorKind::TimedOut.into());
        }
        for pid in found.into_iter().filter_map(Pid::from_raw) {
            // It may have ended meanwhile.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_listeners_in_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1 0\n\
            1: 0100007F:1F90 0100007F:C000 01 00000000:00000000 00:00000000 00000000  1000        0 4243 1 0\n";
        assert_eq!(listening(table, 8080), [4242]);
        assert!(listening(table, 8081).is_empty());
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = std::process::id().cast_signed();
        assert!(start_ticks(me).is_some());
        assert!(stats(me).memory_bytes > 0);
    }
}
