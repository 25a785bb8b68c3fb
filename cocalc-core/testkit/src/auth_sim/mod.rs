//! A deterministic simulator of tokens, ACL streams and revocation: the real
//! [`AclCache`](cocalc_auth::acl::AclCache) with its lease and its index of
//! connections, the real verifier, sessions and receipts, on up to thousands of
//! hosts, in a world that cuts, loses, repeats and reorders messages, restarts
//! daemons, reboots machines, sets clocks, restores older databases and lets the
//! master fail over to a standby that lacks the last commits.
//!
//! **Real**: [`AclCache`](cocalc_auth::acl::AclCache),
//! [`Lease`](cocalc_auth::acl::Lease) and [`Standing`](cocalc_auth::acl::Standing),
//! the store ([`MemoryStore`](cocalc_auth::store::MemoryStore)) with positions
//! and browser sessions, the frames, [`Holding`](cocalc_auth::receipt::Holding)
//! (which settles receipts), and, for one token in sixteen, the signature and
//! the [`Verifier`](cocalc_auth::token::Verifier); of the others only the key's
//! name and the times are looked at, since a signature takes as long as a
//! thousand steps of this world.
//!
//! **Modelled**, with the constants of the original: the host's driver
//! (`cocalc-auth-live`: the same calls in the same order, with its waits and
//! limits), the fetch of single projects, and the master's database, streams
//! and peers (`cocalc-master`), log-ins of an account among them, each of which
//! ends alone. What is left out: moves (a project changes hands
//! only while both hosts are there, and is never lost with a database; moves
//! have their own simulator, [`crate::sim`]), sessions that travel with a move,
//! proxies, rate limits, sizes of frames, jumps of the master's own clock, and
//! that ended log-ins are forgotten after what was opened under them has ended by
//! itself.
//! One thing is given to the master that it cannot know: after a failover that
//! lost commits, that a silent host may have heard of a longer grace in them.
//! And of a log-in that is lost with them, beginning and end, nobody knows any
//! more that it has ended: it counts as one that nobody has ended.
//!
//! Time is virtual, and everything random follows from the seed: [`run`] with
//! the same arguments does the same again. What is checked at each step is in
//! [`Check`]; [`Broken`] breaks the driver or the master on purpose, which shows
//! that the checks can fail.

mod check;
mod faults;
mod host;
mod load;
mod master;
mod world;

use std::fmt;

/// How large the world is, and how hostile.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// How many hosts.
    pub hosts: usize,
    /// For how long faults and load go on, in simulated minutes; a quiet end of
    /// a few minutes follows.
    pub minutes: u64,
    /// How often somebody does something, in milliseconds between two visits.
    pub visit_ms: u64,
    /// How often something is changed, in milliseconds between two changes.
    pub change_ms: u64,
    /// How often something fails, in milliseconds between two faults.
    pub fault_ms: u64,
    /// The master's keepalive and lease, in milliseconds; by seed when `None`.
    pub timing: Option<(u64, u64)>,
    /// What is done wrong.
    pub broken: Option<Broken>,
}

impl Scenario {
    /// Forty hosts for six hours.
    pub const REGION: Self = Self {
        hosts: 40,
        minutes: 360,
        visit_ms: 4_000,
        change_ms: 12_000,
        fault_ms: 20_000,
        timing: None,
        broken: None,
    };

    /// A thousand hosts for two hours.
    pub const FEDERATION: Self = Self {
        hosts: 1000,
        minutes: 120,
        visit_ms: 400,
        change_ms: 1_500,
        fault_ms: 2_000,
        timing: Some((20_000, 60_000)),
        broken: None,
    };

    /// Ten hosts for an hour in which hardly anything works.
    pub const STORM: Self = Self {
        hosts: 10,
        minutes: 60,
        visit_ms: 1_000,
        change_ms: 3_000,
        fault_ms: 5_000,
        timing: None,
        broken: None,
    };

    /// The same, with something done wrong.
    #[must_use]
    pub const fn broken(mut self, broken: Broken) -> Self {
        self.broken = Some(broken);
        self
    }
}

