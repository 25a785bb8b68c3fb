//! Carries out the master's commands, each under the grant it names.

mod files;
mod inside;
mod once;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cocalc_core::{
    admission::{Gate, QueueLimits, Urgency},
    backups,
    clock::SystemClock,
    control::{
        BackupsCommand, CommandError, ErrorCode, HeldProject, HostCommand, HostReply, ProjectConfig,
        ProjectReport,
    },
    grant::{Entry, Ledger},
    ids::{Epoch, ImageDigest, ProjectId, SnapshotName},
    moves::host::{MoveHost, runner_error, storage_error},
    runner::{ProjectSpec, Runner, State, Status},
    snapshots::Keeper,
    storage::{self, Storage, VolumeOptions},
};

use cocalc_daemon::probe::Histogram;

use crate::{deaths::Deaths, idle::Idle, ran::Ran};

pub(crate) use self::inside::Inside;
use self::{
    files::{Comparison, Original},
    once::Once,
};

/// The longest grace a stop may be given.
const GRACE_MAX: Duration = Duration::from_secs(600);

/// What a host does with its projects. Clones share it.
#[derive(Clone)]
pub struct Lifecycle {
    ledger: Ledger,
    storage: Arc<dyn Storage>,
    runner: Arc<dyn Runner>,
    moves: MoveHost,
    keeper: Keeper,
    images: Arc<dyn Fn(ImageDigest) -> Option<PathBuf> + Send + Sync>,
    /// The projects of which the master was told that it is not known what they do.
    unknown: Arc<Mutex<BTreeSet<ProjectId>>>,
    /// Why the last start of a project failed, until one succeeds.
    failures: Arc<Mutex<BTreeMap<ProjectId, String>>>,
    once: Once,
    gate: Gate,
    starts: Arc<Histogram>,
    /// Keeps the backups, if this host can make any.
    backups: Option<backups::Keeper>,
    idle: Option<Idle>,
    inside: Option<Inside>,
    deaths: Deaths,
    ran: Option<Ran>,
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

impl Lifecycle {
    /// Works on these; `images` finds an image that is on this host.
    pub fn new(
        ledger: Ledger,
        storage: Arc<dyn Storage>,
        runner: Arc<dyn Runner>,
        moves: MoveHost,
        keeper: Keeper,
        images: Arc<dyn Fn(ImageDigest) -> Option<PathBuf> + Send + Sync>,
    ) -> Self {
        Self {
            ledger,
            storage,
            runner,
            moves,
            keeper,
            images,
            unknown: Arc::default(),
            failures: Arc::default(),
            once: Once::default(),
            gate: Gate::new(QueueLimits::for_cores(cores()), available_bytes),
            starts: Arc::new(Histogram::seconds()),
            inside: None,
            backups: None,
            idle: None,
            deaths: Deaths::new(Arc::new(SystemClock)),
            ran: None,
        }
    }

    /// Keeps in `directory` which commands were begun and done that must not be
    /// done twice. Default: in memory only.
    ///
    /// # Errors
    ///
    /// If what is there cannot be read.
    pub fn keep_receipts(mut self, directory: &Path) -> std::io::Result<Self> {
        self.once = Once::open(directory)?;
        Ok(self)
    }

    /// Looks inside projects. Default: only what the runner itself tells.
    pub(crate) fn inside(mut self, inside: Inside) -> Self {
        self.inside = Some(inside);
        self
    }

    /// Knows what ran before a reboot. Default: nothing did.
    #[must_use]
    pub(crate) fn ran(self, ran: Ran) -> Self {
        Self { ran: Some(ran), ..self }
    }

    /// Who has ended by itself.
    pub(crate) fn deaths(&self) -> &Deaths {
        &self.deaths
    }

    /// Who uses the projects, if this host knows.
    pub(crate) fn use_of_projects(&self) -> Option<&Idle> {
        self.idle.as_ref()
    }

    /// Whether a reboot has cut a project off, which this host may run.
    pub(crate) fn is_cut_off(&self, entry: &Entry) -> bool {
        self.ran.as_ref().is_some_and(|ran| ran.cut_off(entry.project, entry.may_run()))
    }

