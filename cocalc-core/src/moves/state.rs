//! The move as the master keeps it. Pure: no clock, no I/O.

use std::time::Duration;

use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName, VolumeUuid};
use serde::{Deserialize, Serialize};

use super::{snapshot_name, undo_name};
use crate::{
    control::{Carried, CommandError, ErrorCode, HostCommand, MoveCommand, MoveReply, ProjectConfig},
    router::HostAddress,
};

/// How many remarks on what did not arrive are kept.
const LEFT_OUT_MAX: usize = 12;

/// What a move is about; constant, but for the size, which the source knows.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct MoveSpec {
    /// Which move; the project's fence.
    pub move_id: MoveId,
    /// Which project.
    pub project: ProjectId,
    /// The owner.
    pub source: HostId,
    /// Who is to be the owner.
    pub destination: HostId,
    /// Where the destination listens.
    pub destination_address: HostAddress,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// How the project is run.
    pub config: ProjectConfig,
    /// What the source is charged for it, in bytes; 0 if unknown. The survey
    /// replaces it.
    pub bytes: u64,
    /// The highest version of streams that the destination takes.
    #[serde(default)]
    pub stream_version: u32,
    /// Whether deltas of this storage are worth sending: without them, the
    /// whole volume is sent once, after the freeze.
    pub deltas: bool,
    /// Limits and times.
    #[serde(default)]
    pub tuning: Tuning,
}

/// Limits and times of a move.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Tuning {
    /// At most so many deltas while the project runs. Default 5.
    pub deltas_max: u32,
    /// A delta of at most so many bytes is small enough to freeze. Default
    /// 4 MiB.
    pub delta_bytes: u64,
    /// A delta that took at most so many milliseconds is small enough to
    /// freeze. Default 500.
    pub delta_millis: u64,
    /// How long the project's processes may take to end, in milliseconds.
    /// Default 10 s.
    pub grace_ms: u64,
    /// How often a step before the commit is tried. Default 4.
    pub attempts_max: u32,
    /// How long an ordinary step may take, in milliseconds. Default 60 s.
    pub step_ms: u64,
    /// How long the first, full stream may take, in milliseconds. Default 12 h.
    pub seed_ms: u64,
    /// How long the stream after the freeze may take, in milliseconds.
    /// Default 10 min.
    pub catch_up_ms: u64,
    /// The first pause before a step is tried again, in milliseconds; doubles
    /// each time. Default 250.
    pub retry_ms: u64,
    /// The longest such pause, in milliseconds. Default 15 s.
    pub retry_max_ms: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            deltas_max: 5,
            delta_bytes: 4 << 20,
            delta_millis: 500,
            grace_ms: 10_000,
            attempts_max: 4,
            step_ms: 60_000,
            seed_ms: 12 * 3_600_000,
            catch_up_ms: 600_000,
            retry_ms: 250,
            retry_max_ms: 15_000,
        }
    }
}

/// A step of a move. It names what is being done, and was therefore not
/// acknowledged yet.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Step {
    /// The source says what there is to be moved.
    Surveying,
    /// The destination prepares.
    Reserving,
    /// The project's own snapshots are sent, while it runs.
    Carrying,
    /// Snapshots of the move are sent while the project runs.
    Seeding,
    /// The source makes new requests wait.
    Parking,
    /// The source stops the project for good.
    Freezing,
    /// The destination hears of snapshots that were taken meanwhile.
    Announcing,
    /// These and the final snapshot are sent.
    CatchingUp,
    /// The destination makes it the live volume; its receipt is the commit.
    Staging,
    /// Committed. The destination takes the grant.
    Activating,
    /// The project is usable; the source lets go.
    Retiring,
    /// The source deletes the snapshots of the move.
    CleaningSource,
    /// The destination deletes the snapshots of the move.
    CleaningDestination,
    /// It moved.
    Done,
    /// Aborted. The source takes the project back.
    Thawing,
    /// The project is usable; the destination deletes what it received.
    Discarding,
    /// It did not move.
    Aborted,
}

