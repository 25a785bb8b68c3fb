//! What is told about users' connections: for audit, activity and metering.

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::ids::{AccountId, ProjectId};

use crate::Access;

/// How often bytes are told while they flow.
pub(crate) const TELL_EVERY: Duration = Duration::from_secs(5);

/// Learns what users do in projects over SSH.
///
/// # Contract
///
/// - It is called by the connections' own tasks, and must not block.
/// - Each `began` is followed by one `ended`, unless the process dies.
/// - Bytes are told once, every few seconds while some flow, and before
///   `ended`. They are the channels' content, without the protocol's own.
pub trait Witness: fmt::Debug + Send + Sync + 'static {
    /// A user has been let in.
    fn began(&self, visit: &Visit);

    /// So many bytes were carried since the last call: `inward` from the user
    /// to the project, `outward` back. Both 0: somebody only looks.
    fn carried(&self, visit: &Visit, inward: u64, outward: u64);

    /// A user has gone, after `lasted`; `inward` and `outward` are all bytes of
    /// the visit.
    fn ended(&self, visit: &Visit, lasted: Duration, inward: u64, outward: u64);
}

/// One user's connection to one project.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Visit {
    /// A number that no other visit of this process has.
    pub number: u64,
    /// The project.
    pub project: ProjectId,
    /// Who it is, as far as this server knows.
    pub account: Option<AccountId>,
    /// From where.
    pub source: Option<IpAddr>,
}

/// Counts the bytes of one visit, and tells a witness. Dropping it is the end
/// of the visit.
#[derive(Debug)]
pub(crate) struct Meter {
    witness: Option<Arc<dyn Witness>>,
    visit: Visit,
    since: Instant,
    inward: AtomicU64,
    outward: AtomicU64,
    told: [AtomicU64; 2],
}

static VISITS: AtomicU64 = AtomicU64::new(1);

impl Meter {
    pub(crate) fn begin(
        witness: Option<Arc<dyn Witness>>,
        access: &Access,
        source: Option<IpAddr>,
    ) -> Arc<Self> {
        let visit = Visit {
            number: VISITS.fetch_add(1, Ordering::Relaxed),
            project: access.project,
            account: access.account,
            source,
        };
        if let Some(witness) = &witness {
            witness.began(&visit);
        }
        Arc::new(Self {
            witness,
            visit,
            since: Instant::now(),
            inward: AtomicU64::new(0),
            outward: AtomicU64::new(0),
            told: [const { AtomicU64::new(0) }; 2],
        })
    }

    pub(crate) fn inward(&self, bytes: usize) {
        self.inward.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn outward(&self, bytes: usize) {
        self.outward.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Tells what has flowed since the last time.
    pub(crate) fn tell(&self) {
        let Some(witness) = &self.witness else { return };
        let new = |count: &AtomicU64, told: &AtomicU64| {
            let now = count.load(Ordering::Relaxed);
            now.saturating_sub(told.swap(now, Ordering::Relaxed))
        };
        let (inward, outward) = (new(&self.inward, &self.told[0]), new(&self.outward, &self.told[1]));
        if inward + outward > 0 {
            witness.carried(&self.visit, inward, outward);
        }
    }

    /// Tells every few seconds, for ever.
    pub(crate) async fn keep_telling(&self) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            self.tell();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.tell();
        if let Some(witness) = &self.witness {
            let total = |count: &mut AtomicU64| *count.get_mut();
            let (inward, outward) = (total(&mut self.inward), total(&mut self.outward));
            witness.ended(&self.visit, self.since.elapsed(), inward, outward);
        }
    }
}
