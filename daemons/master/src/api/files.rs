//! A project's files, as storage sees them: what is different, copies, clones,
//! what they take, and how their snapshots are kept.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use cocalc_core::{
    control::{CommandError, ErrorCode, HostCommand, HostReply, ProjectConfig, UsageReport},
    snapshots::{Policy, PolicyFields},
    storage::{Change, Changes, Place},
};
use cocalc_ids::{Action, OperationId, ProjectId, Scope, SnapshotName, TreePath};
use cocalc_sqlite::master::{Job, Project};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id, Ids, clean_name},
    problem::{Answer, Problem},
    project_limits,
    projects::{Nothing, SETTLED, begin},
    view::Begun,
};
use crate::{operations, shared::Shared};

/// How long a host may take over a question. Clients wait a little longer.
const LIMIT: Duration = Duration::from_secs(25);
/// The most changes in one answer, and how many if nobody says.
const CHANGES_MAX: usize = 2_000;
const CHANGES: usize = 500;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(diff))
        .routes(routes!(copy))
        .routes(routes!(clone))
        .routes(routes!(usage))
        .routes(routes!(policy, set_policy, reset_policy))
}

/// Asks the project's host.
pub(super) async fn ask(shared: &Shared, project: &Project, command: &HostCommand) -> Answer<HostReply> {
    match shared.command(project.host, command, LIMIT).await {
        Ok(HostReply::Error(error)) => Err(refused(error)),
        Ok(reply) => Ok(reply),
        Err(_) => Err(Problem::unavailable(
            "host_unavailable",
            "the project's host does not answer, or not in time",
        )),
    }
}

fn refused(error: CommandError) -> Problem {
    let code = operations::code(error.code);
    match error.code {
        ErrorCode::NotFound => Problem::new(StatusCode::NOT_FOUND, code, error.message),
        ErrorCode::Invalid => Problem::invalid(error.message),
        ErrorCode::Unavailable | ErrorCode::StateUnknown | ErrorCode::Failed => {
            Problem::unavailable(code, error.message)
        }
        _ => Problem::conflict(code, error.message),
    }
}

pub(super) fn nonsense() -> Problem {
    Problem::unavailable("host_failed", "the host's answer makes no sense")
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Compared {
    /// To this snapshot; default: to what is there now.
    to: Option<String>,
    /// The path after which to go on: the last one of the answer before.
    after: Option<String>,
    /// At most so many; 1 to 2000, default 500. There may be fewer.
    limit: Option<usize>,
}

#[derive(Serialize, ToSchema)]
struct ChangeView {
    /// Below the project's volume, for instance `home/notes.txt`. A byte that is
    /// no text is `%XX`. A directory that was added or removed stands for all
    /// that is in it.
    path: String,
    /// `added`, `removed`, `modified`, or `metadata`: only owner, mode, times or
    /// attributes.
    #[schema(value_type = String)]
    kind: Value,
    /// `file`, `directory`, `symlink` or `special`.
    #[schema(value_type = String)]
    node: Value,
    /// The size of a file.
    bytes: u64,
}

impl From<Change> for ChangeView {
    fn from(change: Change) -> Self {
        let text = |value: Result<Value, serde_json::Error>| value.unwrap_or_default();
        Self {
            path: change.path.to_string(),
            kind: text(serde_json::to_value(change.kind)),
            node: text(serde_json::to_value(change.node)),
            bytes: change.bytes,
        }
    }
}

#[derive(Serialize, ToSchema)]
pub(super) struct ChangesView {
    /// In the order of their paths.
    changes: Vec<ChangeView>,
    /// The path after which to ask on; null at the end.
    next: Option<String>,
}

impl From<Changes> for ChangesView {
    fn from(changes: Changes) -> Self {
        let last = changes.changes.last().map(|change| change.path.to_string());
        let next = last.filter(|_| changes.more);
        Self { changes: changes.changes.into_iter().map(Into::into).collect(), next }
    }
}

/// Says what is different from a snapshot.
#[utoipa::path(get, path = "/projects/{id}/snapshots/{name}/diff", tag = "snapshots",
    params(("id" = String, Path), ("name" = String, Path), Compared),
    responses((status = 200, body = ChangesView), (status = "default", body = Problem)))]