/// What the master keeps of a move.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct MoveState {
    /// What it is about.
    pub spec: MoveSpec,
    /// Grows by one with each stored state; the compare-and-set is on it.
    pub revision: u64,
    /// What is being done.
    pub step: Step,
    /// How often the step was tried and did not succeed.
    pub attempts: u32,
    /// The project's own snapshots, oldest first.
    #[serde(default)]
    pub snapshots: Vec<Planned>,
    /// The snapshots of this move that the destination has acknowledged,
    /// oldest first.
    pub rounds: Vec<Round>,
    /// The final snapshot, once the source has frozen.
    pub frozen: Option<VolumeUuid>,
    /// Whether the project was running when it was frozen.
    pub was_running: bool,
    /// Whether a freeze may have reached the source.
    pub froze: bool,
    /// Bytes on the wire so far.
    pub bytes_sent: u64,
    /// What the files have and did not arrive, in words for people.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// The owner's epoch since the commit or the abort.
    pub new_epoch: Option<Epoch>,
    /// Why it was aborted, or what the present step is held up by.
    pub failure: Option<Failure>,
}

/// A snapshot of the project's own.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Planned {
    /// Which.
    #[serde(flatten)]
    pub snapshot: Carried,
    /// Whether the destination has it.
    pub arrived: bool,
}

/// A snapshot of the move that the destination has.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Round {
    /// Its name on both hosts.
    pub name: SnapshotName,
    /// What it is.
    pub origin: VolumeUuid,
    /// Bytes on the wire.
    pub bytes: u64,
    /// How long it took, in milliseconds.
    pub millis: u64,
}

/// What went wrong.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// In which step.
    pub step: Step,
    /// The kind; `None` if it was cancelled, or a host did not answer.
    pub code: Option<ErrorCode>,
    /// For people.
    pub message: String,
}

/// How a move ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MoveOutcome {
    /// The destination owns the project.
    Moved,
    /// The source owns it.
    Aborted,
}

/// What has to be done now. Follows from the stored state alone: who resumes
/// after a crash does the same thing again.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "one per step, used at once")]
pub enum Todo {
    /// Tell a host.
    Command {
        /// Which.
        host: HostId,
        /// What.
        command: HostCommand,
        /// How long to wait for the answer.
        timeout: Duration,
    },
    /// Nothing; it has ended.
    Finished(MoveOutcome),
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The host answered with a receipt.
    Receipt(MoveReply),
    /// The host answered that it did not do it.
    Failed(CommandError),
    /// No answer came in time, or the host is not connected. It may have been
    /// done.
    NoAnswer,
    /// A person does not want it any more.
    Cancel,
    /// The project's row is not this move's any more, so that a commit or
    /// regrant was refused: an operator has forced another owner.
    Lost,
}

/// What the transaction that stores a successor does to the project's row.
/// Each requires that the row's fence is this move.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// Nothing.
    None,
    /// **The commit**: `host = to_host, epoch = to`, where `epoch = from`.
    Commit {
        /// The new owner.
        to_host: HostId,
        /// The source's epoch, which the row must have.
        from: Epoch,
        /// The new epoch.
        to: Epoch,
    },
    /// **The abort** after a freeze: `epoch = to`, where `epoch = from`; the
    /// owner stays.
    Regrant {
        /// The epoch that may be frozen, which the row must have.
        from: Epoch,
        /// The new epoch.
        to: Epoch,
    },
    /// The fence is lifted: `move_id = NULL`, where it is this move.
    Release,
}

/// What people are shown of a move.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Progress {
    /// What is being done.
    pub step: Step,
    /// Snapshots of the move that arrived.
    pub rounds: usize,
    /// How many of the project's own snapshots are at the destination.
    pub snapshots_arrived: usize,
    /// And how many there are.
    pub snapshots: usize,
    /// What did not arrive, in words for people.
    pub left_out: Vec<String>,
    /// Bytes on the wire so far.
    pub bytes_sent: u64,
    /// What the source is charged for the project, as far as it is known.
    pub bytes_expected: u64,
    /// Whether it can still be cancelled.
    pub cancellable: bool,
    /// What it is held up by, or why it was aborted.
    pub failure: Option<Failure>,
}

