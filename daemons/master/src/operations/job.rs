//! Operations of one host: create, start, stop, delete, snapshots.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    connector::Peer,
    control::{CommandError, ErrorCode, HostCommand, HostReply, ProjectReport},
    runner::State,
    storage::CopyOptions,
};
use cocalc_ids::{Epoch, HostId, ImageDigest, ProjectId, SessionId, SnapshotName};
use cocalc_sqlite::master::{self as store, Ended, Job, Operation, Outcome, Project, ProjectState};

use tokio::sync::watch;

use super::restoring;
use crate::shared::{Shared, Unanswered};

/// How long a host may be away before an operation that it does not know of
/// fails. Its daemon may just be restarting.
pub(super) const AWAY_MAX: Duration = Duration::from_secs(20);
/// How often a command is repeated that a host could not do right now.
const BUSY_RETRIES: u32 = 5;
/// After how long a command that is not answered is sent again for the first
/// time. A host takes repeated commands one after the other.
const REPEAT_AFTER: Duration = Duration::from_secs(5);
/// How long a project's processes may take to end when it is stopped only to be
/// started again.
const RESTART_GRACE_MS: u64 = 10_000;
/// The phase of an operation of which no host knows.
pub(crate) const QUEUED: &str = "queued";
/// The phase in which it turns out whether the operation makes sense, before
/// anything is done.
pub(crate) const CHECKING: &str = "checking";

/// What to do about projects on different hosts.
pub(crate) const OTHER_HOST: &str = "the two projects are on different hosts, between which nothing is copied yet: \
    move one of them to the other's host first, or copy with rsync over SSH";

/// Runs the operation, and records its end.
pub(super) async fn run(shared: &Arc<Shared>, operation: &Operation, mut cancel: watch::Receiver<bool>) {
    let id = operation.project;
    let project = match shared.db(move |store| store.project(id)).await {
        Ok(project) => project,
        Err(error) => {
            // The project's row is there as long as its operation goes on.
            tracing::error!(operation = %operation.id, error = %cocalc_core::chain(&error), "cannot begin");
            let detail = "the project could not be read".to_owned();
            return shared.finish(operation.id, failed("internal", detail, ProjectState::Failed)).await;
        }
    };
    let ended = match act(shared, operation, &project, &mut cancel).await {
        Ok(ended) => ended,
        Err(failure) => failure.ended(&operation.job, &project),
    };
    let deleted = ended.project == ProjectState::Deleted;
    shared.finish(operation.id, ended).await;
    if deleted {
        shared.backups_of_deleted(project.id).await;
        if let Err(error) = shared.tell_of_project(project.host, project.id).await {
            tracing::warn!(project = %project.id, error = %cocalc_core::chain(&error), "cannot announce a deletion");
        }
        let id = project.id;
        if let Err(error) = shared.db(move |store| store.remove_secrets(id)).await {
            tracing::warn!(project = %id, error = %cocalc_core::chain(&error), "its secrets are not removed");
        }
        if let Err(error) = shared.forget_project(project.id).await {
            tracing::warn!(project = %project.id, error = %cocalc_core::chain(&error), "cannot tidy after a deletion");
        }
    }
}

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The host refused.
    Refused(CommandError),
    /// What is copied from is on another host.
    OtherHost,
    /// The host is not there, and did not get the command.
    NoAnswer,
    /// Somebody has said that the host is dead.
    Fenced,
    /// The answer is not the receipt of what was asked for.
    NoReceipt,
    /// The master's own store.
    Store(store::Error),
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

