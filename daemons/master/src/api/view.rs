//! Rows as the API shows them.

use cocalc_core::router::HostAddress;
use cocalc_ids::Timestamp;
use cocalc_sqlite::master::{
    Account, Fence, Host, Operation, OperationState, Project, RecoveredProject, Recovery, RecoveryOutcome,
};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::backups::BackupStateView;
use crate::images::ImageJob;

/// A time in RFC 3339.
pub(crate) fn time(at: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(at.millis()).map_or_else(|_| at.to_string(), |at| at.to_string())
}

/// An account.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AccountView {
    id: String,
    name: String,
    admin: bool,
    banned: bool,
    session_epoch: u64,
    created: String,
}

impl From<Account> for AccountView {
    fn from(account: Account) -> Self {
        Self {
            id: account.id.to_string(),
            name: account.name,
            admin: account.admin,
            banned: account.banned,
            session_epoch: account.session_epoch,
            created: time(account.created),
        }
    }
}

/// A project.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ProjectView {
    id: String,
    name: String,
    /// `creating stopped starting running stopping moving failed unknown deleted`
    state: String,
    /// Why it is in that state.
    reason: Option<String>,
    /// The host that owns it.
    host_id: String,
    /// In which epoch.
    epoch: u64,
    /// The account that owns it.
    owner: String,
    /// The image it runs; none: its host's default.
    image: Option<String>,
    /// Under what name SSH reaches it, besides its id.
    alias: Option<String>,
    /// The exclusive operation that is under way.
    operation_id: Option<String>,
    created: String,
    /// When it was last started.
    started: Option<String>,
    /// Milliseconds of each phase of the last start.
    phases: Vec<(String, u64)>,
    /// How it stands with its backups; null if its host has not said it.
    backup: Option<BackupStateView>,
}

impl From<Project> for ProjectView {
    fn from(project: Project) -> Self {
        Self {
            id: project.id.to_string(),
            name: project.name,
            state: project.state.to_string(),
            reason: project.reason,
            host_id: project.host.to_string(),
            epoch: project.epoch.number(),
            owner: project.owner.to_string(),
            image: project.config.image.map(|image| image.to_string()),
            alias: project.config.alias.map(|alias| alias.to_string()),
            operation_id: project.fence.map(|id| id.to_string()),
            created: time(project.created),
            started: project.started.map(time),
            phases: project.phases,
            backup: project.backup.map(Into::into),
        }
    }
}

/// Where a host or proxy listens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AddressView {
    url: String,
    domain: String,
    ssh: String,
    peer: String,
    identity: String,
}

impl From<HostAddress> for AddressView {
    fn from(address: HostAddress) -> Self {
        Self {
            url: address.url,
            domain: address.domain,
            ssh: address.ssh,
            peer: address.peer,
            identity: address.identity,
        }
    }
}

/// A host.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HostView {
    id: String,
    name: String,
    /// `connected`, `withdrawn`, `fenced`, or `away` when its lease has run out,
    /// or it never came.
    state: &'static str,
    cordoned: bool,
    address: AddressView,
    ssh_host_keys: Vec<String>,
    /// What it can do. Administrators only.
    #[schema(value_type = Option<Object>)]
    capabilities: Option<Value>,
    /// When it last registered.
    last_seen: Option<String>,
    /// How many projects it owns.
    projects: u64,
    /// Who has said that it is dead. Administrators only.
    fence: Option<FenceView>,
}

impl HostView {
    pub(crate) fn new(host: Host, connected: bool, projects: u64, admin: bool) -> Self {
        Self {
            id: host.id.to_string(),
            name: host.name.to_string(),
            state: match (host.withdrawn, &host.fenced, connected) {
                (Some(_), ..) => "withdrawn",
                (None, Some(_), _) => "fenced",
                (None, None, true) => "connected",
                (None, None, false) => "away",
            },
            cordoned: host.cordoned,
            address: host.address.into(),
            ssh_host_keys: host.ssh_host_keys,
            capabilities: host.capabilities.filter(|_| admin).and_then(|can| serde_json::to_value(can).ok()),
            last_seen: host.last_seen.map(time),
            projects,
            fence: host.fenced.filter(|_| admin).map(Into::into),
        }
    }
}

/// Somebody's word that a host is dead.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FenceView {
    since: String,
    /// The account whose word it is.
    by: String,
    reason: String,
    /// When the host had been heard of last.
    last_heard: Option<String>,
}