impl MoveState {
    /// The first state, to be stored in the transaction that sets the fence.
    pub fn new(spec: MoveSpec) -> Self {
        Self {
            spec,
            revision: 1,
            step: Step::Surveying,
            attempts: 0,
            snapshots: Vec::new(),
            rounds: Vec::new(),
            frozen: None,
            was_running: false,
            froze: false,
            bytes_sent: 0,
            left_out: Vec::new(),
            new_epoch: None,
            failure: None,
        }
    }

    /// Whether the commit has not happened, and no abort either.
    pub fn cancellable(&self) -> bool {
        self.step < Step::Activating
    }

    /// Whether the step in flight may be left alone when the move is cancelled:
    /// streams, which the abort's commands end before they answer. Every other
    /// step is waited for.
    pub fn interruptible(&self) -> bool {
        matches!(self.step, Step::Carrying | Step::Seeding | Step::CatchingUp)
    }

    /// How it ended; `None` while it goes on.
    pub fn outcome(&self) -> Option<MoveOutcome> {
        match self.step {
            Step::Done => Some(MoveOutcome::Moved),
            Step::Aborted => Some(MoveOutcome::Aborted),
            _ => None,
        }
    }

    /// Whether the fence is lifted, so that the project is usable.
    pub fn released(&self) -> bool {
        matches!(
            self.step,
            Step::Retiring
                | Step::CleaningSource
                | Step::CleaningDestination
                | Step::Done
                | Step::Discarding
                | Step::Aborted
        )
    }

    /// What people are shown.
    pub fn progress(&self) -> Progress {
        Progress {
            step: self.step,
            rounds: self.rounds.len(),
            snapshots_arrived: self.snapshots.iter().filter(|planned| planned.arrived).count(),
            snapshots: self.snapshots.len(),
            left_out: self.left_out.clone(),
            bytes_sent: self.bytes_sent,
            bytes_expected: self.spec.bytes,
            cancellable: self.cancellable(),
            failure: self.failure.clone(),
        }
    }

    /// The snapshot that is being sent in this step, if one is.
    pub fn sending(&self) -> Option<SnapshotName> {
        match self.step {
            Step::Seeding => Some(self.round_name()),
            Step::Carrying | Step::CatchingUp => {
                let own = self.waiting().map(|snapshot| snapshot.name.clone());
                Some(own.unwrap_or_else(|| self.final_name()))
            }
            _ => None,
        }
    }

    /// How long to wait before the step is tried again.
    pub fn pause(&self) -> Duration {
        if self.attempts == 0 {
            return Duration::ZERO;
        }
        let tuning = &self.spec.tuning;
        let doubled = tuning.retry_ms.saturating_mul(1 << (self.attempts - 1).min(20));
        Duration::from_millis(doubled.min(tuning.retry_max_ms))
    }

