//! What users do over SSH, in the audit log and in numbers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cocalc_auth::audit::Event;
use cocalc_auth_live::AuditLog;
use cocalc_core::{clock::Clock, clock::SystemClock};
use cocalc_ssh::{Visit, Witness};

/// Writes each visit's begin and end into the audit log, and counts.
#[derive(Debug)]
pub(crate) struct Visits {
    audit: AuditLog,
    open: AtomicU64,
    inward: AtomicU64,
    outward: AtomicU64,
}

/// The numbers of all visits since the start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VisitNumbers {
    pub(crate) open: u64,
    pub(crate) inward: u64,
    pub(crate) outward: u64,
}

impl Visits {
    pub(crate) fn new(audit: AuditLog) -> Arc<Self> {
        Arc::new(Self {
            audit,
            open: AtomicU64::new(0),
            inward: AtomicU64::new(0),
            outward: AtomicU64::new(0),
        })
    }

    pub(crate) fn numbers(&self) -> VisitNumbers {
        VisitNumbers {
            open: self.open.load(Ordering::Relaxed),
            inward: self.inward.load(Ordering::Relaxed),
            outward: self.outward.load(Ordering::Relaxed),
        }
    }

    fn record(&self, kind: &str, visit: &Visit, reason: String) {
        let mut event = Event::new(kind, reason, SystemClock.wall());
        event.account = visit.account;
        event.project = Some(visit.project);
        event.source = visit.source.map(|source| source.to_string());
        event.action = Some("ssh".to_owned());
        self.audit.record(event);
    }
}

impl Witness for Visits {
    fn began(&self, visit: &Visit) {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.record("begin", visit, format!("visit {}", visit.number));
    }

    fn carried(&self, _visit: &Visit, inward: u64, outward: u64) {
        self.inward.fetch_add(inward, Ordering::Relaxed);
        self.outward.fetch_add(outward, Ordering::Relaxed);
    }

    fn ended(&self, visit: &Visit, lasted: Duration, inward: u64, outward: u64) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        let (number, secs) = (visit.number, lasted.as_secs());
        self.record(
            "end",
            visit,
            format!("visit {number}: {secs} s, {inward} bytes in, {outward} bytes out"),
        );
    }
}
