//! Backups of a project.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_core::{
    backups::{Answer as Answered, Backup, Entries, Entry, Policy, PolicyFields, Query, Status},
    control::{CommandError, ErrorCode},
};
use cocalc_ids::{Action, OperationId, ProjectId, Scope, TreePath};
use cocalc_sqlite::master::{BackupRepository, Job, Project};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    files::{ChangesView, configure},
    hosts,
    input::{Asked, Body, Id, Ids},
    problem::{Answer, Problem},
    projects::Nothing,
    view::{Begun, time},
};
use crate::{backups::Backups, operations, shared::Shared};

/// The most entries in one answer, and how many if nobody says.
const ENTRIES_MAX: usize = 2_000;
const ENTRIES: usize = 500;
/// What the name of a backup has at most.
const ID_CHARS_MAX: usize = 100;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(policy, set_policy, reset_policy))
        .routes(routes!(prune))
        .routes(routes!(check))
        .routes(routes!(erase))
        .routes(routes!(escrow))
        .routes(routes!(forget))
        .routes(routes!(ls))
        .routes(routes!(find))
        .routes(routes!(diff))
        .routes(routes!(overview))
        .routes(routes!(drill))
        .routes(routes!(rotate))
}

/// The federation's backups.
fn backups(shared: &Shared) -> Answer<&Backups> {
    shared.backups.as_ref().ok_or_else(|| {
        Problem::conflict("no_backups", "this federation has no backups: the master's [backups] is not set")
    })
}

/// The federation's backups, without which an answer makes no sense.
fn refused(error: CommandError) -> Problem {
    let code = operations::code(error.code);
    match error.code {
        ErrorCode::NotFound => Problem::new(StatusCode::NOT_FOUND, code, error.message),
        ErrorCode::Invalid => Problem::invalid(error.message),
        // Whoever asked a question waited for others in vain.
        ErrorCode::Busy
        | ErrorCode::RepositoryUnavailable
        | ErrorCode::RepositoryDenied
        | ErrorCode::Unavailable
        | ErrorCode::Failed => Problem::unavailable(code, error.message),
        _ => Problem::conflict(code, error.message),
    }
}

/// Begins `job` beside whatever else is done to the project.
async fn begin(
    shared: &Arc<Shared>,
    caller: &Caller,
    project: Project,
    job: Job,
) -> Answer<(StatusCode, Json<Begun>)> {
    backups(shared)?;
    let id = OperationId::from_random_bytes(caller.new_id(job.kind()));
    let operation = shared.begin_beside(id, project.id, caller.id, job).await?;
    Ok((
        StatusCode::ACCEPTED,
        Json(Begun { operation_id: operation.id.to_string(), project: project.into() }),
    ))
}

/// Backs up a project's present state. It goes on beside whatever else is done
/// to the project, and can be cancelled.
#[utoipa::path(post, path = "/projects/{id}/backups", tag = "backups", params(("id" = String, Path)),
    request_body = Nothing,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn create(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let project = caller.project(&shared, id, Some(Action::Operate)).await?;
    if !project.made {
        return Err(Problem::conflict(
            "wrong_state",
            "the project was never made, so there is nothing to back up",
        ));
    }
    begin(&shared, &caller, project, Job::BackUp).await
}

/// A backup.
#[derive(Serialize, ToSchema)]
struct BackupView {
    id: String,
    /// When its snapshot was taken.
    taken: String,
    /// `scheduled`, `manual`, or `stop`.
    #[schema(value_type = String)]
    kind: Value,
    /// The host that made it.
    host_id: String,
    /// In which epoch.
    epoch: u64,
    /// The sizes of all that is in it.
    bytes: u64,
    /// How many bytes it added to the repository.
    added_bytes: u64,
    /// How many files, links and others are in it.
    files: u64,
}

impl From<Backup> for BackupView {
    fn from(backup: Backup) -> Self {
        Self {
            id: backup.id,
            taken: time(backup.taken),
            kind: serde_json::to_value(backup.kind).unwrap_or_default(),
            host_id: backup.host.to_string(),
            epoch: backup.epoch.number(),
            bytes: backup.bytes,
            added_bytes: backup.added_bytes,
            files: backup.files,
        }
    }
}

