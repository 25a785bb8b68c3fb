//! How long what is known may decide without the master.

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

use crate::store::Position;

/// Leases that wait for their frames; each is five seconds of lag.
const PENDING_MAX: usize = 8;

/// How well is known what is allowed.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Tier {
    /// Within the master's lease.
    Fresh,
    /// The master is away; what is cached goes on, nothing administrative.
    Grace,
    /// Away for too long: everything is closed.
    Expired,
}

/// The lease, on the boot clock: counted from when its renewal was sent, so
/// that no clocks are compared, and void after a reboot.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    grace: Duration,
    /// When the knowledge was last known to be current, and until when it may
    /// count as such.
    confirmed: Option<(Duration, Duration)>,
    /// Granted, but the frames up to the position are yet to come.
    pending: VecDeque<(Position, Duration, Duration)>,
}

/// What of the relation to the master outlives the process.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Standing {
    /// In which boot of the machine; boot times of another mean nothing.
    pub boot_id: String,
    /// When the knowledge was last known to be current, and until when the
    /// lease lasts, in milliseconds since boot.
    pub lease_ms: Option<(u64, u64)>,
    /// The default grace.
    pub grace_ms: u64,
    /// Where the stream stood.
    pub position: Option<Position>,
}

impl Lease {
    pub(super) fn new(grace: Duration) -> Self {
        Self { grace, ..Self::default() }
    }

    pub(super) fn restore(standing: &Standing, boot_id: &str) -> Self {
        let same_boot = standing.boot_id == boot_id && !boot_id.is_empty();
        let confirmed = standing
            .lease_ms
            .filter(|_| same_boot)
            .map(|(from, until)| (Duration::from_millis(from), Duration::from_millis(until)));
        Self { grace: Duration::from_millis(standing.grace_ms), confirmed, pending: VecDeque::new() }
    }

    /// What is to be saved, in the boot `boot_id` and with the stream at
    /// `position`.
    pub fn standing(&self, boot_id: &str, position: Option<Position>) -> Standing {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Standing {
            boot_id: boot_id.to_owned(),
            lease_ms: self.confirmed.map(|(from, until)| (millis(from), millis(until))),
            grace_ms: millis(self.grace),
            position,
        }
    }

    pub(super) fn set_grace(&mut self, grace: Duration) {
        self.grace = grace;
    }

    pub(super) fn granted(&mut self, sent: Duration, lease: Duration, position: Position, current: bool) {
        let until = sent.saturating_add(lease);
        if current {
            self.confirm(sent, until);
        } else {
            if self.pending.len() >= PENDING_MAX {
                self.pending.pop_front();
            }
            self.pending.push_back((position, sent, until));
        }
    }

    /// Every frame up to `position` was applied.
    pub(super) fn reached(&mut self, position: Position) {
        let mut confirmed = Vec::new();
        self.pending.retain(|(target, sent, until)| {
            let reached = position >= *target;
            if reached {
                confirmed.push((*sent, *until));
            }
            !reached
        });
        for (sent, until) in confirmed {
            self.confirm(sent, until);
        }
    }

    fn confirm(&mut self, sent: Duration, until: Duration) {
        // Replies may overtake each other; the later request counts.
        if self.confirmed.is_none_or(|(before, _)| sent >= before) {
            self.confirmed = Some((sent, until));
        }
    }

    /// How long ago the knowledge was known to be current; `None` if never in
    /// this boot.
    pub fn staleness(&self, now: Duration) -> Option<Duration> {
        self.confirmed.map(|(sent, _)| now.saturating_sub(sent))
    }

    pub(super) fn tier(&self, grace: Option<Duration>, now: Duration) -> Tier {
        match self.confirmed {
            Some((_, until)) if now < until => Tier::Fresh,
            Some((_, until)) if now < until.saturating_add(grace.unwrap_or(self.grace)) => Tier::Grace,
            _ => Tier::Expired,
        }
    }

    pub(super) fn next_change(&self, grace: Option<Duration>, now: Duration) -> Option<Duration> {
        let (_, until) = self.confirmed?;
        let ends = until.saturating_add(grace.unwrap_or(self.grace));
        [until, ends].into_iter().find(|time| *time > now)
    }
}