async fn diff(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, from): Ids<ProjectId, SnapshotName>,
    Asked(compared): Asked<Compared>,
) -> Answer<Json<ChangesView>> {
    let project = caller.project(&shared, id, Some(Action::Use(Scope::Files))).await?;
    let to =
        compared.to.map(|name| name.parse().map_err(|e| Problem::invalid(format!("to: {e}")))).transpose()?;
    let after = compared
        .after
        .map(|path| path.parse().map_err(|e| Problem::invalid(format!("after: {e}"))))
        .transpose()?;
    let max = compared.limit.unwrap_or(CHANGES).clamp(1, CHANGES_MAX);
    let command = HostCommand::Diff { project: id, epoch: project.epoch, from, to, after, max };
    match ask(&shared, &project, &command).await? {
        HostReply::Changes { project, changes } if project == id => Ok(Json(changes.into())),
        _ => Err(nonsense()),
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CopyFrom {
    /// The project that is copied from; may be the same.
    #[schema(value_type = String)]
    from_project: ProjectId,
    /// From this snapshot of it; default: from what is there now.
    #[schema(value_type = Option<String>)]
    from_snapshot: Option<SnapshotName>,
    /// What is copied, with all that is below it, for instance `home/data`.
    #[schema(value_type = String)]
    from_path: TreePath,
    /// To where: the new path itself, in a directory that exists.
    #[schema(value_type = String)]
    to_path: TreePath,
    /// Whether what is there is replaced; otherwise it is `already_exists`.
    #[serde(default)]
    replace: bool,
}

/// Copies a file or directory into this project, from another one on the same
/// host or from itself. Takes the right to read there, and to write here.
#[utoipa::path(post, path = "/projects/{id}/copy", tag = "projects", params(("id" = String, Path)),
    request_body = CopyFrom,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn copy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(body): Body<CopyFrom>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let to = caller.project(&shared, id, Some(Action::Operate)).await?;
    let from = caller.project(&shared, body.from_project, Some(Action::Use(Scope::Files))).await?;
    if body.to_path.is_root() || body.from_path.is_root() {
        return Err(Problem::invalid(
            "from_path, to_path: not the root itself; a project is cloned, not copied",
        ));
    }
    if from.host != to.host {
        return Err(Problem::conflict("other_host", operations::OTHER_HOST));
    }
    let from = Place { project: from.id, snapshot: body.from_snapshot, path: body.from_path };
    begin(&shared, &caller, id, Job::Copy { from, to: body.to_path, replace: body.replace }, &SETTLED).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CloneOf {
    /// The new project's name; default: that of the other.
    name: Option<String>,
    /// Of this snapshot; default: of its present state.
    #[schema(value_type = Option<String>)]
    snapshot: Option<SnapshotName>,
}

/// Makes a new project of the caller that is a copy of this one, on its host.
/// At once, if both have one owner.
#[utoipa::path(post, path = "/projects/{id}/clone", tag = "projects", params(("id" = String, Path)),
    request_body = CloneOf,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn clone(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(source): Id<ProjectId>,
    Body(body): Body<CloneOf>,
) -> Answer<(StatusCode, Json<Begun>)> {
    // Whoever may work in it sees all of it, the system's files, too.
    let original = caller.project(&shared, source, Some(Action::Operate)).await?;
    let name = body.name.unwrap_or(original.name);
    let name = clean_name(&name)?;
    if !original.made {
        return Err(Problem::conflict(
            "wrong_state",
            "the project was never made, so there is nothing to clone",
        ));
    }
    let id = ProjectId::from_random_bytes(caller.new_id("project"));
    let operation = OperationId::from_random_bytes(caller.new_id("clone"));
    let job = Job::Clone { source, name: body.snapshot };
    let config = project_limits::of_copy(&shared, &caller, original.config);
    let project = shared.create_project(id, operation, name, caller.id, config, original.host, job).await?;
    Ok((StatusCode::ACCEPTED, Json(Begun { operation_id: operation.to_string(), project: project.into() })))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Counted {
    /// Count the files, too. That reads all of them.
    #[serde(default)]
    du: bool,
}

/// What a project is charged, and may be.
#[derive(Serialize, ToSchema)]
struct UsageView {
    /// What files and snapshots together are charged. After a deletion it falls
    /// when the file system has tidied up, within a minute.
    charged_bytes: u64,
    /// The limit of that; null without one.
    limit_bytes: Option<u64>,
    /// How many bytes the files may take; null without a limit.
    plan_bytes: Option<u64>,
    /// How many the snapshots may take beyond that.
    allowance_bytes: Option<u64>,
    /// `quota`, or `walk` where there are no quotas: then without snapshots.
    #[schema(value_type = String)]
    source: Value,
    /// What the owner should know, in words: that it is nearly full, or that no
    /// snapshot can be taken.
    notice: Option<String>,
    /// The files, counted: `entries`, `total_bytes`, and of these
    /// `exclusive_bytes`, which nothing else has, and `shared_bytes`.
    #[schema(value_type = Option<Object>)]
    du: Option<Value>,
}

impl From<UsageReport> for UsageView {
    fn from(report: UsageReport) -> Self {
        Self {
            charged_bytes: report.usage.charged_bytes,
            limit_bytes: report.usage.limit_bytes,
            plan_bytes: report.plan_bytes,
            allowance_bytes: report.allowance_bytes,
            source: serde_json::to_value(report.usage.source).unwrap_or_default(),
            notice: report.notice,
            du: report.footprint.map(|counted| {
                serde_json::json!({
                    "entries": counted.entries,
                    "total_bytes": counted.total_bytes,
                    "exclusive_bytes": counted.exclusive_bytes,
                    "shared_bytes": counted.shared_bytes(),
                })
            }),
        }
    }
}

async fn report(shared: &Shared, project: &Project, count: bool) -> Answer<UsageReport> {
    let command = HostCommand::Usage { project: project.id, epoch: project.epoch, count };
    match ask(shared, project, &command).await? {
        HostReply::Usage(report) if report.project == project.id => Ok(report),
        _ => Err(nonsense()),
    }
}

/// Says what a project is charged, and what it may be.
#[utoipa::path(get, path = "/projects/{id}/usage", tag = "projects", params(("id" = String, Path), Counted),
    responses((status = 200, body = UsageView), (status = "default", body = Problem)))]
async fn usage(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Asked(counted): Asked<Counted>,
) -> Answer<Json<UsageView>> {
    let project = caller.project(&shared, id, None).await?;
    Ok(Json(report(&shared, &project, counted.du).await?.into()))
}

/// What its host says that the owner should know, if it answers at once.
pub(super) async fn notice(shared: &Shared, project: &Project) -> Option<String> {
    let command = HostCommand::Usage { project: project.id, epoch: project.epoch, count: false };
    match shared.command(project.host, &command, Duration::from_secs(2)).await {
        Ok(HostReply::Usage(report)) if report.project == project.id => report.notice,
        _ => None,
    }
}

/// How a project's automatic snapshots are kept.
#[derive(Serialize, ToSchema)]
struct PolicyView {
    /// `project`, or `host` if that of its host is in force.
    from: &'static str,
    /// Null if it is the host's, and the host does not answer. `enabled`, `interval_secs`, `frequent`, `hourly`, `daily`, `weekly`,
    /// `monthly`, `allowance_percent`.
    #[schema(value_type = Option<Object>)]
    policy: Option<PolicyFields>,
}

/// Shows how a project's automatic snapshots are kept.
#[utoipa::path(get, path = "/projects/{id}/snapshot-policy", tag = "snapshots", params(("id" = String, Path)),
    responses((status = 200, body = PolicyView), (status = "default", body = Problem)))]
