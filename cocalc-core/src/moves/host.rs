//! The host's side of a move, over its storage, runner and ledger.
//!
//! A [`MoveHost`] executes each [`MoveCommand`] and answers with its receipt.
//! Everything that decides is in the ledger, durable before its effect; so a
//! step may be repeated, and cut off by a crash anywhere.

mod destination;
mod in_flight;
mod source;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName};

use self::{destination::Incoming, in_flight::InFlight, source::To};
use super::{conflict_name, is_conflict, is_internal, is_undo, snapshot_prefix, undo_name};
use crate::{
    BoxError,
    clock::{Clock, SystemClock},
    control::{
        Carried, CommandError, ErrorCode, HostReply, MoveCommand, MoveReply, ProjectConfig, ProjectReport,
    },
    grant::{Entry, Ledger, LedgerError},
    router::HostAddress,
    runner::{self, ProjectSpec, Runner, State},
    storage::{self, Hold, SendHeader, SendStream, Snapshot, Storage},
    stream::BoxRead,
};

/// Carries a snapshot to another host, and brings back its receipt.
#[async_trait]
pub trait Transfer: fmt::Debug + Send + Sync + 'static {
    /// Sends a snapshot to `to` for `move_id`. `progress` hears how many bytes
    /// of the stream have been sent so far, and never fewer than before. If the
    /// connection breaks, a transfer may open the source again and go on.
    /// Dropping the future cuts the stream, and the receiver keeps nothing of
    /// it for long.
    async fn send(
        &self,
        to: HostId,
        address: &HostAddress,
        move_id: MoveId,
        source: &dyn StreamSource,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Delivered, TransferError>;
}

/// A snapshot that can be read again.
#[async_trait]
pub trait StreamSource: Send + Sync {
    /// Its stream from the beginning, with the same header each time.
    ///
    /// # Errors
    ///
    /// [`TransferError::Source`].
    async fn open(&self) -> Result<SendStream, TransferError>;

    /// Whether each of its streams is the same, byte for byte.
    fn repeatable(&self) -> bool;
}

/// How far a stream is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sending {
    /// Whose it is.
    pub project: ProjectId,
    /// For which move.
    pub move_id: MoveId,
    /// Which snapshot.
    pub name: SnapshotName,
    /// Bytes of it that have been sent.
    pub bytes: u64,
    /// About how many it has; 0 if nobody knows.
    pub estimated_bytes: u64,
}

/// The receiver's receipt.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Delivered {
    /// The snapshot, as it is at the receiver: complete and durable.
    pub snapshot: Snapshot,
    /// Bytes on the wire; 0 if the receiver had it already.
    pub bytes: u64,
}

/// Why a snapshot did not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The receiver does not want it, or could not keep it.
    #[error("the destination refused: {0}")]
    Refused(CommandError),
    /// The connection could not be made, or broke.
    #[error("the stream to host {host} was cut")]
    Cut {
        /// The receiver.
        host: HostId,
        /// Why.
        source: BoxError,
    },
    /// This host's own storage failed while sending.
    #[error("the snapshot could not be read")]
    Source {
        /// Why.
        source: BoxError,
    },
}

/// Takes in snapshots that peers send.
#[async_trait]
pub trait Inbound: fmt::Debug + Send + Sync + 'static {
    /// Whether `from` may send this now. `Some` if it is here already, so that
    /// nothing needs to be sent.
    async fn offered(
        &self,
        from: HostId,
        move_id: MoveId,
        header: &SendHeader,
    ) -> Result<Option<Snapshot>, CommandError>;

    /// Takes it in, all or nothing. `stream` fails unless it is complete.
    async fn receive(
        &self,
        from: HostId,
        move_id: MoveId,
        header: &SendHeader,
        stream: BoxRead,
    ) -> Result<Snapshot, CommandError>;
}

/// Whether this host can take a project: its image, its free space.
type Admission = dyn Fn(&ProjectConfig, u64) -> Result<(), CommandError> + Send + Sync;

