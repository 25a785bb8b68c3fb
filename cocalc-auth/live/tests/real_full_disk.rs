//! The audit log on a disk that is full, and on one that stands still. Needs root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use cocalc_auth::audit::Event;
use cocalc_auth_live::{AuditLog, AuditQuery};
use cocalc_core::ids::Timestamp;

const LIMIT: Duration = Duration::from_secs(60);

/// A file system of its own, which is unmounted with the value.
struct Mounted {
    dir: tempfile::TempDir,
    frozen: bool,
}

impl Mounted {
    fn at(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn tmpfs(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Self { dir, frozen: false };
        fs::create_dir(mounted.at()).unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={bytes}"), "none", mounted.at().to_str().unwrap()],
        );
        mounted
    }

    fn ext4() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        run("mkfs.ext4", &["-q", image.to_str().unwrap()]);
        let mounted = Self { dir, frozen: false };
        fs::create_dir(mounted.at()).unwrap();
        run("mount", &["-o", "loop", image.to_str().unwrap(), mounted.at().to_str().unwrap()]);
        mounted
    }

    /// Nothing is written until it thaws.
    fn freeze(&mut self, frozen: bool) {
        run("fsfreeze", &[if frozen { "-f" } else { "-u" }, self.at().to_str().unwrap()]);
        self.frozen = frozen;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let at = self.at();
        if self.frozen {
            let _ = Command::new("fsfreeze").arg("-u").arg(&at).status();
        }
        // The log's thread may hold its file a moment longer.
        let deadline = Instant::now() + LIMIT;
        while !Command::new("umount").arg(&at).status().is_ok_and(|status| status.success()) {
            if Instant::now() > deadline {
                let _ = Command::new("umount").arg("--lazy").arg(&at).status();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it"));
    assert!(output.status.success(), "{program} {arguments:?} (needs root): {output:?}");
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn event(number: usize) -> Event {
    Event::new("deny", format!("{number} {}", "x".repeat(200)), Timestamp::now())
}

/// How many events the log's own lines say are missing, and how many it has.
fn told(folder: &Path) -> (u64, u64, Vec<String>) {
    let (mut missing, mut there, mut reasons) = (0, 0, Vec::new());
    AuditLog::query(folder, &AuditQuery::default(), |event| {
        if event.kind == "dropped" {
            missing += event.reason.split(' ').next().unwrap().parse::<u64>().unwrap();
            reasons.push(event.reason);
        } else {
            there += 1;
        }
    })
    .unwrap();
    (missing, there, reasons)
}

#[test]
fn what_a_full_disk_does_not_take_is_counted_and_the_chain_says_so() {
    let disk = Mounted::tmpfs(256 * 1024);
    let folder = disk.at().join("audit");
    fs::create_dir(&folder).unwrap();
    let log = AuditLog::open(&folder).unwrap();
    let mut recorded = 0;
    while log.failures() == 0 {
        for _ in 0..100 {
            log.record(event(recorded));
            recorded += 1;
        }
        // Not durable, once the disk is full.
        log.flush();
        assert!(recorded < 100_000);
    }
    for _ in 0..500 {
        log.record(event(recorded));
        recorded += 1;
    }
    assert!(!log.flush(), "a full disk has taken it");
    assert!(log.is_full() && log.lost() >= 500, "{}", log.lost());
    assert_eq!(log.durable_head(), None, "nothing is told of a log that cannot be written");
    // What is there is whole: no half line was left.
    let (lines, _) = AuditLog::verify(&folder).unwrap();
    assert_eq!(lines, log.head().0);

    run("mount", &["-o", "remount,size=4m", disk.at().to_str().unwrap()]);
    log.record(event(recorded));
    recorded += 1;
    assert!(log.flush());
    assert!(!log.is_full(), "it has caught up");
    let lost = log.lost();
    drop(log);
    let (missing, there, reasons) = told(&folder);
    assert_eq!(missing + there, recorded as u64, "{reasons:?}");
    assert_eq!(missing, lost, "{reasons:?}");
    // The line that says so is short, and may have fitted in sooner.
    assert!(reasons.iter().all(|reason| reason.contains("No space left on device")), "{reasons:?}");
    // It is continued where it was.
    let log = AuditLog::open(&folder).unwrap();
    log.record(event(0));
    assert!(log.flush());
    assert_eq!(AuditLog::verify(&folder).unwrap(), log.head());
}

#[test]
fn nobody_waits_for_a_disk_that_stands_still() {
    let mut disk = Mounted::ext4();
    let folder = disk.at().join("audit");
    fs::create_dir(&folder).unwrap();
    let log = AuditLog::open(&folder).unwrap();
    log.record(event(0));
    assert!(log.flush());
    disk.freeze(true);
    // Far more than the queue takes; none of it may wait for the disk.
    for number in 1..=5_000 {
        log.record(event(number));
    }
    assert!(log.is_full() && log.lost() >= 5_000 - 1_100, "{}", log.lost());
    assert_eq!(log.durable_head(), None, "not before it is durable");
    disk.freeze(false);
    until("the log to catch up", || log.flush());
    assert!(!log.is_full());
    let lost = log.lost();
    assert_eq!(log.failures(), 0);
    drop(log);
    let (missing, there, reasons) = told(&folder);
    assert_eq!((missing, missing + there), (lost, 5_001), "{reasons:?}");
    assert!(reasons.iter().all(|reason| reason.contains("the queue was full")), "{reasons:?}");
}
