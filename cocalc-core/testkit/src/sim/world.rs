//! What exists: the master's rows, and the disks and machines of two hosts.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    clock::{Clock, Timestamp},
    control::ProjectConfig,
    grant::{Entry, Ledger},
    moves::{MoveSpec, MoveState, Tuning, host::MoveHost},
    router::HostAddress,
};
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName, VolumeUuid};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Report;

/// How hostile the world is; the numbers are chances in a thousand.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// A request or reply is lost.
    pub lost: u64,
    /// A request arrives again, up to a minute later.
    pub repeated: u64,
    /// A host's process crashes at a given step of its work.
    pub host_crash: u64,
    /// A crash takes the machine along, and with it what runs there.
    pub reboot: u64,
    /// A stream breaks.
    pub stream_cut: u64,
    /// A storage or runner call fails.
    pub backend: u64,
    /// The master crashes in a given second.
    pub master_crash: u64,
    /// The master crashes right before or after it stores or sends something.
    pub master_step: u64,
    /// A second controller drives the move as well, after a crash.
    pub second_controller: u64,
    /// Somebody cancels the move.
    pub cancelled: u64,
    /// All of this stops after this time.
    pub until: Duration,
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// A request or reply is lost.
    Lost,
    /// A request arrives again, much later.
    Repeated,
    /// A host's process crashes.
    HostCrash,
    /// A crash takes the machine along.
    Reboot,
    /// A stream breaks.
    StreamCut,
    /// A storage, runner or ledger call fails.
    Backend,
    /// The master crashes at some time.
    MasterCrash,
    /// The master crashes right before or after it stores or sends something.
    MasterStep,
    /// A second controller drives the move as well.
    SecondController,
    /// Somebody cancels the move.
    Cancelled,
}

/// The one fault of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Single {
    pub(super) fault: Fault,
    /// The how manyth time it could happen, from 0.
    pub(super) nth: u64,
    pub(super) reached: bool,
    seen: u64,
}

impl Faults {
    fn chance(&self, fault: Fault) -> u64 {
        match fault {
            Fault::Lost => self.lost,
            Fault::Repeated => self.repeated,
            Fault::HostCrash => self.host_crash,
            Fault::Reboot => self.reboot,
            Fault::StreamCut => self.stream_cut,
            Fault::Backend => self.backend,
            Fault::MasterCrash => self.master_crash,
            Fault::MasterStep => self.master_step,
            Fault::SecondController => self.second_controller,
            Fault::Cancelled => self.cancelled,
        }
    }

    /// A world without faults.
    pub const NONE: Self = Self {
        lost: 0,
        repeated: 0,
        host_crash: 0,
        reboot: 0,
        stream_cut: 0,
        backend: 0,
        master_crash: 0,
        master_step: 0,
        second_controller: 0,
        cancelled: 0,
        until: Duration::ZERO,
    };

    /// A bad day.
    pub const SOME: Self = Self {
        lost: 50,
        repeated: 150,
        host_crash: 8,
        reboot: 300,
        stream_cut: 50,
        backend: 10,
        master_crash: 60,
        master_step: 10,
        second_controller: 400,
        cancelled: 150,
        until: Duration::from_secs(60),
    };

    /// Hardly anything works.
    pub const MANY: Self = Self {
        lost: 200,
        repeated: 400,
        host_crash: 30,
        reboot: 500,
        stream_cut: 150,
        backend: 50,
        master_crash: 200,
        master_step: 40,
        second_controller: 600,
        cancelled: 250,
        until: Duration::from_secs(120),
    };
}

/// How many lines of the log are kept.
const LOG_LINES: usize = 120;

/// The world, shared by everything in it. Never locked across a wait.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<World>>);

pub(super) struct World {
    random: u64,
    faults: Faults,
    single: Option<Single>,
    unleashed: bool,
    began: Instant,
    faults_until: Instant,
    hasher: DefaultHasher,
    events: u64,
    crashes: u64,
    log: VecDeque<String>,
    violation: Option<String>,
    /// The master is to crash now.
    pub(super) kill_master: bool,
    pub(super) project: ProjectId,
    /// The owner, its epoch, and the fence.
    pub(super) row: (usize, Epoch, Option<MoveId>),
    pub(super) stored: MoveState,
    pub(super) machines: [Machine; 2],
    /// How many writes the project was told are safe.
    pub(super) written: u64,
    /// Whether the project ran before the move, and is to run after it.
    pub(super) wanted: bool,
    /// The project's own snapshots, as its owner has them.
    pub(super) own: BTreeMap<SnapshotName, Frozen>,
    /// What lay at the second host of them before the move.
    pub(super) earlier: BTreeMap<SnapshotName, Frozen>,
    /// The names under which the first host had others than the second.
    pub(super) replaced: BTreeSet<SnapshotName>,
}

pub(super) struct Machine {
    pub(super) id: HostId,
    pub(super) incarnation: u64,
    pub(super) daemon: Option<Daemon>,
    pub(super) ledger: BTreeMap<ProjectId, Entry>,
    pub(super) live: Option<u64>,
    pub(super) snapshots: BTreeMap<SnapshotName, Frozen>,
    pub(super) running: Option<Epoch>,
}

/// A snapshot: how many writes are in it, and which one it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Frozen {
    pub(super) content: u64,
    pub(super) origin: VolumeUuid,
}

#[derive(Clone)]
pub(super) struct Daemon {
    pub(super) stop: CancellationToken,
    pub(super) ledger: Ledger,
    pub(super) moves: MoveHost,
}