/// Hears of bytes on the wire.
type OnProgress = dyn Fn(&Sending) + Send + Sync;

/// The snapshot that the next stream of a move is a delta to.
type Bases = Arc<Mutex<BTreeMap<ProjectId, Hold>>>;

/// Executes the steps of moves on one host. Clones share it.
#[derive(Clone)]
pub struct MoveHost {
    ledger: Ledger,
    storage: Arc<dyn Storage>,
    runner: Arc<dyn Runner>,
    transfer: Arc<dyn Transfer>,
    clock: Arc<dyn Clock>,
    admission: Arc<Admission>,
    on_progress: Arc<OnProgress>,
    park_max: Duration,
    stop_grace: Duration,
    /// Sends and receives under way, so that an abort can end them.
    sends: InFlight,
    receives: InFlight,
    bases: Bases,
}

impl fmt::Debug for MoveHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MoveHost").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

/// Makes a [`MoveHost`].
pub struct MoveHostBuilder(MoveHost);

impl fmt::Debug for MoveHostBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MoveHostBuilder").field(&self.0).finish()
    }
}

impl MoveHostBuilder {
    /// Tells the time. Default: the system's clocks.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.0.clock = clock;
        self
    }

    /// Decides whether a project of this configuration and size can come here.
    /// Default: every one can.
    pub fn admission(
        mut self,
        admit: impl Fn(&ProjectConfig, u64) -> Result<(), CommandError> + Send + Sync + 'static,
    ) -> Self {
        self.0.admission = Arc::new(admit);
        self
    }

    /// Hears how far a stream is, after every piece of it. Default: nobody
    /// does.
    pub fn on_progress(mut self, hear: impl Fn(&Sending) + Send + Sync + 'static) -> Self {
        self.0.on_progress = Arc::new(hear);
        self
    }

    /// Lets parked requests go on after this time if no freeze has followed.
    /// Default: 60 s.
    pub fn park_max(mut self, limit: Duration) -> Self {
        self.0.park_max = limit;
        self
    }

    /// The host's side of moves.
    pub fn build(self) -> MoveHost {
        self.0
    }
}

impl MoveHost {
    /// Begins with what a host needs: who holds what, the files, the
    /// processes, and the way to other hosts.
    pub fn builder(
        ledger: Ledger,
        storage: Arc<dyn Storage>,
        runner: Arc<dyn Runner>,
        transfer: Arc<dyn Transfer>,
    ) -> MoveHostBuilder {
        MoveHostBuilder(Self {
            ledger,
            storage,
            runner,
            transfer,
            clock: Arc::new(SystemClock),
            admission: Arc::new(|_, _| Ok(())),
            on_progress: Arc::new(|_| ()),
            park_max: Duration::from_secs(60),
            stop_grace: Duration::from_secs(10),
            sends: InFlight::default(),
            receives: InFlight::default(),
            bases: Bases::default(),
        })
    }