    /// It ended by itself, and has rested since then: a reboot is no reason to
    /// start it.
    pub(crate) async fn let_rest(&self, project: ProjectId) {
        let _turn = self.ledger.turn(project).await;
        let stopped = self.runner.status(project).await.is_ok_and(|status| status.state == State::Stopped);
        let entry = self.ledger.entry(project);
        // One that a reboot has cut off may still be waiting for its turn.
        if let Some(ran) = &self.ran
            && stopped
            && !entry.is_some_and(|entry| self.is_cut_off(&entry))
        {
            ran.forget(project).await;
        }
    }

    /// Brings up what a reboot has cut off, unless it was stopped or has left since.
    ///
    /// # Errors
    ///
    /// If it does not start. Then it is not tried again.
    pub(crate) async fn start_cut_off(&self, project: ProjectId) -> Result<ProjectReport, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let entry = self.ledger.known(project)?;
        if !self.is_cut_off(&entry) {
            return self.report(project, vec![]).await;
        }
        let phases = self.remember(project, self.bring_up(&entry, Urgency::Background).await)?;
        self.report(project, phases).await
    }

    /// Knows who uses the projects. Default: nobody does.
    #[must_use]
    pub fn idle(mut self, idle: Idle) -> Self {
        self.idle = Some(idle);
        self
    }

    /// The same, with a keeper of backups.
    #[must_use]
    pub fn with_backups(self, backups: Option<backups::Keeper>) -> Self {
        Self { backups, ..self }
    }

    /// Carries out one command. Repeating it is harmless.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is like a crash: the repeated command goes on from
    /// there.
    #[tracing::instrument(name = "command", skip_all, fields(project = %command.project()))]
    pub async fn execute(&self, command: HostCommand) -> HostReply {
        let project = command.project();
        let done = match command {
            HostCommand::Create { project, epoch, config } => self.create(project, epoch, config).await,
            HostCommand::Start { project, epoch, config } => self.start(project, epoch, config).await,
            HostCommand::Stop { project, epoch, grace_ms } => {
                self.stop(project, epoch, Duration::from_millis(grace_ms).min(GRACE_MAX)).await
            }
            HostCommand::Delete { project, epoch } => self.delete(project, epoch).await,
            HostCommand::Forget { project, epoch } => self.forget(project, epoch).await,
            HostCommand::Report { project } => self.report(project, vec![]).await.map(HostReply::Project),
            HostCommand::Snapshot { project, epoch, name } => self.snapshot(project, epoch, &name).await,
            HostCommand::Snapshots { project, epoch } => self.snapshots(project, epoch).await,
            HostCommand::DeleteSnapshot { project, epoch, name } => {
                self.delete_snapshot(project, epoch, &name).await
            }
            HostCommand::RestoreSnapshot { project, epoch, name, former } => {
                self.restore(project, epoch, &name, &former).await
            }
            HostCommand::RestorePath { operation, project, epoch, name, path, former } => {
                self.once(operation, project, self.restore_path(project, epoch, name, path, &former)).await
            }
            HostCommand::Diff { project, epoch, from, to, after, max } => {
                self.diff(project, epoch, Comparison { from, to, after, max }).await
            }
            HostCommand::Copy { operation, project, epoch, from, from_epoch, to, options } => {
                self.once(operation, project, self.copy(project, epoch, from, from_epoch, to, options)).await
            }
            HostCommand::Clone { project, epoch, config, source, source_epoch, name, same_owner } => {
                let original = Original { source, epoch: source_epoch, name, same_owner };
                self.clone_project(project, epoch, config, original).await
            }
            HostCommand::Configure { project, epoch, config } => self.configure(project, epoch, config).await,
            HostCommand::Usage { project, epoch, count } => self.usage(project, epoch, count).await,
            HostCommand::Why { project } => self.why(project).await,
            HostCommand::Inside { project, epoch, what } => self.look_inside(project, epoch, what).await,
            HostCommand::Backups { project, epoch, what } => self.back_up(project, epoch, what).await,
            HostCommand::Move { move_id, project, step } => {
                let reply = self.moves.execute(move_id, project, step).await;
                if let HostReply::Error(error) = &reply {
                    self.note_unknown(project, error);
                }
                return reply;
            }
        };
        done.unwrap_or_else(|error| {
            tracing::info!(code = ?error.code, reason = %error.message, "command not done");
            self.note_unknown(project, &error);
            HostReply::Error(error)
        })
    }