    /// What has to be done now.
    pub fn todo(&self) -> Todo {
        let spec = &self.spec;
        let tuning = &spec.tuning;
        let (source, destination) = (spec.source, spec.destination);
        // Only states after a commit or abort ask for it, and those have it.
        let new_epoch = self.new_epoch.unwrap_or(spec.epoch);
        let (host, step, millis) = match self.step {
            Step::Surveying => (source, MoveCommand::Survey { epoch: spec.epoch }, tuning.step_ms),
            Step::Reserving | Step::Announcing => {
                let (epoch, bytes, config) = (spec.epoch, spec.bytes, spec.config.clone());
                let snapshots = self.snapshots.iter().map(|planned| planned.snapshot.clone()).collect();
                let reserve = MoveCommand::Reserve { epoch, source, bytes, config, snapshots };
                (destination, reserve, tuning.step_ms)
            }
            Step::Carrying => (source, self.next_stream(), tuning.seed_ms),
            Step::Seeding => (source, self.send(&self.round_name()), tuning.seed_ms),
            Step::Parking => (source, MoveCommand::Park { epoch: spec.epoch }, tuning.step_ms),
            Step::Freezing => {
                let (name, grace_ms) = (self.final_name(), tuning.grace_ms);
                let millis = tuning.step_ms.saturating_add(grace_ms);
                (source, MoveCommand::Freeze { epoch: spec.epoch, name, grace_ms }, millis)
            }
            Step::CatchingUp => {
                let millis = if spec.deltas { tuning.catch_up_ms } else { tuning.seed_ms };
                (source, self.next_stream(), millis)
            }
            Step::Staging => {
                let (name, epoch) = (self.final_name(), spec.epoch);
                // A staging without a final snapshot cannot be reached; were
                // it, the destination would refuse this origin.
                let origin = self.frozen.unwrap_or(VolumeUuid::from_bytes([0; 16]));
                let arrived = self.snapshots.iter().filter(|planned| planned.arrived);
                let snapshots = arrived.map(|planned| planned.snapshot.clone()).collect();
                (destination, MoveCommand::Stage { epoch, name, origin, snapshots }, tuning.step_ms)
            }
            Step::Activating => {
                let (config, start) = (spec.config.clone(), self.was_running);
                (destination, MoveCommand::Activate { epoch: new_epoch, config, start }, tuning.step_ms)
            }
            Step::Retiring => {
                let retire = MoveCommand::Retire {
                    epoch: new_epoch,
                    owner: destination,
                    address: spec.destination_address.clone(),
                    keep_as: undo_name(spec.move_id),
                };
                (source, retire, tuning.step_ms)
            }
            Step::CleaningSource => (source, self.clean(), tuning.step_ms),
            Step::CleaningDestination => (destination, self.clean(), tuning.step_ms),
            Step::Thawing => {
                let (config, start) = (spec.config.clone(), self.was_running);
                (source, MoveCommand::Thaw { epoch: new_epoch, config, start }, tuning.step_ms)
            }
            Step::Discarding => (destination, MoveCommand::Discard, tuning.step_ms),
            Step::Done => return Todo::Finished(MoveOutcome::Moved),
            Step::Aborted => return Todo::Finished(MoveOutcome::Aborted),
        };
        let command = HostCommand::Move { move_id: spec.move_id, project: spec.project, step };
        Todo::Command { host, command, timeout: Duration::from_millis(millis) }
    }

    /// The state that follows from `event`, and what storing it does to the
    /// project's row; `None` if the event changes nothing: late and repeated
    /// answers are normal.
    pub fn after(&self, event: Event) -> Option<(Self, Change)> {
        let mut next = self.clone();
        next.revision = self.revision.saturating_add(1);
        let change = match event {
            Event::Receipt(receipt) => next.receive(receipt)?,
            Event::Failed(error) => {
                let hopeless = !matches!(
                    error.code,
                    ErrorCode::Unavailable | ErrorCode::StateUnknown | ErrorCode::Busy | ErrorCode::Failed
                );
                let failure = Failure { step: self.step, code: Some(error.code), message: error.message };
                next.fail(failure, hopeless)?
            }
            Event::NoAnswer => {
                let message = "the host does not answer".into();
                next.fail(Failure { step: self.step, code: None, message }, false)?
            }
            Event::Cancel if self.cancellable() => {
                next.abort(Failure { step: self.step, code: None, message: "it was cancelled".into() })
            }
            Event::Cancel => return None,
            Event::Lost => next.lose()?,
        };
        if next.step != self.step {
            next.attempts = 0;
        }
        Some((next, change))
    }

    /// The snapshots that serve this move, whether or not they were made.
    pub fn snapshot_names(&self) -> Vec<SnapshotName> {
        // The round in flight may exist without having been acknowledged.
        let rounds = 0..=self.rounds.len();
        let mut names: Vec<_> =
            rounds.map(|round| snapshot_name(self.spec.move_id, &round.to_string())).collect();
        names.push(self.final_name());
        names
    }

