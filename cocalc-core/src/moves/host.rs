//! The host's side of a move, over its storage, runner and ledger.
//!
//! A [`MoveHost`] executes each [`MoveCommand`] and answers with its receipt.
//! Everything that decides is in the ledger, durable before its effect; so a
//! step may be repeated, and cut off by a crash anywhere.

mod destination;
mod in_flight;
mod source;

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId};

use self::in_flight::InFlight;
use super::{UNDO_PREFIX, conflict_name, snapshot_prefix, undo_name};
use crate::{
    BoxError,
    clock::{Clock, SystemClock},
    control::{CommandError, ErrorCode, HostReply, MoveCommand, MoveReply, ProjectConfig, ProjectReport},
    grant::{Entry, Ledger, LedgerError},
    router::HostAddress,
    runner::{self, ProjectSpec, Runner, State},
    storage::{self, SendHeader, SendStream, Snapshot, Storage},
    stream::BoxRead,
};

/// Carries a snapshot to another host, and brings back its receipt.
#[async_trait]
pub trait Transfer: fmt::Debug + Send + Sync + 'static {
    /// Sends `stream` to `to` for `move_id`. `progress` hears how many bytes
    /// are on the wire so far. Dropping the future cuts the stream, and the
    /// receiver keeps nothing of it.
    async fn send(
        &self,
        to: HostId,
        address: &HostAddress,
        move_id: MoveId,
        stream: SendStream,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Delivered, TransferError>;
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
type OnProgress = dyn Fn(ProjectId, MoveId, u64) + Send + Sync;

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

    /// Hears how many bytes of a stream are on the wire. Default: nobody does.
    pub fn on_progress(mut self, hear: impl Fn(ProjectId, MoveId, u64) + Send + Sync + 'static) -> Self {
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
            on_progress: Arc::new(|_, _, _| ()),
            park_max: Duration::from_secs(60),
            stop_grace: Duration::from_secs(10),
            sends: InFlight::default(),
            receives: InFlight::default(),
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
            MoveCommand::Reserve { epoch, source, bytes, config } => {
                self.reserve(move_id, project, source, epoch, bytes, config).await
            }
            MoveCommand::Send { epoch, name, base, destination, address } => {
                self.send(move_id, project, epoch, name, base, (destination, address)).await
            }
            MoveCommand::Park { epoch } => self.park(move_id, project, epoch),
            MoveCommand::Freeze { epoch, name, grace_ms } => {
                self.freeze(move_id, project, epoch, name, Duration::from_millis(grace_ms)).await
            }
            MoveCommand::Stage { epoch, name, origin } => {
                self.stage(move_id, project, epoch, name, origin).await
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
            limits: entry.config.limits.clone(),
            env: BTreeMap::clone(&entry.config.env),
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
        self.sends.stop(project).await;
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
            // Not what people have named so.
            let of = snapshot.name.as_str().strip_prefix(UNDO_PREFIX);
            if of.is_some_and(|id| id.parse::<MoveId>().is_ok()) && snapshot.name != keep {
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
        names: Vec<cocalc_ids::SnapshotName>,
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
        if entry.is_some_and(|entry| entry.may_run().is_some()) {
            // It lives here again: what was its undo here is over.
            self.delete_older_undo(move_id, project).await?;
        }
        Ok(MoveReply::Cleaned)
    }
}

fn name(step: &MoveCommand) -> &'static str {
    match step {
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
        storage::Error::AlreadyExists { .. } => ErrorCode::Invalid,
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