/// How a project stands with its backups.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BackupStateView {
    /// Whether there is something that no backup has.
    pending: bool,
    /// Since when that is known.
    pending_since: Option<String>,
    /// When the snapshot of the last backup was taken that its host made.
    last_taken: Option<String>,
    /// That backup.
    last_id: Option<String>,
    /// Why the last tries failed, in words.
    failure: Option<String>,
}

impl From<Status> for BackupStateView {
    fn from(status: Status) -> Self {
        Self {
            pending: status.pending_since.is_some(),
            pending_since: status.pending_since.map(time),
            last_taken: status.last.as_ref().map(|last| time(last.backup.taken)),
            failure: status.notice(),
            last_id: status.last.map(|last| last.backup.id),
        }
    }
}

#[derive(Serialize, ToSchema)]
struct BackupsView {
    /// Oldest snapshot first.
    backups: Vec<BackupView>,
    /// Whether older ones are left out, because they are too many.
    truncated: bool,
    /// Who looked: `host`, or `master` if the host is not there.
    from: &'static str,
    /// How it stands; null if its host has not said it.
    state: Option<BackupStateView>,
    /// What the last check found to be damaged.
    damage: Vec<String>,
}

/// Lists the backups of a project, from its repository.
#[utoipa::path(get, path = "/projects/{id}/backups", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = BackupsView), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<BackupsView>> {
    let project = caller.project(&shared, id, Some(Action::Use(Scope::Files))).await?;
    backups(&shared)?;
    let known = shared.db(move |store| store.backup_repository(id)).await?.map(|(row, _)| row);
    let (answer, host) = shared.ask_backups(&project, Query::List).await.map_err(refused)?;
    let Answered::Backups { backups, truncated } = answer else { return Err(nonsense()) };
    Ok(Json(BackupsView {
        backups: backups.into_iter().map(Into::into).collect(),
        truncated,
        from: if host.is_some() { "host" } else { "master" },
        state: project.backup.map(Into::into),
        damage: known.and_then(|row| row.damage).unwrap_or_default(),
    }))
}

/// The name of a project's newest backup, or `id` if there is one of that name.
pub(super) async fn named(shared: &Shared, project: &Project, id: Option<String>) -> Answer<String> {
    backups(shared)?;
    let (answer, _) = shared.ask_backups(project, Query::List).await.map_err(refused)?;
    let Answered::Backups { backups, truncated } = answer else { return Err(nonsense()) };
    let found = match id {
        // One of those that are left out is looked for by whoever restores it.
        Some(id) => Some(id).filter(|id| truncated || backups.iter().any(|backup| backup.id == *id)),
        None => backups.into_iter().max_by(Backup::order).map(|last| last.id),
    };
    found.ok_or_else(|| Problem::not_found("backup"))
}

fn nonsense() -> Problem {
    Problem::unavailable("host_failed", "the host's answer makes no sense")
}

/// The name of a backup as it may be asked for.
pub(super) fn checked(backup: String) -> Answer<String> {
    let plain = backup.chars().all(|c| c.is_ascii_alphanumeric());
    if plain && (8..=ID_CHARS_MAX).contains(&backup.len()) {
        Ok(backup)
    } else {
        Err(Problem::not_found("backup"))
    }
}

#[derive(Serialize, ToSchema)]
struct EntryView {
    /// Below the project's volume, for instance `home/notes.txt`. A byte that is
    /// no text is `%XX`.
    path: String,
    /// `file`, `directory`, `symlink` or `special`.
    #[schema(value_type = String)]
    kind: Value,
    /// The size of a file.
    bytes: u64,
    /// When it was last modified.
    modified: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct EntriesView {
    /// In the order of the tree.
    entries: Vec<EntryView>,
    /// Whether there are more: of `ls`, ask on after the last one.
    truncated: bool,
}

impl From<Entries> for EntriesView {
    fn from(entries: Entries) -> Self {
        let view = |entry: Entry| EntryView {
            path: entry.path.to_string(),
            kind: serde_json::to_value(entry.kind).unwrap_or_default(),
            bytes: entry.bytes,
            modified: entry.modified.map(time),
        };
        Self { entries: entries.entries.into_iter().map(view).collect(), truncated: entries.truncated }
    }
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Directory {
    /// Which directory, for instance `home`. Default: the root.
    path: Option<String>,
    /// The path after which to go on.
    after: Option<String>,
    /// At most so many; 1 to 2000, default 500. There may be fewer.
    limit: Option<usize>,
}

fn path(key: &str, text: Option<String>) -> Answer<Option<TreePath>> {
    text.map(|path| path.parse().map_err(|error| Problem::invalid(format!("{key}: {error}")))).transpose()
}

/// Shows what is in a directory of a backup.
#[utoipa::path(get, path = "/projects/{id}/backups/{backup}/ls", tag = "backups",
    params(("id" = String, Path), ("backup" = String, Path), Directory),
    responses((status = 200, body = EntriesView), (status = "default", body = Problem)))]