    /// Executes one step, and answers with its receipt or the reason why not.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is like a crash: what was recorded stays, and the
    /// repeated step goes on from there.
    #[tracing::instrument(name = "move.step", skip_all, fields(%move_id, %project, step = name(&step)))]
    pub async fn execute(&self, move_id: MoveId, project: ProjectId, step: MoveCommand) -> HostReply {
        let done = match step {
            MoveCommand::Survey { epoch } => self.survey(move_id, project, epoch).await,
            MoveCommand::Reserve { epoch, source, bytes, config, snapshots } => {
                let incoming = Incoming { source, epoch, bytes, config, snapshots };
                self.reserve(move_id, project, incoming).await
            }
            MoveCommand::Carry { epoch, snapshot, base, destination, address, version_max } => {
                let to = To { host: destination, address, base, version_max };
                self.carry(move_id, project, epoch, snapshot, to).await
            }
            MoveCommand::Send { epoch, name, base, destination, address, version_max } => {
                let to = To { host: destination, address, base, version_max };
                self.send(move_id, project, epoch, name, to).await
            }
            MoveCommand::Park { epoch } => self.park(move_id, project, epoch),
            MoveCommand::Freeze { epoch, name, grace_ms } => {
                self.freeze(move_id, project, epoch, name, Duration::from_millis(grace_ms)).await
            }
            MoveCommand::Stage { epoch, name, origin, snapshots } => {
                self.stage(move_id, project, epoch, (name, origin), snapshots).await
            }
            MoveCommand::Activate { epoch, config, start } => {
                self.activate(move_id, project, epoch, config, start).await
            }
            MoveCommand::Retire { epoch, owner, address, keep_as } => {
                self.retire(move_id, project, epoch, (owner, address), keep_as).await
            }
            MoveCommand::Thaw { epoch, config, start } => {
                self.thaw(move_id, project, epoch, config, start).await
            }
            MoveCommand::Discard => self.discard(move_id, project).await,
            MoveCommand::Clean { names } => self.clean(move_id, project, names).await,
        };
        match done {
            Ok(receipt) => HostReply::Move { move_id, receipt },
            Err(error) => {
                tracing::info!(code = ?error.code, reason = %error.message, "step not done");
                HostReply::Error(error)
            }
        }
    }

    /// Finishes what a crash has cut off, when the host starts: what was
    /// discarded is deleted, what is another's is put aside. Projects that
    /// cannot be finished now are only reported; their commands come again.
    pub async fn recover(&self) {
        for entry in self.ledger.entries() {
            if let Err(error) = self.settle(entry.project).await {
                tracing::warn!(project = %entry.project, error = %error.message, "cannot finish what a crash cut off");
            }
        }
    }

    /// Ends what runs here without the right to: of a project that is frozen, or that
    /// another host has, because a stop did not succeed when that began. What cannot
    /// be ended now is only reported.
    pub async fn stop_what_may_not_run(&self) {
        let list = match self.runner.list().await {
            Ok(list) => list,
            Err(error) => {
                tracing::warn!(error = %crate::chain(&error), "cannot look for what may not run");
                return;
            }
        };
        for status in list.into_iter().filter(|status| status.state == State::Running) {
            let project = status.project;
            if self
                .ledger
                .entry(project)
                .is_some_and(|entry| entry.granted.is_some() && entry.may_run().is_none())
                && let Err(error) = self.settle(project).await
            {
                tracing::warn!(%project, error = %error.message, "cannot end what may not run here");
            }
        }
    }

    /// Hears from the master who owns a project. If it is another host, under
    /// a higher epoch than the one held here: stops the project, puts its
    /// files aside as `conflict-<epoch>`, and drops a reservation that can no
    /// longer be committed.
    ///
    /// # Errors
    ///
    /// If the ledger, the runner or the storage fails; it may be repeated.
    pub async fn observe(
        &self,
        project: ProjectId,
        owner: HostId,
        epoch: Epoch,
        address: Option<HostAddress>,
    ) -> Result<(), CommandError> {
        if self.ledger.observe(project, owner, epoch, address).await?.is_some() {
            self.settle(project).await?;
        }
        Ok(())
    }