    fn receive(&mut self, receipt: MoveReply) -> Option<Change> {
        let change = match (self.step, receipt) {
            (Step::Surveying, MoveReply::Surveyed { bytes, snapshots }) => {
                if bytes > 0 {
                    self.spec.bytes = bytes;
                }
                self.plan(snapshots);
                self.step = Step::Reserving;
                Change::None
            }
            (Step::Reserving, MoveReply::Reserved) => {
                self.carry_on();
                Change::None
            }
            (Step::Announcing, MoveReply::Reserved) => {
                self.step = Step::CatchingUp;
                Change::None
            }
            // One of the project's own arrived.
            (
                Step::Carrying | Step::CatchingUp,
                MoveReply::Sent { name, origin, bytes, millis: _, left_out },
            ) if self.waiting().is_some_and(|next| next.name == name && next.origin == origin) => {
                if let Some(next) = self.snapshots.iter_mut().find(|planned| !planned.arrived) {
                    next.arrived = true;
                }
                self.sent(bytes, left_out);
                self.carry_on();
                Change::None
            }
            // It was deleted meanwhile, which is nobody's fault.
            (Step::Carrying | Step::CatchingUp, MoveReply::Gone { snapshot })
                if self.waiting() == Some(&snapshot) =>
            {
                self.snapshots.retain(|planned| planned.snapshot != snapshot);
                self.carry_on();
                Change::None
            }
            (Step::Seeding, MoveReply::Sent { name, origin, bytes, millis, left_out })
                if name == self.round_name() =>
            {
                self.sent(bytes, left_out);
                self.rounds.push(Round { name, origin, bytes, millis });
                if self.small_enough() {
                    self.step = Step::Parking;
                }
                self.attempts = 0;
                Change::None
            }
            (Step::Parking, MoveReply::Parked) => {
                self.step = Step::Freezing;
                // Stored before the first freeze is sent: from here on an
                // abort has to grant anew.
                self.froze = true;
                Change::None
            }
            (Step::Freezing, MoveReply::Frozen { epoch, name, origin, was_running, snapshots })
                if epoch == self.spec.epoch && name == self.final_name() =>
            {
                self.frozen = Some(origin);
                self.was_running = was_running;
                self.plan(snapshots);
                let late = self.waiting().is_some();
                self.step = if late { Step::Announcing } else { Step::CatchingUp };
                Change::None
            }
            (Step::CatchingUp, MoveReply::Sent { name, origin, bytes, millis, left_out })
                if name == self.final_name() && self.waiting().is_none() =>
            {
                if self.frozen != Some(origin) {
                    // The destination has something else under that name.
                    let message = "the receipt names another snapshot than the frozen one".into();
                    let code = Some(ErrorCode::Failed);
                    return Some(self.abort(Failure { step: self.step, code, message }));
                }
                self.sent(bytes, left_out);
                self.rounds.push(Round { name, origin, bytes, millis });
                self.step = Step::Staging;
                Change::None
            }
            (Step::Staging, MoveReply::Staged { origin }) if self.frozen == Some(origin) => {
                let (from, to) = (self.spec.epoch, self.spec.epoch.next());
                self.new_epoch = Some(to);
                self.step = Step::Activating;
                Change::Commit { to_host: self.spec.destination, from, to }
            }
            (Step::Activating, MoveReply::Activated { epoch, .. }) if self.new_epoch == Some(epoch) => {
                self.step = Step::Retiring;
                Change::Release
            }
            (Step::Retiring, MoveReply::Retired) => {
                self.step = Step::CleaningSource;
                Change::None
            }
            (Step::CleaningSource, MoveReply::Cleaned) => {
                self.step = Step::CleaningDestination;
                Change::None
            }
            (Step::CleaningDestination, MoveReply::Cleaned) => {
                self.step = Step::Done;
                Change::None
            }
            (Step::Thawing, MoveReply::Thawed { epoch }) if self.new_epoch == Some(epoch) => {
                self.step = Step::Discarding;
                Change::Release
            }
            (Step::Discarding, MoveReply::Discarded) => {
                self.step = Step::Aborted;
                Change::None
            }
            _ => return None,
        };
        if !matches!(self.step, Step::Discarding | Step::Aborted) {
            self.failure = None;
        }
        Some(change)
    }

    fn fail(&mut self, failure: Failure, hopeless: bool) -> Option<Change> {
        if self.outcome().is_some() {
            return None;
        }
        self.attempts = self.attempts.saturating_add(1);
        let cancellable = self.cancellable();
        if cancellable && (hopeless || self.attempts >= self.spec.tuning.attempts_max) {
            return Some(self.abort(failure));
        }
        // Forward, or back, for as long as it takes; the reason of an abort is
        // kept, it is what people want to know.
        if cancellable || self.step < Step::Thawing {
            self.failure = Some(failure);
        }
        Some(Change::None)
    }

    fn abort(&mut self, failure: Failure) -> Change {
        self.failure = Some(failure);
        self.step = Step::Thawing;
        if self.froze {
            let (from, to) = (self.spec.epoch, self.spec.epoch.next());
            self.new_epoch = Some(to);
            Change::Regrant { from, to }
        } else {
            self.new_epoch = Some(self.spec.epoch);
            Change::None
        }
    }

