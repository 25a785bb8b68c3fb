//! Snapshots of a project.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use cocalc_core::{
    control::{HostCommand, HostReply},
    snapshots::{AUTO_PREFIX, auto_time},
};
use cocalc_ids::{Action, OperationId, ProjectId, SnapshotName, Timestamp, TreePath};
use cocalc_sqlite::master::{Job, ProjectState};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Body, Id, Ids},
    operations::checked,
    problem::{Answer, Problem},
    projects::{SETTLED, begin},
    view::{Begun, time},
};
use crate::{operations, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(delete)).routes(routes!(restore))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewSnapshot {
    /// Its name; default: the time.
    #[schema(value_type = Option<String>)]
    name: Option<SnapshotName>,
}

/// The time as a snapshot's name.
fn time_name(prefix: &str, now: Timestamp) -> Answer<SnapshotName> {
    format!("{prefix}{}", time(now)).parse().map_err(|error| Problem::internal(&error))
}

/// Takes a snapshot.
#[utoipa::path(post, path = "/projects/{id}/snapshots", tag = "snapshots", params(("id" = String, Path)),
    request_body = NewSnapshot,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn create(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(new): Body<NewSnapshot>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.project(&shared, id, Some(Action::Operate)).await?;
    let name = match new.name {
        Some(name) if name.as_str().starts_with(AUTO_PREFIX) => {
            let detail =
                format!("name: {AUTO_PREFIX}… is for automatic snapshots, which are deleted by themselves");
            return Err(Problem::invalid(detail));
        }
        Some(name) => name,
        None => time_name("", shared.now())?,
    };
    let begun = begin(&shared, &caller, id, Job::Snapshot { name }, &SETTLED).await?;
    checked(&shared, OperationId::from_random_bytes(caller.new_id("snapshot"))).await?;
    Ok(begun)
}

#[derive(Serialize, ToSchema)]
struct SnapshotView {
    name: String,
    /// Whether it was taken by itself, and goes by itself.
    automatic: bool,
    created: String,
    /// Identifies its content on every host.
    origin: String,
}

#[derive(Serialize, ToSchema)]
struct Snapshots {
    snapshots: Vec<SnapshotView>,
}

/// Lists snapshots, oldest first.
#[utoipa::path(get, path = "/projects/{id}/snapshots", tag = "snapshots", params(("id" = String, Path)),
    responses((status = 200, body = Snapshots), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<Snapshots>> {
    let project = caller.project(&shared, id, None).await?;
    let command = HostCommand::Snapshots { project: id, epoch: project.epoch };
    match shared.command(project.host, &command, Duration::from_secs(20)).await {
        Ok(HostReply::Snapshots { project, snapshots }) if project == id => {
            let view = |snapshot: cocalc_core::storage::Snapshot| SnapshotView {
                automatic: auto_time(&snapshot.name).is_some(),
                name: snapshot.name.to_string(),
                created: time(snapshot.created),
                origin: snapshot.origin.to_string(),
            };
            Ok(Json(Snapshots { snapshots: snapshots.into_iter().map(view).collect() }))
        }
        Ok(HostReply::Error(error)) => Err(Problem::conflict(operations::code(error.code), error.message)),
        Ok(_) => Err(Problem::unavailable("host_failed", "the host's answer makes no sense")),
        Err(_) => Err(Problem::unavailable("host_unavailable", "the project's host does not answer")),
    }
}

/// Deletes a snapshot.
#[utoipa::path(delete, path = "/projects/{id}/snapshots/{name}", tag = "snapshots",
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn delete(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, SnapshotName>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    begin(&shared, &caller, id, Job::DeleteSnapshot { name }, &SETTLED).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Restore {
    /// Only this file or directory, for instance `home/notes.txt`.
    #[schema(value_type = Option<String>)]
    path: Option<TreePath>,
}

/// Goes back to a snapshot, keeping the present state as another one. The
/// project must be stopped for that; one `path` is also brought back while it
/// runs, in the place of what is there.
#[utoipa::path(post, path = "/projects/{id}/snapshots/{name}/restore", tag = "snapshots",
    params(("id" = String, Path), ("name" = String, Path)),
    request_body = Restore,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn restore(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, SnapshotName>,
    Body(restore): Body<Restore>,
) -> Answer<(StatusCode, Json<Begun>)> {
    // Named by the call: a repeated one keeps the same state, not another.
    let former = OperationId::from_random_bytes(caller.new_id("former"));
    let former = format!("before-restore-{former}").parse().map_err(|error| Problem::internal(&error))?;
    match restore.path {
        Some(path) if path.is_root() => Err(Problem::invalid("path: leave it out to go back as a whole")),
        Some(path) => {
            caller.project(&shared, id, Some(Action::Operate)).await?;
            begin(&shared, &caller, id, Job::RestorePath { name, path, former }, &SETTLED).await
        }
        None => {
            caller.project(&shared, id, Some(Action::Administer)).await?;
            let allowed = [ProjectState::Stopped, ProjectState::Failed];
            begin(&shared, &caller, id, Job::RestoreSnapshot { name, former }, &allowed).await
        }
    }
}