/// What must hold at each step.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Check {
    /// Nothing is allowed, and no connection lives, for a right that ended
    /// longer ago than the lease and the grace of the project.
    LeaseAndGrace,
    /// Nothing is allowed for a right that ended before what the host has
    /// acknowledged; of a withdrawn key as of any other.
    AfterAcknowledgement,
    /// Nothing is allowed that was never granted.
    BeforeGrant,
    /// What was granted, and acknowledged, is allowed; at the end, when
    /// everything works again, everything that is granted is.
    LostGrant,
    /// Queues, logs, indexes and caches stay within their bounds.
    Memory,
    /// Where a receipt says that a revocation is in force, it is.
    Receipt,
    /// After a reboot nobody is let in before a new lease.
    Reboot,
    /// Nothing administrative without a lease.
    Administration,
}

/// Something that is done wrong on purpose.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Broken {
    /// A host goes on over missing frames.
    GapIgnored,
    /// A host applies what comes together in another order.
    OutOfOrder,
    /// A host keeps its lease over a reboot.
    LeaseOverReboot,
    /// A host counts the lease from the answer, not from the request.
    LeaseFromAnswer,
    /// A host takes a lease for good before the frames up to it have come.
    LeaseBeforeFrames,
    /// A host leaves connections open whose right has ended.
    ConnectionsKept,
    /// A host does not look at the grace of the project.
    GraceIgnored,
    /// A host does not compare session epochs.
    SessionEpochIgnored,
    /// A host does not look under which log-in something was opened.
    LogInIgnored,
    /// The master tells of the last log-in that has ended only.
    EndedLogInsForgotten,
    /// The master ends all of an account's log-ins with one of them.
    OneLogInEndsAll,
    /// A host does not notice that its store was restored.
    RestoreUnnoticed,
    /// A host acknowledges before it applies.
    AcknowledgedBeforeApplied,
    /// A host acknowledges before what it applied is on disk.
    AcknowledgedBeforeSaved,
    /// A host's keepalive says what is applied, but not on disk yet, or has
    /// connections to close.
    KeepaliveAcknowledges,
    /// A host never asks again for what it could not have once.
    NegativeForever,
    /// A host keeps the sessions that a withdrawn key opened.
    SessionsOutliveKey,
    /// A host never takes ended connections from the index.
    ConnectionsLeaked,
    /// The master settles receipts by any acknowledgement.
    OlderAcknowledgementCounts,
    /// The master forgets graces where it waits for a silent host.
    ReceiptWithoutGrace,
    /// The master waits for a silent host as long as the projects say that an
    /// account is a member of, and not those that it was just removed from.
    ReceiptForMembersOnly,
    /// The master counts session epochs by one, also after an older database was
    /// restored.
    SessionEpochCounted,
    /// The master sends nothing of what it had sent before a gap.
    GapNotRepeated,
}

/// What became of a simulated day.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Report {
    /// Hash of everything that happened, in order.
    pub trace: u64,
    /// How many events that were.
    pub events: u64,
    /// How many decisions allowed.
    pub allowed: u64,
    /// How many decisions refused.
    pub refused: u64,
    /// How many connections a revocation closed.
    pub closed: u64,
    /// How many receipts were settled by an acknowledgement of all holders, and
    /// how many because some had run out.
    pub receipts: (u64, u64),
    /// How many of the decisions allowed in the grace.
    pub in_grace: u64,
    /// How many whole states were sent.
    pub snapshots: u64,
}

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub check: Check,
    /// How.
    pub what: String,
    /// What had happened last; empty unless asked for.
    pub log: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.log {
            writeln!(f, "{line}")?;
        }
        write!(f, "{:?}: {}", self.check, self.what)
    }
}

/// Simulates one day.
///
/// # Errors
///
/// The first broken promise, with what had happened last.
pub fn run(seed: u64, scenario: &Scenario) -> Result<Report, Box<Violation>> {
    // The log takes longer than all the rest: it is written when there is
    // something to tell, by doing the same again.
    world::Sim::new(seed, scenario, false).run().or_else(|_| world::Sim::new(seed, scenario, true).run())
}

/// As [`run`], without the log.
///
/// # Errors
///
/// The first broken promise.
pub fn run_quietly(seed: u64, scenario: &Scenario) -> Result<Report, Box<Violation>> {
    world::Sim::new(seed, scenario, false).run()
}