    fn lose(&mut self) -> Option<Change> {
        if self.outcome().is_some() || self.step == Step::Discarding {
            return None;
        }
        let message = "the project was given to another owner by force".into();
        self.failure = Some(Failure { step: self.step, code: Some(ErrorCode::StaleEpoch), message });
        // Nothing is thawed: whoever owns it now holds a higher epoch.
        self.step = Step::Discarding;
        Some(Change::None)
    }

    fn small_enough(&self) -> bool {
        let tuning = &self.spec.tuning;
        let deltas = self.rounds.len().saturating_sub(1);
        let Some(last) = self.rounds.last() else { return false };
        if last.bytes <= tuning.delta_bytes || last.millis <= tuning.delta_millis {
            return true;
        }
        if deltas >= tuning.deltas_max as usize {
            return true;
        }
        // Deltas that don't shrink never will: the project writes as fast as
        // it is sent.
        match self.rounds.as_slice() {
            [_, .., before, last] if deltas >= 2 => last.bytes >= before.bytes,
            _ => false,
        }
    }

    /// Replaces the list of the project's own snapshots; what has arrived stays
    /// so.
    fn plan(&mut self, snapshots: Vec<Carried>) {
        let before = std::mem::take(&mut self.snapshots);
        let arrived = |snapshot: &Carried| {
            before.iter().any(|planned| planned.arrived && planned.snapshot == *snapshot)
        };
        let planned = snapshots.into_iter().map(|snapshot| Planned { arrived: arrived(&snapshot), snapshot });
        self.snapshots = planned.collect();
    }

    /// The next of the project's own snapshots to be carried.
    fn waiting(&self) -> Option<&Carried> {
        self.snapshots.iter().find(|planned| !planned.arrived).map(|planned| &planned.snapshot)
    }

    /// After a snapshot was carried, or if there are none: the next one, or the
    /// next step.
    fn carry_on(&mut self) {
        self.attempts = 0;
        if self.step == Step::CatchingUp {
            return;
        }
        self.step = match self.waiting() {
            Some(_) => Step::Carrying,
            None if self.spec.deltas => Step::Seeding,
            None => Step::Parking,
        };
    }

    fn sent(&mut self, bytes: u64, left_out: Vec<String>) {
        self.bytes_sent = self.bytes_sent.saturating_add(bytes);
        for what in left_out {
            if !self.left_out.contains(&what) && self.left_out.len() < LEFT_OUT_MAX {
                self.left_out.push(what);
            }
        }
    }

    /// What the next stream is a delta to: the newest that the destination
    /// has and that is not newer.
    fn base(&self) -> Option<SnapshotName> {
        if !self.spec.deltas {
            return None;
        }
        let carried = self.snapshots.iter().take_while(|planned| planned.arrived).last();
        let round = self.rounds.last().map(|round| &round.name);
        round.or_else(|| carried.map(|planned| &planned.snapshot.name)).cloned()
    }

    /// One of the project's own snapshots, and when all have arrived the final
    /// one.
    fn next_stream(&self) -> MoveCommand {
        match self.waiting() {
            Some(snapshot) => MoveCommand::Carry {
                epoch: self.spec.epoch,
                snapshot: snapshot.clone(),
                base: self.base(),
                destination: self.spec.destination,
                address: self.spec.destination_address.clone(),
                version_max: self.spec.stream_version,
            },
            None => self.send(&self.final_name()),
        }
    }

    fn round_name(&self) -> SnapshotName {
        snapshot_name(self.spec.move_id, &self.rounds.len().to_string())
    }

    fn final_name(&self) -> SnapshotName {
        snapshot_name(self.spec.move_id, "final")
    }

    fn send(&self, name: &SnapshotName) -> MoveCommand {
        MoveCommand::Send {
            epoch: self.spec.epoch,
            name: name.clone(),
            base: self.base(),
            destination: self.spec.destination,
            address: self.spec.destination_address.clone(),
            version_max: self.spec.stream_version,
        }
    }

    fn clean(&self) -> MoveCommand {
        MoveCommand::Clean { names: self.snapshot_names() }
    }
}