impl Failure {
    pub(super) fn ended(self, job: &Job, project: &Project) -> Ended {
        let unknown = matches!(&self, Self::Refused(error) if error.code == ErrorCode::StateUnknown);
        let (code, detail) = match self {
            Self::Refused(error) => (code(error.code), error.message),
            Self::OtherHost => ("other_host", OTHER_HOST.to_owned()),
            Self::NoAnswer => ("host_unavailable", "the project's host does not answer".to_owned()),
            Self::Fenced => {
                ("host_fenced", "the project's host was fenced: somebody has said that it is dead".to_owned())
            }
            Self::NoReceipt => {
                ("internal", "the host answered with the receipt of something else".to_owned())
            }
            Self::Store(error) => {
                tracing::error!(project = %project.id, error = %cocalc_core::chain(&error), "an operation failed");
                ("internal", "the master's database failed".to_owned())
            }
        };
        // A failed snapshot leaves the project as it was.
        let state = match job {
            job if job.keeps_state() => project.state,
            _ if unknown => ProjectState::Unknown,
            _ => ProjectState::Failed,
        };
        failed(code, detail, state)
    }
}

fn failed(code: &str, detail: String, project: ProjectState) -> Ended {
    let tells = matches!(project, ProjectState::Failed | ProjectState::Unknown);
    let reason = tells.then(|| detail.clone());
    Ended { outcome: restoring::outcome(code, detail), project, reason, report: None }
}

/// What the API says of a host's refusal.
pub(crate) fn code(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::StaleEpoch => "stale_epoch",
        ErrorCode::Busy => "project_busy",
        ErrorCode::NotFound => "not_found",
        ErrorCode::Exists => "already_exists",
        ErrorCode::InUse => "snapshot_in_use",
        ErrorCode::NoSpace => "no_space",
        ErrorCode::Invalid => "invalid_request",
        ErrorCode::Unavailable => "host_unavailable",
        ErrorCode::StateUnknown => "state_unknown",
        ErrorCode::RepositoryUnavailable => "repository_unavailable",
        ErrorCode::RepositoryDenied => "repository_denied",
        ErrorCode::RepositoryDamaged => "repository_damaged",
        ErrorCode::Cancelled => "cancelled",
        _ => "host_failed",
    }
}