impl From<Fence> for FenceView {
    fn from(fence: Fence) -> Self {
        Self {
            since: time(fence.at),
            by: fence.by.to_string(),
            reason: fence.reason,
            last_heard: fence.heard.map(time),
        }
    }
}

/// An operation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OperationView {
    id: String,
    kind: &'static str,
    /// The project that it is about; of `restore_all` and of work on images, none.
    project_id: Option<String>,
    /// The host that it is about, of `restore_all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_id: Option<String>,
    /// `running`, `done`, `failed` or `cancelled`.
    state: &'static str,
    /// What is being done, for people.
    phase: String,
    /// Bytes, rate and estimate, where they make sense.
    #[schema(value_type = Object)]
    progress: Value,
    /// Why it failed: `code` and `detail`.
    #[schema(value_type = Option<Object>)]
    error: Option<Value>,
    /// Whether somebody asked to cancel it.
    cancelling: bool,
    created: String,
    updated: String,
    /// How long it has taken, in milliseconds.
    millis: u64,
}

impl From<Operation> for OperationView {
    fn from(operation: Operation) -> Self {
        let millis = operation.updated.since(operation.created).as_millis();
        Self {
            id: operation.id.to_string(),
            kind: operation.job.kind(),
            project_id: Some(operation.project.to_string()),
            host_id: None,
            state: operation.state.as_str(),
            phase: operation.phase,
            progress: operation.progress,
            error: operation.error,
            cancelling: operation.cancel,
            created: time(operation.created),
            updated: time(operation.updated),
            millis: u64::try_from(millis).unwrap_or(u64::MAX),
        }
    }
}

impl OperationView {
    /// A recovery as an operation: its progress has the counts, and what became
    /// of each project.
    pub(crate) fn of_recovery(recovery: &Recovery, projects: &[RecoveredProject]) -> Self {
        let (phase, progress) = recovery_progress(projects);
        let millis = recovery.updated.since(recovery.created).as_millis();
        let error = (recovery.state == OperationState::Failed).then(|| {
            let detail = format!(
                "{} of {} projects are up again, {} have no backup, {} failed: look at progress.projects",
                progress["restored"], progress["total"], progress["no_backup"], progress["failed"]
            );
            serde_json::json!({ "code": "not_all_restored", "detail": detail })
        });
        Self {
            id: recovery.id.to_string(),
            kind: "restore_all",
            project_id: None,
            host_id: Some(recovery.host.to_string()),
            state: recovery.state.as_str(),
            phase,
            progress,
            error,
            cancelling: recovery.cancel,
            created: time(recovery.created),
            updated: time(recovery.updated),
            millis: u64::try_from(millis).unwrap_or(u64::MAX),
        }
    }
}

impl From<ImageJob> for OperationView {
    fn from(job: ImageJob) -> Self {
        let millis = job.updated.since(job.created).as_millis();
        Self {
            id: job.id.to_string(),
            kind: job.kind,
            project_id: None,
            host_id: None,
            state: job.state,
            phase: job.phase,
            progress: job.progress,
            error: job.error,
            cancelling: job.cancelling,
            created: time(job.created),
            updated: time(job.updated),
            millis: u64::try_from(millis).unwrap_or(u64::MAX),
        }
    }
}

/// How far a recovery is: for people, and the counts with what became of each
/// project.
pub(crate) fn recovery_progress(projects: &[RecoveredProject]) -> (String, Value) {
    use RecoveryOutcome::{Failed, NoBackup, Passed, Restored, Restoring, Waiting};
    let count = |outcome| projects.iter().filter(|one| one.outcome == outcome).count();
    let list: Vec<Value> = projects
        .iter()
        .map(|one| {
            let mut shown = one.details.clone();
            shown["project_id"] = one.project.to_string().into();
            shown["outcome"] = one.outcome.as_str().into();
            shown["operation_id"] = one.operation.map(|id| id.to_string()).into();
            shown
        })
        .collect();
    let done = projects.len() - count(Waiting) - count(Restoring);
    let progress = serde_json::json!({
        "total": projects.len(), "restored": count(Restored), "no_backup": count(NoBackup),
        "failed": count(Failed), "passed": count(Passed), "restoring": count(Restoring),
        "waiting": count(Waiting), "projects": list,
    });
    (format!("{done} of {} projects", projects.len()), progress)
}

/// Work that was begun.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Begun {
    pub(crate) operation_id: String,
    /// The project, as it is now.
    pub(crate) project: ProjectView,
}