    /// Starts the project if its grant asked for that and it has not been
    /// tried since. Part of `Activate` and `Thaw`; a host that restarts calls
    /// it for the projects whose entry says `start_pending`.
    ///
    /// # Errors
    ///
    /// If the ledger fails. A start that fails is told by the report.
    pub async fn start_if_pending(&self, project: ProjectId) -> Result<ProjectReport, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.start_pending(project).await
    }

    /// What a runner needs to start `entry`'s project here.
    ///
    /// # Errors
    ///
    /// If the host may not run it, or it has no volume.
    pub async fn spec(&self, entry: &Entry) -> Result<ProjectSpec, CommandError> {
        let project = entry.project;
        let Some((epoch, slot)) = entry.may_run().zip(entry.slot) else {
            let message = format!("project {project} may not run here");
            return Err(CommandError { code: ErrorCode::StaleEpoch, message });
        };
        let volume = self.storage.volume(project).await.map_err(storage_error)?;
        Ok(ProjectSpec {
            project,
            epoch,
            volume: volume.path.unwrap_or_else(PathBuf::new),
            image: entry.config.image,
            slot,
            limits: entry.config.effective_limits(),
            env: BTreeMap::clone(&entry.config.env),
            isolation: entry.config.isolation.clone(),
        })
    }

    async fn start_pending(&self, project: ProjectId) -> Result<ProjectReport, CommandError> {
        let entry = self.ledger.known(project)?;
        if entry.start_pending && entry.may_run().is_some() {
            let spec = self.spec(&entry).await?;
            let started = match self.runner.prepare(&spec).await {
                Ok(()) => self.runner.start(&spec).await,
                Err(error) => Err(error),
            };
            if let Err(error) = started {
                // The grant stands all the same: a project that cannot start is
                // its owner's to see, not a reason to hold up a move.
                tracing::warn!(%project, error = %crate::chain(&error), "granted, but it does not start");
                self.ledger.start_settled(project).await?;
                let mut report = self.report(project).await?;
                report.status.reason.get_or_insert(crate::chain(&error));
                return Ok(report);
            }
            self.ledger.start_settled(project).await?;
        }
        self.report(project).await
    }

    async fn report(&self, project: ProjectId) -> Result<ProjectReport, CommandError> {
        let status = self.runner.status(project).await.map_err(runner_error)?;
        let epoch = self.ledger.entry(project).and_then(|entry| entry.granted);
        Ok(ProjectReport { project, epoch, status, phases: Vec::new() })
    }

    /// Brings files and processes into line with the entry, after a crash or
    /// news of another owner.
    async fn settle(&self, project: ProjectId) -> Result<(), CommandError> {
        let _turn = self.ledger.turn(project).await;
        let Some(entry) = self.ledger.entry(project) else { return Ok(()) };
        if let Some(reserved) = entry.reserved.as_ref().filter(|r| r.discarding) {
            self.delete_arrived(reserved.move_id, project).await?;
        }
        match entry.granted {
            // A frozen project may not run, whatever a crash left running;
            // its files stay for the thaw or the retirement.
            Some(epoch) if entry.frozen.is_some() && entry.seen <= Some(epoch) => {
                self.runner.stop(project, self.stop_grace).await.map_err(runner_error)?;
            }
            Some(_) if entry.may_run().is_none() => self.put_aside(&entry).await?,
            _ => {}
        }
        self.ledger.free_slot(project).await?;
        Ok(())
    }

    /// Stops a project whose epoch is over, and keeps its files read-only.
    async fn put_aside(&self, entry: &Entry) -> Result<(), CommandError> {
        let (project, epoch) = (entry.project, entry.granted);
        // What a move has frozen is its undo; anything else is a conflict that
        // people should look at.
        let name = entry.frozen.map_or_else(|| conflict_name(epoch), |frozen| undo_name(frozen.move_id));
        self.end_sends(project).await;
        self.runner.stop(project, self.stop_grace).await.map_err(runner_error)?;
        self.runner.remove(project).await.map_err(runner_error)?;
        if self.has_volume(project).await? {
            self.storage.set_aside(project, &name).await.map_err(storage_error)?;
        }
        if let Some(epoch) = epoch {
            let let_go = move |entry: &mut Entry| {
                entry.let_go(epoch);
                Ok(())
            };
            self.ledger.change(project, let_go).await?;
        }
        Ok(())
    }

    /// Ends what is being sent of a project, and holds no base any more.
    async fn end_sends(&self, project: ProjectId) {
        self.sends.stop(project).await;
        self.bases().remove(&project);
    }

    fn bases(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Hold>> {
        self.bases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The project's own snapshots here, oldest first, without those that it
    /// had no more when it came back.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    pub async fn own_snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>, CommandError> {
        let stale = self.ledger.entry(project).map(|entry| entry.stale).unwrap_or_default();
        let mut all = self.storage.snapshots(project).await.map_err(storage_error)?;
        all.retain(|snapshot| !is_internal(&snapshot.name) && !stale.contains(&carried(snapshot)));
        Ok(all)
    }

    /// Deletes the undo of moves from here that are older than `age`, and with
    /// it the snapshots that the project had here. What a conflict has left is
    /// kept for people. To be called now and then.
    pub async fn expire_undo(&self, age: Duration) {
        for entry in self.ledger.entries() {
            if let Err(error) = self.expire_undo_of(entry.project, age).await {
                tracing::warn!(project = %entry.project, error = %error.message, "cannot delete an undo");
            }
        }
    }

    async fn expire_undo_of(&self, project: ProjectId, age: Duration) -> Result<(), CommandError> {
        let gone = |entry: &Entry| entry.granted.is_none() && entry.reserved.is_none();
        if !self.ledger.entry(project).is_some_and(|entry| gone(&entry)) {
            return Ok(());
        }
        let _turn = self.ledger.turn(project).await;
        if !self.ledger.entry(project).is_some_and(|entry| gone(&entry)) {
            return Ok(());
        }
        let all = self.storage.snapshots(project).await.map_err(storage_error)?;
        let (undo, others): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|snapshot| is_undo(snapshot.name.as_str()));
        let now = self.clock.wall();
        let Some(newest) = undo.iter().map(|snapshot| snapshot.created).max() else { return Ok(()) };
        if now < newest.plus(age) || others.iter().any(|snapshot| is_conflict(snapshot.name.as_str())) {
            return Ok(());
        }
        // The undo last: what is cut off is found again by it.
        for snapshot in others.iter().chain(&undo) {
            self.storage.delete_snapshot(project, &snapshot.name).await.map_err(storage_error)?;
        }
        tracing::info!(%project, snapshots = others.len(), "the undo of a move has expired");
        Ok(())
    }

    async fn has_volume(&self, project: ProjectId) -> Result<bool, CommandError> {
        match self.storage.volume(project).await {
            Ok(_) => Ok(true),
            Err(storage::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(storage_error(error)),
        }
    }

    async fn delete_move_snapshots(&self, move_id: MoveId, project: ProjectId) -> Result<(), CommandError> {
        let prefix = snapshot_prefix(move_id);
        for snapshot in self.storage.snapshots(project).await.map_err(storage_error)? {
            if snapshot.name.as_str().starts_with(&prefix) {
                self.storage.delete_snapshot(project, &snapshot.name).await.map_err(storage_error)?;
            }
        }
        Ok(())
    }

    /// Deletes the undo of every move but `move_id`: theirs is no use to
    /// anybody once that move is committed.
    async fn delete_older_undo(&self, move_id: MoveId, project: ProjectId) -> Result<(), CommandError> {
        let keep = undo_name(move_id);
        for snapshot in self.storage.snapshots(project).await.map_err(storage_error)? {
            // Not what people have named nearly so.
            if is_undo(snapshot.name.as_str()) && snapshot.name != keep {
                self.storage.delete_snapshot(project, &snapshot.name).await.map_err(storage_error)?;
            }
        }
        Ok(())
    }

    /// Either side, at the end. Only what the move made is deleted, whatever
    /// else the command names.
    async fn clean(
        &self,
        move_id: MoveId,
        project: ProjectId,
        names: Vec<SnapshotName>,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let entry = self.ledger.entry(project);
        let reserved = entry.as_ref().and_then(|entry| entry.reserved.as_ref());
        if reserved.is_some_and(|reserved| reserved.move_id == move_id) {
            let message = format!("move {move_id} of project {project} is not over here");
            return Err(CommandError { code: ErrorCode::Busy, message });
        }
        // The master names what it knows of; what a step that was cut off and
        // repeated has made besides has the same prefix.
        let prefix = snapshot_prefix(move_id);
        for name in names.iter().filter(|name| name.as_str().starts_with(&prefix)) {
            self.storage.delete_snapshot(project, name).await.map_err(storage_error)?;
        }
        self.delete_move_snapshots(move_id, project).await?;
        let stale = entry.as_ref().map(|entry| entry.stale.clone()).unwrap_or_default();
        if !stale.is_empty() {
            for snapshot in self.storage.snapshots(project).await.map_err(storage_error)? {
                if stale.contains(&carried(&snapshot)) {
                    self.storage.delete_snapshot(project, &snapshot.name).await.map_err(storage_error)?;
                }
            }
            let tidied = move |entry: &mut Entry| {
                // Not what another move has found meanwhile.
                if entry.stale == stale {
                    entry.tidied();
                }
                Ok(())
            };
            self.ledger.change(project, tidied).await.map_err(ledger_error)?;
        }
        if entry.is_some_and(|entry| entry.may_run().is_some()) {
            // It lives here again: what was its undo here is over.
            self.delete_older_undo(move_id, project).await?;
        }
        Ok(MoveReply::Cleaned)
    }
}