async fn act(
    shared: &Shared,
    operation: &Operation,
    project: &Project,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Ended, Failure> {
    let (id, epoch) = (project.id, project.epoch);
    let call = Call { shared, operation, host: project.host };
    Ok(match &operation.job {
        Job::Create | Job::Clone { .. } | Job::FromBackup { .. } => {
            let report = create(&call, project, cancel).await?;
            done(ProjectState::from(report.status.state), Some(report))
        }
        Job::Start => {
            call.ensure_image(project.config.image).await?;
            // A creation that failed is made good; files that were there once
            // are never replaced by an empty volume.
            if !project.made {
                create(&call, project, cancel).await?;
            }
            let command = HostCommand::Start { project: id, epoch, config: project.config.clone() };
            let report = call.report("starting", command, Duration::from_secs(300), epoch).await?;
            match report.status.state {
                State::Running | State::Starting => {
                    done(ProjectState::from(report.status.state), Some(report))
                }
                _ => {
                    let why = report.status.reason.as_deref().unwrap_or("it ended at once");
                    failed("start_failed", why.to_owned(), ProjectState::Failed)
                }
            }
        }
        Job::Stop { grace_ms } => {
            let command = HostCommand::Stop { project: id, epoch, grace_ms: *grace_ms };
            let limit = Duration::from_millis(*grace_ms) + Duration::from_secs(60);
            let report = call.report("stopping", command, limit, epoch).await?;
            done(ProjectState::from(report.status.state), Some(report))
        }
        Job::Delete => {
            super::leftovers::note(shared, project).await?;
            let command = HostCommand::Delete { project: id, epoch };
            match call.perform("deleting", command, Duration::from_secs(600)).await? {
                HostReply::Deleted { project, epoch: deleted } if (project, deleted) == (id, epoch) => {
                    done(ProjectState::Deleted, None)
                }
                _ => return Err(Failure::NoReceipt),
            }
        }
        Job::Snapshot { name } => {
            // Later it may be this one.
            if [QUEUED, CHECKING].contains(&&*operation.phase) && call.has_snapshot(name, project).await? {
                let detail = format!("there is already a snapshot {name}");
                return Ok(Ended {
                    reason: project.reason.clone(),
                    ..failed("snapshot_exists", detail, project.state)
                });
            }
            let command = HostCommand::Snapshot { project: id, epoch, name: name.clone() };
            call.keep("taking a snapshot", command, project).await?
        }
        Job::DeleteSnapshot { name } => {
            let command = HostCommand::DeleteSnapshot { project: id, epoch, name: name.clone() };
            call.keep("deleting a snapshot", command, project).await?
        }
        Job::RestoreSnapshot { name, former } => {
            let (name, former) = (name.clone(), former.clone());
            let command = HostCommand::RestoreSnapshot { project: id, epoch, name, former };
            call.keep("restoring a snapshot", command, project).await?
        }
        Job::RestorePath { name, path, former } => {
            let (name, path, former) = (name.clone(), path.clone(), former.clone());
            let operation = operation.id;
            let command = HostCommand::RestorePath { operation, project: id, epoch, name, path, former };
            call.keep("restoring a path", command, project).await?
        }
        Job::Copy { from, to, replace } => {
            let source = original(shared, from.project, project).await?;
            let options = CopyOptions { same_owner: source.owner == project.owner, replace: *replace };
            let command = HostCommand::Copy {
                operation: operation.id,
                project: id,
                epoch,
                from: from.clone(),
                from_epoch: source.epoch,
                to: to.clone(),
                options,
            };
            call.keep("copying", command, project).await?
        }
        Job::RestoreBackup { backup, to } => restoring::restore(&call, project, backup, to, cancel).await?,
        Job::SetImage { image, restart } => {
            call.ensure_image(Some(*image)).await?;
            let was_running = project.state == ProjectState::Running;
            if was_running && *restart {
                let command = HostCommand::Stop { project: id, epoch, grace_ms: RESTART_GRACE_MS };
                call.report("stopping", command, Duration::from_secs(120), epoch).await?;
            }
            let (within, image) = (operation.id, *image);
            let changed = shared
                .db(move |store| store.configure_within(within, id, |config| config.image = Some(image)));
            let config = changed.await?.config;
            if project.made {
                let command = HostCommand::Configure { project: id, epoch, config: config.clone() };
                call.report("changing the image", command, Duration::from_secs(120), epoch).await?;
            }
            if !was_running {
                return Ok(Ended {
                    outcome: Outcome::Done,
                    project: project.state,
                    reason: project.reason.clone(),
                    report: None,
                });
            }
            let command = HostCommand::Start { project: id, epoch, config };
            match call.report("starting", command, Duration::from_secs(300), epoch).await {
                Ok(report) => done(ProjectState::from(report.status.state), Some(report)),
                // It has been stopped, and does not keep its state.
                Err(failure) => failure.ended(&Job::Start, project),
            }
        }
        // Driven elsewhere.
        Job::Move { .. }
        | Job::Recover { .. }
        | Job::BackUp
        | Job::ForgetBackups { .. }
        | Job::PruneBackups
        | Job::CheckBackups { .. }
        | Job::EraseBackups
        | Job::DrillBackup => return Err(Failure::NoReceipt),
    })
}

pub(super) fn done(project: ProjectState, report: Option<ProjectReport>) -> Ended {
    let reason = report.as_ref().and_then(|report| report.status.reason.clone());
    Ended { outcome: Outcome::Done, project, reason, report }
}

async fn create(
    call: &Call<'_>,
    project: &Project,
    cancel: &mut watch::Receiver<bool>,
) -> Result<ProjectReport, Failure> {
    call.ensure_image(project.config.image).await?;
    // The host knows who may use it before it exists.
    call.shared.tell_of_project(project.host, project.id).await?;
    let (id, epoch, config) = (project.id, project.epoch, project.config.clone());
    // A start may have to make good a creation that failed.
    let job = if call.operation.job.creates() {
        call.operation.job.clone()
    } else {
        call.shared.db(move |store| store.creation(id)).await?.job
    };
    match job {
        Job::Clone { source, name } => {
            let source = original(call.shared, source, project).await?;
            let command = HostCommand::Clone {
                project: id,
                epoch,
                config,
                source: source.id,
                source_epoch: source.epoch,
                name,
                same_owner: source.owner == project.owner,
            };
            call.report("cloning", command, Duration::from_secs(600), epoch).await
        }
        // To fill it again would throw away what is in it, and nobody knows here
        // whether anything is.
        Job::FromBackup { .. } if !call.operation.job.creates() => {
            let message = "it could not be made from its backup: delete it, and restore the backup again";
            Err(Failure::Refused(CommandError { code: ErrorCode::Invalid, message: message.into() }))
        }
        Job::FromBackup { source, backup } => {
            if !restoring::is_filled(call.operation) {
                let command = HostCommand::Create { project: id, epoch, config };
                call.report("creating", command, Duration::from_secs(120), epoch).await?;
            }
            let from = restoring::From { source, backup: &backup };
            restoring::fill(call, project, from, cancel).await
        }
        _ => {
            let command = HostCommand::Create { project: id, epoch, config };
            call.report("creating", command, Duration::from_secs(120), epoch).await
        }
    }
}

/// The project that something is copied from, if it is on the same host now.
async fn original(shared: &Shared, id: ProjectId, to: &Project) -> Result<Project, Failure> {
    match shared.db(move |store| store.project(id)).await {
        Ok(project) if project.host == to.host => Ok(project),
        Ok(_) => Err(Failure::OtherHost),
        Err(store::Error::NotFound { .. }) => {
            let message = format!("project {id} was deleted meanwhile");
            Err(Failure::Refused(CommandError { code: ErrorCode::NotFound, message }))
        }
        Err(error) => Err(error.into()),
    }
}

/// Has a host fetch an image, if another one has it and this one has not, and
/// shows people how far that is.
pub(super) async fn ensure_image(
    shared: &Shared,
    operation: &Operation,
    host: HostId,
    image: ImageDigest,
) -> Result<(), CommandError> {
    let (told, mut news) = tokio::sync::watch::channel(None);
    let (_never, mut cancel) = tokio::sync::watch::channel(false);
    let mut tell = move |phase: &str, bytes: u64, expected: Option<u64>| {
        told.send_replace(Some((phase.to_owned(), bytes, expected)));
    };
    let fetch = shared.ensure_image(host, image, operation.id, &mut cancel, &mut tell);
    let mut fetch = std::pin::pin!(fetch);
    loop {
        tokio::select! {
            done = &mut fetch => return done,
            Ok(()) = news.changed() => {
                let Some((phase, bytes, expected)) = news.borrow_and_update().clone() else { continue };
                let mut progress = serde_json::json!({ "bytes": bytes });
                if let Some(expected) = expected {
                    progress["bytes_expected"] = expected.into();
                }
                shared.note(operation.id, &format!("image: {phase}"), progress).await;
            }
        }
    }
}

/// Calls of one operation to its host.
pub(super) struct Call<'a> {
    pub(super) shared: &'a Shared,
    pub(super) operation: &'a Operation,
    pub(super) host: HostId,
}

