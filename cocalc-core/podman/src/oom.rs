//! Whom the kernel has killed because memory was used up, also when the control
//! group that would tell is gone.
//!
//! A container's group is removed within a moment of its end, and its counters go
//! with it, for open descriptors as well. Two things stay: the notices that a version
//! 1 group gave, which a descriptor of ours counts; and the kernel's log, which names
//! each process that it has killed. Version 2 has no such notices: there conmon looks
//! at the counters when the last process has ended, and podman knows what it saw.

use std::{
    fs,
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd},
    fs::OFlags,
    time::{ClockId, clock_gettime},
};

/// A threshold of memory that nothing reaches, in bytes.
const NEVER: u64 = 1 << 60;
/// The longest record of the kernel's log, and then some.
const RECORD_BYTES: usize = 16 << 10;
/// How far the log's clock may be from the one that is asked here: it is not
/// corrected, and goes on for as long as the machine is up.
const CLOCKS_APART: Duration = Duration::from_secs(600);

/// Counts how often the memory of a version 1 group was used up, beyond its removal.
#[derive(Debug)]
pub(crate) struct Notices {
    /// The group's directory.
    group: PathBuf,
    /// Hears each time that memory is used up, and that the group is removed.
    used_up: OwnedFd,
    /// Hears of the removal alone, and after `used_up` has: before the kernel tells
    /// this one, it waits until all processors have gone on. `None` inside: it could
    /// not be had.
    removed: OnceLock<Option<OwnedFd>>,
    /// How many notices were taken from `used_up`.
    taken: AtomicU64,
}

impl Notices {
    /// Asks for those of a group from now on.
    ///
    /// # Errors
    ///
    /// If the group is gone, or the kernel does not give any.
    pub(crate) fn ask(group: PathBuf) -> io::Result<Self> {
        let used_up = notice(&group, "memory.oom_control", "")?;
        Ok(Self { group, used_up, removed: OnceLock::new(), taken: AtomicU64::new(0) })
    }

    /// Asks to hear of the group's removal, too. Blocks for some milliseconds: until
    /// all processors have gone on. Without it [`count`](Self::count) may miss one.
    pub(crate) fn ask_of_removal(&self) {
        self.removed.get_or_init(|| {
            notice(&self.group, "memory.usage_in_bytes", &format!(" {NEVER}"))
                .inspect_err(|error| tracing::debug!(%error, "no notice of a control group's removal"))
                .ok()
        });
    }

    /// How often its memory was used up since it was asked for. Blocks: if the group
    /// is gone, until the kernel has said so, at most for `limit`.
    pub(crate) fn count(&self, limit: Duration) -> u64 {
        let count = self.take();
        if self.group.exists() {
            return count;
        }
        if let Some(Some(removed)) = self.removed.get() {
            readable_within(removed, limit);
        }
        // One of them was the removal.
        self.take().saturating_sub(1)
    }

    /// All notices so far.
    fn take(&self) -> u64 {
        let mut new = [0; 8];
        // It does not block, and has nothing to read if there was none.
        let new = match rustix::io::read(&self.used_up, &mut new) {
            Ok(8) => u64::from_ne_bytes(new),
            _ => 0,
        };
        self.taken.fetch_add(new, Ordering::SeqCst).saturating_add(new)
    }
}

/// Has the kernel count in a descriptor what happens to a file of a group.
fn notice(group: &Path, file: &str, argument: &str) -> io::Result<OwnedFd> {
    let counter = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let about = fs::File::open(group.join(file))?;
    let order = format!("{} {}{argument}", counter.as_raw_fd(), about.as_raw_fd());
    fs::write(group.join("cgroup.event_control"), order)?;
    Ok(counter)
}

fn readable_within(descriptor: &OwnedFd, limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) if Instant::now() < deadline => {}
            _ => return,
        }
    }
}

/// Whose memory was used up, so that a process was killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Whose {
    /// That of its own groups.
    Group,
    /// The machine's.
    Machine,
}

/// The clock of [`victim`].
pub(crate) fn log_time() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Whether the kernel has killed process `pid` for memory since `since`, by
/// [`log_time`]; `None` if its log cannot be read. Blocks.
pub(crate) fn victim(pid: i32, since: Duration) -> Option<Option<Whose>> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let log = fs::OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg");
    let mut log = log.inspect_err(|error| tracing::debug!(%error, "cannot read the kernel's log")).ok()?;
    let mut record = vec![0; RECORD_BYTES];
    let mut found = None;
    loop {
        match log.read(&mut record) {
            Ok(0) => return Some(found),
            Ok(length) => {
                let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
                found = killed(&text, pid, since.saturating_sub(CLOCKS_APART)).or(found);
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Some(found),
                io::ErrorKind::Interrupted => {}
                // What was to be read next is not kept any more.
                io::ErrorKind::BrokenPipe => {}
                _ => return None,
            },
        }
    }
}