async fn ls(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, backup): Ids<ProjectId, String>,
    Asked(asked): Asked<Directory>,
) -> Answer<Json<EntriesView>> {
    let project = caller.project(&shared, id, Some(Action::Use(Scope::Files))).await?;
    backups(&shared)?;
    let query = Query::Ls {
        backup: checked(backup)?,
        directory: path("path", asked.path)?.unwrap_or_else(TreePath::root),
        after: path("after", asked.after)?,
        max: asked.limit.unwrap_or(ENTRIES).clamp(1, ENTRIES_MAX),
    };
    entries(&shared, &project, query).await
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Sought {
    /// A part of the name, in either case.
    text: String,
    /// At most so many; 1 to 2000, default 500. There may be fewer.
    limit: Option<usize>,
}

/// Finds what in a backup has a name that contains a text.
#[utoipa::path(get, path = "/projects/{id}/backups/{backup}/find", tag = "backups",
    params(("id" = String, Path), ("backup" = String, Path), Sought),
    responses((status = 200, body = EntriesView), (status = "default", body = Problem)))]
async fn find(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, backup): Ids<ProjectId, String>,
    Asked(sought): Asked<Sought>,
) -> Answer<Json<EntriesView>> {
    let project = caller.project(&shared, id, Some(Action::Use(Scope::Files))).await?;
    backups(&shared)?;
    if sought.text.is_empty() || sought.text.len() > 255 {
        return Err(Problem::invalid("text: 1 to 255 bytes"));
    }
    let max = sought.limit.unwrap_or(ENTRIES).clamp(1, ENTRIES_MAX);
    entries(&shared, &project, Query::Find { backup: checked(backup)?, text: sought.text, max }).await
}

async fn entries(shared: &Shared, project: &Project, query: Query) -> Answer<Json<EntriesView>> {
    match shared.ask_backups(project, query).await.map_err(refused)?.0 {
        Answered::Entries(entries) => Ok(Json(entries.into())),
        Answered::Backups { .. } | Answered::Changes(_) => Err(nonsense()),
    }
}

/// Says what is different in a project now from a backup: what was added, what
/// is gone, what has changed since. A file with the same size and time of
/// modification is taken for the same; what backups leave out is left out.
#[utoipa::path(get, path = "/projects/{id}/backups/{backup}/diff", tag = "backups",
    operation_id = "backup_diff",
    params(("id" = String, Path), ("backup" = String, Path), Directory),
    responses((status = 200, body = ChangesView), (status = "default", body = Problem)))]
async fn diff(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, backup): Ids<ProjectId, String>,
    Asked(asked): Asked<Directory>,
) -> Answer<Json<ChangesView>> {
    let project = caller.project(&shared, id, Some(Action::Use(Scope::Files))).await?;
    backups(&shared)?;
    let query = Query::Diff {
        backup: checked(backup)?,
        directory: path("path", asked.path)?.unwrap_or_else(TreePath::root),
        after: path("after", asked.after)?,
        max: asked.limit.unwrap_or(ENTRIES).clamp(1, ENTRIES_MAX),
    };
    match shared.ask_backups(&project, query).await.map_err(refused)?.0 {
        Answered::Changes(changes) => Ok(Json(changes.into())),
        _ => Err(nonsense()),
    }
}

/// Takes a backup off the list. Its space returns when the repository is tidied
/// up, after the time that a backup under way may count on it.
#[utoipa::path(delete, path = "/projects/{id}/backups/{backup}", tag = "backups",
    params(("id" = String, Path), ("backup" = String, Path)),
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn forget(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, backup): Ids<ProjectId, String>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let project = caller.project(&shared, id, Some(Action::Administer)).await?;
    begin(&shared, &caller, project, Job::ForgetBackups { backups: vec![checked(backup)?] }).await
}

