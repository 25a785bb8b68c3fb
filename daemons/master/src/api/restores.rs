//! Restoring backups.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_ids::{Action, OperationId, ProjectId, SnapshotName, TreePath};
use cocalc_sqlite::master::{Job, Project, ProjectState, RestoreTo};
use http::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    backups::{checked, named},
    caller::Caller,
    hosts,
    input::{Body, Ids, clean_name},
    problem::{Answer, Problem},
    project_limits,
    projects::chosen,
    view::Begun,
};
use crate::shared::Shared;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(restore))
}

/// What is restored, and to where.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "to", rename_all = "snake_case", deny_unknown_fields)]
enum Restore {
    /// All of it, in the place of all that is there. The present state is kept
    /// as a snapshot, `before-restore-…`. A project that runs is stopped for the
    /// moment of the exchange, and started again.
    InPlace {},
    /// One file or directory, also while the project runs. The present state is
    /// kept as a snapshot.
    Path {
        /// Which, in the backup, for instance `home/notes.txt`.
        #[schema(value_type = String)]
        path: TreePath,
        /// To where; its directory must exist. Default: where it was.
        #[schema(value_type = Option<String>)]
        target: Option<TreePath>,
        /// Whether what is there is replaced. Default: no, and it is an error.
        #[serde(default)]
        replace: bool,
    },
    /// All of it, as a new project of the caller.
    NewProject {
        /// Its name. Default: that of the project.
        name: Option<String>,
        /// On which host, by id or name. Default: the master chooses.
        host: Option<String>,
    },
}

/// Restores a backup: it is brought to the host beside what is there, read back
/// and compared, and put in place at the end. `latest` is the newest. Until then
/// it can be cancelled, and nothing has changed.
#[utoipa::path(post, path = "/projects/{id}/backups/{backup}/restore", tag = "backups",
    params(("id" = String, Path), ("backup" = String, Path)), request_body = Restore,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn restore(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, backup): Ids<ProjectId, String>,
    Body(restore): Body<Restore>,
) -> Answer<(StatusCode, Json<Begun>)> {
    // Whoever gets all of it, or changes it, sees the system's files, too.
    let action = match &restore {
        Restore::InPlace {} => Action::Administer,
        Restore::Path { .. } | Restore::NewProject { .. } => Action::Operate,
    };
    let project = caller.project(&shared, id, Some(action)).await?;
    // A mistyped one fails now, not in the middle.
    let asked = if backup == "latest" { None } else { Some(checked(backup)?) };
    let backup = named(&shared, &project, asked).await?;
    // Named by the call: a repeated one keeps the same state, not another.
    let former = OperationId::from_random_bytes(caller.new_id("former"));
    let former: SnapshotName =
        format!("before-restore-{former}").parse().map_err(|error| Problem::internal(&error))?;
    match restore {
        Restore::InPlace {} => {
            let start = matches!(project.state, ProjectState::Running | ProjectState::Starting);
            let to = RestoreTo::InPlace { former, start };
            begin(&shared, &caller, project, backup, to).await
        }
        Restore::Path { path, .. } if path.is_root() => {
            Err(Problem::invalid("path: to restore all of it say \"to\": \"in_place\""))
        }
        Restore::Path { target: Some(target), .. } if target.is_root() => {
            Err(Problem::invalid("target: a path below the project's volume, for instance home/restored"))
        }
        Restore::Path { path, target, replace } => {
            let target = target.unwrap_or_else(|| path.clone());
            let to = RestoreTo::Path { path, target, replace, former };
            begin(&shared, &caller, project, backup, to).await
        }
        Restore::NewProject { name, host } => {
            new_project(&shared, &caller, project, backup, name, host).await
        }
    }
}

async fn begin(
    shared: &Arc<Shared>,
    caller: &Caller,
    project: Project,
    backup: String,
    to: RestoreTo,
) -> Answer<(StatusCode, Json<Begun>)> {
    let id = OperationId::from_random_bytes(caller.new_id("restore_backup"));
    // Only in the state in which it was seen: whether it is started again
    // depends on that.
    let allowed: &[ProjectState] = match (&to, project.state) {
        (RestoreTo::InPlace { start: true, .. }, _) => &[ProjectState::Running],
        (RestoreTo::InPlace { .. }, _) => &[ProjectState::Stopped, ProjectState::Failed],
        (RestoreTo::Path { .. }, _) => &[ProjectState::Running, ProjectState::Stopped, ProjectState::Failed],
    };
    let job = Job::RestoreBackup { backup, to };
    let operation = shared.begin(id, project.id, caller.id, job, allowed).await?;
    let found = shared.db(move |store| store.project(project.id)).await?;
    Ok((StatusCode::ACCEPTED, Json(Begun { operation_id: operation.id.to_string(), project: found.into() })))
}

async fn new_project(
    shared: &Arc<Shared>,
    caller: &Caller,
    original: Project,
    backup: String,
    name: Option<String>,
    host: Option<String>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let name = clean_name(name.as_deref().unwrap_or(&original.name))?;
    let only = match &host {
        Some(host) => Some(hosts::find(shared, host).await?.id),
        None => None,
    };
    let config = project_limits::of_copy(shared, caller, original.config);
    let host = chosen(shared, config.image, config.quota_bytes, only).await?;
    let id = ProjectId::from_random_bytes(caller.new_id("project"));
    caller.notes("project.create", id);
    let operation = OperationId::from_random_bytes(caller.new_id("create_from_backup"));
    let job = Job::FromBackup { source: original.id, backup };
    let project = shared.create_project(id, operation, name, caller.id, config, host, job).await?;
    Ok((StatusCode::ACCEPTED, Json(Begun { operation_id: operation.to_string(), project: project.into() })))
}