    /// The master hears now that it is not known what a project does, and has to hear
    /// when it is.
    fn note_unknown(&self, project: ProjectId, error: &CommandError) {
        if error.code == ErrorCode::StateUnknown {
            self.unknown().insert(project);
        }
    }

    /// The projects of which the master believes that it is not known what they do.
    pub(crate) fn unknown(&self) -> MutexGuard<'_, BTreeSet<ProjectId>> {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn create(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.check_image(&config)?;
        let options = VolumeOptions { limit_bytes: self.keeper.limit_bytes(&config) };
        self.ledger.create(project, epoch, config).await?;
        match self.storage.create(project, &options).await {
            // An earlier try of the same command made it.
            Ok(_) | Err(storage::Error::AlreadyExists { .. }) => {}
            Err(error) => return Err(storage_error(error)),
        }
        let entry = self.ledger.permit(project, epoch)?;
        self.prepare_next(&entry).await;
        self.report(project, vec![]).await.map(HostReply::Project)
    }

    async fn start(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let started = async {
            self.check_image(&config)?;
            let entry = self.ledger.configure(project, epoch, config).await?;
            if let Ok(status) = self.runner.status(project).await {
                self.deaths.asked_for(&status);
            }
            self.bring_up(&entry, Urgency::Asked).await
        };
        let phases = self.remember(project, started.await)?;
        self.report(project, phases).await.map(HostReply::Project)
    }

    /// Why the last start of a project failed; `None` if it succeeded, or a new
    /// one has begun since [`forget_failure`](Self::forget_failure).
    pub fn start_failure(&self, project: ProjectId) -> Option<String> {
        self.failures().get(&project).cloned()
    }

    /// A new start is about to be asked for.
    pub fn forget_failure(&self, project: ProjectId) {
        self.failures().remove(&project);
    }

    fn failures(&self) -> MutexGuard<'_, BTreeMap<ProjectId, String>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember<T>(&self, project: ProjectId, outcome: Result<T, CommandError>) -> Result<T, CommandError> {
        match &outcome {
            Ok(_) => drop(self.failures().remove(&project)),
            Err(error) => drop(self.failures().insert(project, error.message.clone())),
        }
        outcome
    }

    /// Starts a project by itself, under the grant that is held; the master
    /// hears of it as a change.
    ///
    /// # Errors
    ///
    /// If the host may not run it, or it does not start.
    pub async fn start_held(&self, project: ProjectId) -> Result<ProjectReport, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let entry = self.ledger.known(project)?;
        let phases = self.bring_up(&entry, Urgency::Asked).await?;
        self.report(project, phases).await
    }

    async fn bring_up(&self, entry: &Entry, urgency: Urgency) -> Result<Vec<(String, u64)>, CommandError> {
        let spec: ProjectSpec = self.moves.spec(entry).await?;
        let project = spec.project;
        let begun = Instant::now();
        let turn = match self.gate.enter(urgency).await {
            Ok(turn) => Some(turn),
            // A few at a time come so, and nobody would ask for them again.
            Err(_) if urgency == Urgency::Background => None,
            Err(full) => {
                let message = format!("project {project} cannot start now: {full}");
                return Err(CommandError { code: ErrorCode::Busy, message });
            }
        };
        let mut phases = vec![("turn".to_owned(), millis(begun))];
        let prepared = Instant::now();
        self.runner.prepare(&spec).await.map_err(runner_error)?;
        phases.push(("prepare".to_owned(), millis(prepared)));
        let started = Instant::now();
        self.runner.start(&spec).await.map_err(runner_error)?;
        drop(turn);
        phases.push(("start".to_owned(), millis(started)));
        // What the start was made of, as far as the runner says.
        phases.extend(
            self.runner
                .start_phases(project)
                .into_iter()
                .map(|(step, took)| (format!("start: {step}"), took)),
        );
        self.starts.observe(begun.elapsed());
        Ok(phases)
    }

    /// Prepares the next start of a project that is stopped, so that it finds
    /// everything done that can be. If that fails, the start says why.
    async fn prepare_next(&self, entry: &Entry) {
        if let Ok(spec) = self.moves.spec(entry).await
            && let Err(error) = self.runner.prepare(&spec).await
        {
            let error = cocalc_core::chain(&error);
            tracing::warn!(project = %entry.project, error, "cannot prepare the next start");
        }
    }

    /// Who may start now.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// How long starts took, in seconds.
    pub(crate) fn starts(&self) -> &Arc<Histogram> {
        &self.starts
    }

    async fn stop(
        &self,
        project: ProjectId,
        epoch: Epoch,
        grace: Duration,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let entry = self.ledger.permit(project, epoch)?;
        self.runner.stop(project, grace).await.map_err(runner_error)?;
        self.deaths.forget(project);
        let idle = self.idle.as_ref().and_then(|idle| idle.stopped(project));
        self.keeper.stopped(&entry).await;
        // A stop waits for its snapshot; the backup follows.
        if let Some(backups) = &self.backups {
            backups.stopped(&entry).await;
        }
        self.prepare_next(&entry).await;
        let mut report = self.report(project, vec![]).await?;
        if let Some(reason) = idle {
            report.status.reason.get_or_insert(reason);
        }
        Ok(HostReply::Project(report))
    }

    /// Who uses a project, and until when it runs.
    async fn why(&self, project: ProjectId) -> Result<HostReply, CommandError> {
        match &self.idle {
            Some(idle) => idle.report(project).await.map(HostReply::Why).map_err(runner_error),
            None => {
                let message = "this host does not watch who uses its projects".to_owned();
                Err(CommandError { code: ErrorCode::Unavailable, message })
            }
        }
    }

    async fn delete(&self, project: ProjectId, epoch: Epoch) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        // Nothing is begun of what cannot be ended.
        self.runner.status(project).await.map_err(runner_error)?;
        // The grant goes first: from here on nothing starts it again.
        self.ledger.delete(project, epoch).await?;
        self.leave_backups(project).await;
        self.runner.remove(project).await.map_err(runner_error)?;
        self.storage.delete(project).await.map_err(storage_error)?;
        self.ledger.free_slot(project).await?;
        self.forget_failure(project);
        self.deaths.forget(project);
        Ok(HostReply::Deleted { project, epoch })
    }

    /// Deletes what is left of a project that was deleted elsewhere.
    async fn forget(&self, project: ProjectId, epoch: Epoch) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        if let Some(entry) = self.ledger.entry(project)
            && (entry.granted.is_some() || entry.reserved.is_some())
        {
            let message = format!("this host holds project {project}, or expects it; it does not forget it");
            return Err(CommandError { code: ErrorCode::StaleEpoch, message });
        }
        self.leave_backups(project).await;
        self.runner.remove(project).await.map_err(runner_error)?;
        self.storage.delete(project).await.map_err(storage_error)?;
        self.ledger.free_slot(project).await?;
        Ok(HostReply::Deleted { project, epoch })
    }

    /// Nothing of the project is read any more, nor known of its backups.
    async fn leave_backups(&self, project: ProjectId) {
        if let Some(backups) = &self.backups {
            backups.leave(project).await;
            backups.forget(project).await;
        }
    }

    /// Not in the project's turn, which a backup takes by itself for as long as
    /// it needs it.
    async fn back_up(
        &self,
        project: ProjectId,
        epoch: Epoch,
        what: BackupsCommand,
    ) -> Result<HostReply, CommandError> {
        let Some(backups) = &self.backups else {
            let message = "this host makes no backups: it has no cocalc-backup-worker".to_owned();
            return Err(CommandError { code: ErrorCode::Failed, message });
        };
        let answer = backups.execute(project, epoch, what).await?;
        Ok(HostReply::Backups { project, answer })
    }

    async fn snapshot(
        &self,
        project: ProjectId,
        epoch: Epoch,
        name: &SnapshotName,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.ledger.permit(project, epoch)?;
        let snapshot = self.storage.snapshot(project, name).await.map_err(storage_error)?;
        Ok(HostReply::Snapshots { project, snapshots: vec![snapshot] })
    }

    async fn snapshots(&self, project: ProjectId, epoch: Epoch) -> Result<HostReply, CommandError> {
        self.ledger.permit(project, epoch)?;
        let snapshots = self.moves.own_snapshots(project).await?;
        Ok(HostReply::Snapshots { project, snapshots })
    }

    async fn delete_snapshot(
        &self,
        project: ProjectId,
        epoch: Epoch,
        name: &SnapshotName,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let entry = self.ledger.permit(project, epoch)?;
        self.storage.delete_snapshot(project, name).await.map_err(storage_error)?;
        // The end of a restore from a backup, for which it was given room.
        if backups::is_fetched(name)
            && let Err(error) = self.keeper.end_room(&entry, name).await
        {
            let error = cocalc_core::chain(&error);
            tracing::warn!(%project, error, "it keeps the room of its restore for a while");
        }
        Ok(HostReply::Snapshots { project, snapshots: vec![] })
    }

    async fn restore(
        &self,
        project: ProjectId,
        epoch: Epoch,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.ledger.permit(project, epoch)?;
        let status = self.runner.status(project).await.map_err(runner_error)?;
        if status.state != State::Stopped {
            let message =
                format!("project {project} is running; stop it before going back to snapshot {name}");
            return Err(CommandError { code: ErrorCode::Busy, message });
        }
        // What was prepared refers to the volume that is about to be replaced.
        self.runner.remove(project).await.map_err(runner_error)?;
        self.storage.restore(project, name, former).await.map_err(storage_error)?;
        self.report(project, vec![]).await.map(HostReply::Project)
    }

    /// The state of a project, with the grant that is held.
    ///
    /// # Errors
    ///
    /// If the runner cannot tell.
    pub async fn report(
        &self,
        project: ProjectId,
        phases: Vec<(String, u64)>,
    ) -> Result<ProjectReport, CommandError> {
        let mut status = self.runner.status(project).await.map_err(runner_error)?;
        if let Some(left_alone) = self.deaths.wait(&status) {
            status.reason = Some(left_alone);
        }
        let epoch = self.ledger.entry(project).and_then(|entry| entry.granted);
        Ok(ProjectReport { project, epoch, status, phases })
    }

    /// Everything this host holds, for its registration.
    pub async fn held(&self) -> Vec<HeldProject> {
        let mut held = Vec::new();
        for entry in self.ledger.entries() {
            if entry.granted.is_none() && entry.reserved.is_none() {
                continue;
            }
            let report = match self.report(entry.project, vec![]).await {
                Ok(report) => report,
                // It is held all the same, and who owns it now has to be heard.
                Err(error) => {
                    tracing::warn!(project = %entry.project, error = %error.message, "cannot tell its state");
                    let (project, epoch, reason) = (entry.project, entry.granted, Some(error.message));
                    let state = State::Unknown;
                    self.unknown().insert(project);
                    let status = Status { project, epoch: None, state, started: None, reason };
                    ProjectReport { project, epoch, status, phases: vec![] }
                }
            };
            held.push(HeldProject { report, frozen: entry.frozen.map(|f| f.epoch) });
        }
        held
    }

    /// Refuses an image that is not here before anything is recorded.
    fn check_image(&self, config: &ProjectConfig) -> Result<(), CommandError> {
        match config.image {
            Some(digest) if (self.images)(digest).is_none() => Err(CommandError {
                code: ErrorCode::NotFound,
                message: format!("image {digest} is not on this host; import it there first"),
            }),
            _ => Ok(()),
        }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Memory that can be had without swapping, in bytes; all there is where the
/// kernel does not say.
fn available_bytes() -> u64 {
    let about = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = about
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    kib.map_or(u64::MAX, |kib: u64| kib.saturating_mul(1024))
}

fn millis(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
}