/// Forgets what the policy does not keep, and deletes what no backup has needed
/// for long enough.
#[utoipa::path(post, path = "/projects/{id}/backups/prune", tag = "backups", params(("id" = String, Path)),
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn prune(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let project = caller.project(&shared, id, Some(Action::Administer)).await?;
    begin(&shared, &caller, project, Job::PruneBackups).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Check {
    /// Read and verify all data, not only what leads to it.
    #[serde(default)]
    read_data: bool,
}

/// Looks for damage in the repository of a project.
#[utoipa::path(post, path = "/projects/{id}/backups/check", tag = "backups", params(("id" = String, Path)),
    request_body = Check,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn check(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(check): Body<Check>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let project = caller.project(&shared, id, Some(Action::Administer)).await?;
    begin(&shared, &caller, project, Job::CheckBackups { read_data: check.read_data }).await
}

/// Deletes all backups of a project, and the key of its repository, at once.
/// Administrators. The result of the operation says what was deleted.
#[utoipa::path(post, path = "/projects/{id}/backups/erase", tag = "backups", params(("id" = String, Path)),
    responses((status = 202, body = ErasureBegun), (status = "default", body = Problem)))]
async fn erase(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<(StatusCode, Json<ErasureBegun>)> {
    caller.require_admin()?;
    backups(&shared)?;
    // Also of a project that is deleted.
    let operation = OperationId::from_random_bytes(caller.new_id("erase_backups"));
    let operation = shared.begin_beside(operation, id, caller.id, Job::EraseBackups).await?;
    Ok((StatusCode::ACCEPTED, Json(ErasureBegun { operation_id: operation.id.to_string() })))
}

#[derive(Serialize, ToSchema)]
struct ErasureBegun {
    operation_id: String,
}

#[derive(Serialize, ToSchema)]
struct Escrow {
    /// A file for a shell, with which stock restic or rustic restores the
    /// project. Keep it secret.
    file: String,
}

/// Shows what restores a project's backups without this federation, with stock
/// restic or rustic. Administrators; every time it is told, that is a line of
/// the audit log.
#[utoipa::path(get, path = "/projects/{id}/backups/escrow", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = Escrow), (status = "default", body = Problem)))]
async fn escrow(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<Escrow>> {
    caller.require_admin()?;
    let escrow = backups(&shared)?.escrow(id).await.map_err(|error| Problem::internal(&*error))?;
    let escrow = escrow.ok_or_else(|| Problem::not_found("repository"))?;
    caller.reveals("backup.escrow", id);
    Ok(Json(Escrow { file: escrow.expose().to_owned() }))
}

/// When a project is backed up, and which backups are kept.
#[derive(Serialize, ToSchema)]
struct PolicyView {
    /// `project`, or `master` if that of the federation is in force.
    from: &'static str,
    /// `enabled`, `rpo_secs`, `hourly`, `daily`, `weekly`, `monthly`, `manual`,
    /// `excludes`.
    #[schema(value_type = Object)]
    policy: PolicyFields,
}

fn shown(shared: &Shared, own: Option<Policy>) -> Answer<Json<PolicyView>> {
    let from = if own.is_some() { "project" } else { "master" };
    let policy = match own {
        Some(policy) => policy,
        None => backups(shared)?.policy(),
    };
    Ok(Json(PolicyView { from, policy: policy.into() }))
}

/// Shows when a project is backed up, and which backups are kept.
#[utoipa::path(get, path = "/projects/{id}/backups/policy", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = PolicyView), (status = "default", body = Problem)))]
async fn policy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<PolicyView>> {
    shown(&shared, caller.project(&shared, id, None).await?.config.backups)
}

/// Says when a project is to be backed up, and which backups are kept: any of
/// `enabled`, `rpo_secs` (how long after a change at the latest, 300 to
/// 604800), how many are kept `hourly`, `daily`, `weekly`, `monthly` and, of
/// those that people asked for, `manual`; and `excludes`, patterns as in
/// `.gitignore` of what is left out. What is not said is the default.
#[utoipa::path(put, path = "/projects/{id}/backups/policy", tag = "backups", params(("id" = String, Path)),
    request_body(content = Object),
    responses((status = 200, body = PolicyView), (status = "default", body = Problem)))]
async fn set_policy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(policy): Body<Policy>,
) -> Answer<Json<PolicyView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    backups(&shared)?;
    let own = policy.clone();
    configure(&shared, id, move |config| config.backups = Some(own)).await?;
    shown(&shared, Some(policy))
}