impl Call<'_> {
    /// Has the host fetch the image, if another one has it and this one has not.
    async fn ensure_image(&self, image: Option<ImageDigest>) -> Result<(), Failure> {
        let Some(image) = image else { return Ok(()) };
        ensure_image(self.shared, self.operation, self.host, image).await.map_err(Failure::Refused)
    }

    /// A command whose receipt is the project's state, in that epoch.
    pub(super) async fn report(
        &self,
        phase: &str,
        command: HostCommand,
        limit: Duration,
        epoch: Epoch,
    ) -> Result<ProjectReport, Failure> {
        match self.perform(phase, command, limit).await? {
            HostReply::Project(report)
                if report.project == self.operation.project && report.epoch == Some(epoch) =>
            {
                Ok(report)
            }
            _ => Err(Failure::NoReceipt),
        }
    }

    /// Whether the project has a snapshot of that name: to take it again would
    /// be taken for a repeated command.
    async fn has_snapshot(&self, name: &SnapshotName, project: &Project) -> Result<bool, Failure> {
        let command = HostCommand::Snapshots { project: project.id, epoch: project.epoch };
        match self.perform(CHECKING, command, Duration::from_secs(60)).await? {
            HostReply::Snapshots { project: id, snapshots } if id == project.id => {
                Ok(snapshots.iter().any(|snapshot| snapshot.name == *name))
            }
            _ => Err(Failure::NoReceipt),
        }
    }

    /// A command about a snapshot, which leaves the project's state alone.
    pub(super) async fn keep(
        &self,
        phase: &str,
        command: HostCommand,
        project: &Project,
    ) -> Result<Ended, Failure> {
        match self.perform(phase, command, Duration::from_secs(300)).await? {
            HostReply::Project(ProjectReport { project: id, .. })
            | HostReply::Snapshots { project: id, .. }
            | HostReply::Copied { project: id, .. }
                if id == project.id =>
            {
                Ok(Ended {
                    outcome: Outcome::Done,
                    project: project.state,
                    reason: project.reason.clone(),
                    report: None,
                })
            }
            _ => Err(Failure::NoReceipt),
        }
    }

    /// Sends the command until the host has answered it.
    ///
    /// What was sent may be done at any time, so it has an end only when the
    /// host has answered, however long that takes: an operation that ended
    /// before would still happen. A host that never got the command is given
    /// up after a while, except for a deletion, which is asked for once.
    pub(super) async fn perform(
        &self,
        phase: &str,
        command: HostCommand,
        limit: Duration,
    ) -> Result<HostReply, Failure> {
        self.shared.note(self.operation.id, phase, serde_json::json!({})).await;
        let peer = Peer::Host(self.host);
        let mut registrations = self.shared.peers.registrations();
        let mut sent = if self.operation.phase == QUEUED { Sent::No } else { Sent::Before };
        let mut away_since = None;
        let mut retries = 0;
        loop {
            let session = self.shared.peers.session(peer).filter(|_| self.shared.alive(peer));
            // The process that got it is gone, and all it was doing.
            if let (Sent::To(to), Some(session)) = (sent, session)
                && to != session
            {
                (sent, away_since) = (Sent::No, None);
            }
            // Whatever it has heard, it does for nobody. A deletion stays asked for.
            if self.shared.peers.is_fenced(peer) && self.operation.job != Job::Delete {
                return Err(Failure::Fenced);
            }
            let answer = match session {
                Some(session) => {
                    self.shared.ask_host(self.host, session, &command, limit, Some(REPEAT_AFTER)).await
                }
                None => Err(Unanswered::NotSent),
            };
            match answer {
                Ok(HostReply::Error(error))
                    if matches!(
                        error.code,
                        ErrorCode::Unavailable | ErrorCode::StateUnknown | ErrorCode::Busy
                    ) && retries < BUSY_RETRIES =>
                {
                    away_since = None;
                    retries += 1;
                    tokio::time::sleep(Duration::from_millis(200 << retries)).await;
                    continue;
                }
                Ok(HostReply::Error(error)) => return Err(Failure::Refused(error)),
                Ok(reply) => return Ok(reply),
                Err(Unanswered::Lost) => sent = session.map_or(sent, Sent::To),
                Err(Unanswered::NotSent) => {}
            }
            let since = *away_since.get_or_insert_with(|| self.shared.clock.boot());
            let away = self.shared.clock.boot().saturating_sub(since);
            if sent == Sent::No && away >= AWAY_MAX && self.operation.job != Job::Delete {
                return Err(Failure::NoAnswer);
            }
            // A moment even after a registration: the host's inbox may not be
            // in place yet.
            let again = registrations.changed();
            let _ = tokio::time::timeout(Duration::from_millis(500), again).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Whether a host may have got a command that it has not answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Sent {
    No,
    /// This process of it may.
    To(SessionId),
    /// An earlier process of the master may have sent it.
    Before,
}