/// Whether a record of the log says that `pid` was killed for memory, not before
/// `since`. Of what is in it, a tenant chooses the name of the process alone: 15 bytes,
/// behind the number.
fn killed(record: &str, pid: i32, since: Duration) -> Option<Whose> {
    let (about, text) = record.split_once(';')?;
    let micros = about.split(',').nth(2)?.parse().ok()?;
    if Duration::from_micros(micros) < since {
        return None;
    }
    let (whose, text) =
        [("Memory cgroup out of memory: ", Whose::Group), ("Out of memory: ", Whose::Machine)]
            .into_iter()
            .find_map(|(prefix, whose)| Some((whose, text.strip_prefix(prefix)?)))?;
    let (number, _) = text.strip_prefix("Killed process ")?.split_once(' ')?;
    (number.parse() == Ok(pid)).then_some(whose)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_log_says_who_was_killed_and_of_whose_memory() {
        let since = Duration::from_secs(100);
        let says = |record: &str| killed(record, 42, since);
        let rest = "total-vm:118968kB, anon-rss:32512kB, UID:0 pgtables:124kB oom_score_adj:0\n";
        let group = "Memory cgroup out of memory: Killed process";
        assert_eq!(says(&format!("3,901,100000000,-;{group} 42 (sh) {rest}")), Some(Whose::Group));
        assert_eq!(says(&format!("3,901,100000000,-,caller=T7;{group} 42 (sh) {rest}")), Some(Whose::Group));
        assert_eq!(
            says(&format!("3,1,200000000,-;Out of memory: Killed process 42 (sh) {rest}")),
            Some(Whose::Machine)
        );
        for other in [
            format!("3,901,99999999,-;{group} 42 (sh) {rest}"),
            format!("3,901,100000000,-;{group} 421 (sh) {rest}"),
            format!("3,901,100000000,-;{group} 4 (process 42 () {rest}"),
            format!("6,901,100000000,-;{group}"),
            "6,901,100000000,-;Killed process 42 (sh)".to_owned(),
            "6,901,100000000,-;oom_reaper: reaped process 42 (sh), now anon-rss:0kB".to_owned(),
            "6,901,x,-;".to_owned(),
            String::new(),
        ] {
            assert_eq!(says(&other), None, "{other}");
        }
    }
    /// A group of this test's, which has room for 16 MiB.
    struct Small(PathBuf);

    impl Small {
        fn new(number: u32) -> Self {
            let group = format!("/sys/fs/cgroup/memory/cocalc-test-{}-{number}", std::process::id());
            fs::create_dir(&group).unwrap();
            fs::write(format!("{group}/memory.limit_in_bytes"), "16777216").unwrap();
            let _ = fs::write(format!("{group}/memory.memsw.limit_in_bytes"), "16777216");
            Self(group.into())
        }

        fn remove(&self) {
            let begun = Instant::now();
            // Its processes are not quite gone when they have been waited for.
            while fs::remove_dir(&self.0).is_err() && self.0.exists() {
                assert!(begun.elapsed() < Duration::from_secs(30), "{} stays", self.0.display());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    impl Drop for Small {
        fn drop(&mut self) {
            let _ = fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn notices_tell_memory_that_was_used_up_from_the_removal_of_the_group() {
        if !Path::new("/sys/fs/cgroup/memory/cgroup.event_control").exists() {
            let group = Path::new("/sys/fs/cgroup");
            assert!(Notices::ask(group.to_owned()).is_err(), "version 2 gives none");
            return;
        }
        // `tail` keeps what it reads until there is a line, which never comes.
        for (number, (line, times)) in
            [("tail /dev/zero", 1), ("true", 0), ("kill -9 $$", 0), ("tail /dev/zero; tail /dev/zero", 2)]
                .into_iter()
                .cycle()
                .take(12)
                .enumerate()
        {
            let group = Small::new(u32::try_from(number).unwrap());
            let notices = Notices::ask(group.0.clone()).unwrap();
            notices.ask_of_removal();
            let line = format!("echo $$ > {}/cgroup.procs && {line}", group.0.display());
            std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
            if number % 3 == 0 {
                assert_eq!(notices.count(Duration::ZERO), times, "{line}: while the group is there");
            }
            group.remove();
            assert_eq!(notices.count(Duration::from_secs(60)), times, "{line}");
            assert_eq!(notices.count(Duration::from_secs(60)), times, "{line}: asked once more");
        }
    }
}