/// Backs a project up as the master's configuration says.
#[utoipa::path(delete, path = "/projects/{id}/backups/policy", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = PolicyView), (status = "default", body = Problem)))]
async fn reset_policy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<PolicyView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    configure(&shared, id, |config| config.backups = None).await?;
    shown(&shared, None)
}

#[derive(Serialize, ToSchema)]
struct DamagedView {
    project_id: String,
    /// What the last check found.
    damage: Vec<String>,
    /// When that was.
    checked: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct DrillView {
    project_id: String,
    at: String,
    /// How long the restore took.
    millis: u64,
    /// Why it failed; null if it did not.
    failure: Option<String>,
}

/// How the federation stands with its backups.
#[derive(Serialize, ToSchema)]
struct Overview {
    /// Where they are.
    place: String,
    /// How many projects have backups.
    projects: u64,
    /// How many have something that no backup has, as their hosts say.
    pending: u64,
    /// Of how many the last backup failed.
    failing: u64,
    /// Repositories that are damaged, at most 100.
    damaged: Vec<DamagedView>,
    /// How a backup was last tried out since the master began; null if none was.
    last_drill: Option<DrillView>,
}

/// Shows how the federation stands with its backups. Administrators.
#[utoipa::path(get, path = "/backups", tag = "backups",
    responses((status = 200, body = Overview), (status = "default", body = Problem)))]
async fn overview(State(shared): State<Arc<Shared>>, caller: Caller) -> Answer<Json<Overview>> {
    caller.require_admin()?;
    let all = backups(&shared)?;
    let read = shared.db(|store| {
        Ok((
            store.count_backup_repositories()?.0,
            store.count_pending_backups()?,
            store.damaged_backups(100)?,
        ))
    });
    let (projects, (pending, failing), damaged) = read.await?;
    let view = |row: BackupRepository| DamagedView {
        project_id: row.project.to_string(),
        damage: row.damage.unwrap_or_default(),
        checked: row.checked.map(time),
    };
    Ok(Json(Overview {
        place: all.shown(),
        projects,
        pending,
        failing,
        damaged: damaged.into_iter().map(view).collect(),
        last_drill: all.tended.last_drill().map(|last| DrillView {
            project_id: last.project.to_string(),
            at: time(last.at),
            millis: last.millis,
            failure: last.failure,
        }),
    }))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Drill {
    /// Of this project; default: of one by chance.
    #[schema(value_type = Option<String>)]
    project: Option<ProjectId>,
    /// Of one on this host, by id or name; default: on any.
    host: Option<String>,
}

/// Tries out whether a project's newest backup can be restored: beside the
/// project, on its host, compared with the snapshot that it was made of, and
/// deleted again. Administrators.
#[utoipa::path(post, path = "/backups/drill", tag = "backups", request_body = Drill,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn drill(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(drill): Body<Drill>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.require_admin()?;
    backups(&shared)?;
    let host = match &drill.host {
        Some(host) => Some(hosts::find(&shared, host).await?.id),
        None => None,
    };
    let chosen = match drill.project {
        Some(project) => Some(project),
        None => shared.drill_candidate(host).await?,
    };
    let none = || Problem::conflict("no_backups", "no project with backups is on a host that is connected");
    let project = caller.project(&shared, chosen.ok_or_else(none)?, None).await?;
    if host.is_some_and(|host| host != project.host) {
        return Err(Problem::conflict("other_host", "the project is on another host"));
    }
    caller.notes("backup.drill", project.id);
    begin(&shared, &caller, project, Job::DrillBackup).await
}

#[derive(Serialize, ToSchema)]
struct Rotated {
    /// The name of the key that wraps now.
    key: String,
    /// How many keys of repositories it wraps.
    repositories: u64,
}

/// Wraps the keys of all repositories with a new key of the master, and drops
/// the one before. The keys of the repositories themselves stay. Administrators.
#[utoipa::path(post, path = "/backups/rotate-wrapping-key", tag = "backups",
    responses((status = 200, body = Rotated), (status = "default", body = Problem)))]
async fn rotate(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<Rotated>> {
    caller.require_admin()?;
    let (repositories, key) = backups(&shared)?.rotate().await.map_err(|error| Problem::internal(&*error))?;
    caller.notes("backup.rotate-wrapping-key", &key);
    Ok(Json(Rotated { key, repositories }))
}