impl Shared {
    pub(super) fn new(seed: u64, faults: &Faults, single: Option<(Fault, u64)>) -> Self {
        let mut random = seed;
        let mut bytes = || {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&split_mix(&mut random).to_be_bytes());
            bytes[8..].copy_from_slice(&split_mix(&mut random).to_be_bytes());
            bytes
        };
        let project = ProjectId::from_random_bytes(bytes());
        let ids = [HostId::from_random_bytes(bytes()), HostId::from_random_bytes(bytes())];
        let move_id = MoveId::from_random_bytes(bytes());
        let (deltas, wanted) = (split_mix(&mut random) & 3 > 0, split_mix(&mut random) & 3 > 0);
        let tuning = Tuning { step_ms: 10_000, seed_ms: 60_000, catch_up_ms: 30_000, ..Tuning::default() };
        let spec = MoveSpec {
            move_id,
            project,
            source: ids[0],
            destination: ids[1],
            destination_address: HostAddress { peer: "destination".into(), ..HostAddress::default() },
            epoch: Epoch::FIRST,
            config: ProjectConfig::default(),
            bytes: 1 << 30,
            stream_version: 2,
            deltas,
            tuning,
        };
        let machine = |id| Machine {
            id,
            incarnation: 0,
            daemon: None,
            ledger: BTreeMap::new(),
            live: None,
            snapshots: BTreeMap::new(),
            running: None,
        };
        Self(Arc::new(Mutex::new(World {
            random,
            faults: *faults,
            single: single.map(|(fault, nth)| Single { fault, nth, reached: false, seen: 0 }),
            unleashed: false,
            kill_master: false,
            began: Instant::now(),
            // Faults begin with the move.
            faults_until: Instant::now(),
            hasher: DefaultHasher::new(),
            events: 0,
            crashes: 0,
            log: VecDeque::new(),
            violation: None,
            project,
            row: (0, Epoch::FIRST, Some(move_id)),
            stored: MoveState::new(spec),
            machines: ids.map(machine),
            written: 0,
            wanted,
            own: BTreeMap::new(),
            earlier: BTreeMap::new(),
            replaced: BTreeSet::new(),
        })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn violate(&self, what: &str) {
        self.lock().violate(what);
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.lock().violation.clone()
    }

    pub(super) fn log(&self) -> String {
        self.lock().log.iter().fold(String::new(), |all, line| all + line + "\n")
    }

    /// Whether the one fault of this run happened.
    pub(super) fn reached(&self) -> bool {
        self.lock().single.is_some_and(|single| single.reached)
    }

    pub(super) fn report(&self) -> Report {
        let world = self.lock();
        Report {
            outcome: world.stored.outcome().unwrap_or(cocalc_core::moves::MoveOutcome::Aborted),
            trace: world.hasher.finish(),
            events: world.events,
            crashes: world.crashes,
        }
    }
}

impl World {
    /// Begins the time of faults.
    pub(super) fn unleash(&mut self) {
        self.faults_until = Instant::now() + self.faults.until;
        self.unleashed = true;
    }

    /// When the faults have stopped.
    pub(super) fn calm(&self) -> Instant {
        self.faults_until
    }

    pub(super) fn faulty(&self) -> bool {
        Instant::now() < self.faults_until
    }

    /// A number below `below`.
    pub(super) fn below(&mut self, below: u64) -> u64 {
        split_mix(&mut self.random) % below.max(1)
    }

    /// Whether a fault happens now.
    pub(super) fn fault(&mut self, fault: Fault) -> bool {
        let chance = self.faults.chance(fault);
        if self.below(1000) < chance && self.faulty() {
            return true;
        }
        match &mut self.single {
            Some(single) if single.fault == fault && self.unleashed => {
                let now = single.seen == single.nth;
                single.seen += 1;
                single.reached |= now;
                now
            }
            _ => false,
        }
    }

    pub(super) fn millis(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.below(below))
    }

    pub(super) fn uuid(&mut self) -> VolumeUuid {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&split_mix(&mut self.random).to_be_bytes());
        VolumeUuid::from_random_bytes(bytes)
    }

    pub(super) fn event(&mut self, what: &str) {
        self.events += 1;
        let millis = self.began.elapsed().as_millis();
        (what, millis).hash(&mut self.hasher);
        // The beginning tells how it came about, the end what came of it.
        if self.log.len() >= LOG_LINES {
            self.log.remove(LOG_LINES / 2);
        }
        self.log.push_back(format!("{millis:>8} ms {what}"));
    }

    pub(super) fn crashed(&mut self) {
        self.crashes += 1;
    }

    pub(super) fn violate(&mut self, what: &str) {
        self.event(what);
        self.violation.get_or_insert_with(|| what.to_owned());
    }

    pub(super) fn machine_of(&self, id: HostId) -> usize {
        usize::from(self.machines[1].id == id)
    }

    /// What must hold at every moment.
    pub(super) fn check(&mut self) {
        let running: Vec<_> = (0..2).filter(|h| self.machines[*h].running.is_some()).collect();
        if running.len() > 1 {
            self.violate("it runs on both hosts");
        }
        for host in running {
            let machine = &self.machines[host];
            if machine.live != Some(self.written) {
                self.violate(&format!("host {host} runs it on other files than the last"));
            }
        }
    }
}

/// Virtual time as a clock.
#[derive(Debug)]
pub(super) struct SimClock(pub(super) Instant);

impl Clock for SimClock {
    fn wall(&self) -> Timestamp {
        Timestamp::from_secs(1_800_000_000).plus(self.boot())
    }

    fn boot(&self) -> Duration {
        self.0.elapsed()
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