async fn policy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<PolicyView>> {
    let project = caller.project(&shared, id, None).await?;
    Ok(Json(match project.config.snapshots {
        Some(policy) => PolicyView { from: "project", policy: Some(policy.into()) },
        None => {
            let of_host = report(&shared, &project, false).await.ok();
            PolicyView { from: "host", policy: of_host.map(|report| report.policy.into()) }
        }
    }))
}

/// Says how a project's automatic snapshots are to be kept: any of `enabled`,
/// `interval_secs` (60 to 86400), how many are kept `frequent` (of the last
/// intervals), `hourly`, `daily`, `weekly` and `monthly`, and
/// `allowance_percent`, what they may take beyond the plan. What is not said is
/// the default.
#[utoipa::path(put, path = "/projects/{id}/snapshot-policy", tag = "snapshots", params(("id" = String, Path)),
    request_body(content = Object),
    responses((status = 200, body = PolicyView), (status = "default", body = Problem)))]
async fn set_policy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(policy): Body<Policy>,
) -> Answer<Json<PolicyView>> {
    let before = caller.project(&shared, id, Some(Action::Administer)).await?;
    let allowance = policy.fields().allowance_percent;
    let allowed = before.config.snapshots.unwrap_or_default().fields().allowance_percent;
    // Space beyond the plan is the operator's to give.
    if allowance > allowed.max(Policy::default().fields().allowance_percent) {
        caller.require_admin()?;
    }
    configure(&shared, id, move |config| config.snapshots = Some(policy)).await?;
    Ok(Json(PolicyView { from: "project", policy: Some(policy.into()) }))
}

/// Keeps a project's automatic snapshots as its host does.
#[utoipa::path(delete, path = "/projects/{id}/snapshot-policy", tag = "snapshots",
    params(("id" = String, Path)),
    responses((status = 200, body = PolicyView), (status = "default", body = Problem)))]
async fn reset_policy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<PolicyView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    configure(&shared, id, |config| config.snapshots = None).await?;
    Ok(Json(PolicyView { from: "host", policy: None }))
}

/// Changes how a project is made and run, and lets its host know.
pub(super) async fn configure(
    shared: &Shared,
    id: ProjectId,
    change: impl FnOnce(&mut ProjectConfig) + Send + 'static,
) -> Answer<Project> {
    let project = shared.db(move |store| store.configure(id, change)).await?;
    if project.made {
        shared.configure_at_host(id).await;
    }
    Ok(project)
}
