//! The audit log on disk.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fs, io::Write, path::Path};

use cocalc_auth::audit::Event;
use cocalc_auth_live::{AuditError, AuditLog};
use cocalc_core::ids::Timestamp;

fn record(log: &AuditLog, count: usize) {
    for n in 0..count {
        log.record(Event::new("deny", format!("reason {n}"), Timestamp::now()));
        assert!(n % 500 != 499 || log.flush());
    }
    assert!(log.flush());
}

fn current(folder: &Path) -> std::path::PathBuf {
    folder.join("audit.log")
}

#[test]
fn a_log_is_continued_over_restarts_and_verifies() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let log = AuditLog::open(dir.path()).unwrap();
        record(&log, 10);
        let head = log.head();
        drop(log);
        assert_eq!(AuditLog::verify(dir.path()).unwrap(), head);
    }
    assert_eq!(AuditLog::verify(dir.path()).unwrap().0, 30);
}

#[test]
fn files_are_rotated_and_remain_one_chain() {
    let dir = tempfile::tempdir().unwrap();
    let log = AuditLog::open(dir.path()).unwrap();
    // Each line is some 700 bytes; a file ends at 16 MiB.
    for n in 0..30_000 {
        log.record(Event::new("deny", "x".repeat(500), Timestamp::now()));
        assert!(n % 500 != 0 || log.flush());
    }
    assert!(log.flush());
    drop(log);
    assert!(fs::read_dir(dir.path()).unwrap().count() >= 2);
    let log = AuditLog::open(dir.path()).unwrap();
    record(&log, 1);
    let head = log.head();
    assert_eq!(AuditLog::verify(dir.path()).unwrap(), head);
    assert_eq!(head.0, 30_001);
}

#[test]
fn a_torn_line_is_cut_and_a_changed_log_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    record(&AuditLog::open(dir.path()).unwrap(), 5);
    let mut file = fs::OpenOptions::new().append(true).open(current(dir.path())).unwrap();
    file.write_all(b"0123 {\"time\"").unwrap();
    let log = AuditLog::open(dir.path()).unwrap();
    record(&log, 1);
    assert_eq!(AuditLog::verify(dir.path()).unwrap().0, 6);
    drop(log);

    let text = fs::read_to_string(current(dir.path())).unwrap();
    fs::write(current(dir.path()), text.replacen("reason 2", "reason 9", 1)).unwrap();
    assert!(matches!(AuditLog::verify(dir.path()), Err(AuditError::Chain { .. })));
    let log = AuditLog::open(dir.path()).unwrap();
    record(&log, 1);
    drop(log);
    assert_eq!(AuditLog::verify(dir.path()).unwrap().0, 2);
    assert!(fs::read_to_string(current(dir.path())).unwrap().contains("\"kind\":\"broken\""));
    let aside = fs::read_dir(dir.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("audit-broken-"));
    assert_eq!(aside.count(), 1);
}
