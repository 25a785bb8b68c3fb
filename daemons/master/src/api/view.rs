//! Rows as the API shows them.

use cocalc_core::router::HostAddress;
use cocalc_ids::Timestamp;
use cocalc_sqlite::master::{Account, Host, Operation, Project};
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
    /// `creating stopped starting running stopping moving failed deleted`
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
    /// `connected`, `withdrawn`, or `away` when its lease has run out, or it
    /// never came.
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
}

impl HostView {
    pub(crate) fn new(host: Host, connected: bool, projects: u64, admin: bool) -> Self {
        Self {
            id: host.id.to_string(),
            name: host.name.to_string(),
            state: match (host.withdrawn, connected) {
                (Some(_), _) => "withdrawn",
                (None, true) => "connected",
                (None, false) => "away",
            },
            cordoned: host.cordoned,
            address: host.address.into(),
            ssh_host_keys: host.ssh_host_keys,
            capabilities: host.capabilities.filter(|_| admin).and_then(|can| serde_json::to_value(can).ok()),
            last_seen: host.last_seen.map(time),
            projects,
        }
    }
}

/// An operation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OperationView {
    id: String,
    kind: &'static str,
    /// The project that it is about; none if it is about an image.
    project_id: Option<String>,
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
    /// Whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.state != "running"
    }
}

impl From<ImageJob> for OperationView {
    fn from(job: ImageJob) -> Self {
        let millis = job.updated.since(job.created).as_millis();
        Self {
            id: job.id.to_string(),
            kind: job.kind,
            project_id: None,
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

/// Work that was begun.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Begun {
    pub(crate) operation_id: String,
    /// The project, as it is now.
    pub(crate) project: ProjectView,
}