/// A snapshot as moves know it.
fn carried(snapshot: &Snapshot) -> Carried {
    Carried { name: snapshot.name.clone(), origin: snapshot.origin }
}

fn name(step: &MoveCommand) -> &'static str {
    match step {
        MoveCommand::Survey { .. } => "survey",
        MoveCommand::Carry { .. } => "carry",
        MoveCommand::Reserve { .. } => "reserve",
        MoveCommand::Send { .. } => "send",
        MoveCommand::Park { .. } => "park",
        MoveCommand::Freeze { .. } => "freeze",
        MoveCommand::Stage { .. } => "stage",
        MoveCommand::Activate { .. } => "activate",
        MoveCommand::Retire { .. } => "retire",
        MoveCommand::Thaw { .. } => "thaw",
        MoveCommand::Discard => "discard",
        MoveCommand::Clean { .. } => "clean",
    }
}

/// What a failed storage call means to the master.
pub fn storage_error(error: storage::Error) -> CommandError {
    let code = match &error {
        storage::Error::NotFound { .. } | storage::Error::NoSnapshot { .. } => ErrorCode::NotFound,
        storage::Error::AlreadyExists { .. } => ErrorCode::Exists,
        storage::Error::InUse { .. } => ErrorCode::InUse,
        storage::Error::Path { .. } => ErrorCode::Invalid,
        storage::Error::NoSpace { .. } => ErrorCode::NoSpace,
        storage::Error::NestedVolumes { .. } | storage::Error::Unsupported { .. } => ErrorCode::Invalid,
        _ => ErrorCode::Failed,
    };
    CommandError { code, message: crate::chain(&error) }
}

/// What a failed runner call means to the master.
pub fn runner_error(error: runner::Error) -> CommandError {
    let code = match &error {
        runner::Error::NoImage { .. } => ErrorCode::NotFound,
        runner::Error::Busy { .. } => ErrorCode::Busy,
        runner::Error::Invalid { .. } => ErrorCode::Invalid,
        runner::Error::TimedOut { .. } => ErrorCode::Unavailable,
        runner::Error::Unknown { .. } => ErrorCode::StateUnknown,
        _ => ErrorCode::Failed,
    };
    CommandError { code, message: crate::chain(&error) }
}

fn transfer_error(error: TransferError) -> CommandError {
    let code = match &error {
        TransferError::Refused(refusal) => refusal.code,
        TransferError::Cut { .. } => ErrorCode::Unavailable,
        TransferError::Source { .. } => ErrorCode::Failed,
    };
    CommandError { code, message: crate::chain(&error) }
}

fn is_up(state: State) -> bool {
    matches!(state, State::Running | State::Starting)
}

fn ledger_error(error: LedgerError) -> CommandError {
    error.into()
}
