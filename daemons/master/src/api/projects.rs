//! Projects: made, started, stopped, moved, deleted.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_core::{control::ProjectConfig, runner::Limits};
use cocalc_ids::{Action, HostId, ImageDigest, OperationId, ProjectId};
use cocalc_sqlite::master::{Job, Project, ProjectState};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    hosts, images,
    input::{Asked, Body, Id, clean_name},
    problem::{Answer, Problem},
    project_limits,
    view::{Begun, ProjectView},
};
use crate::{
    placement::{Candidate, Needs, NoPlace, place},
    shared::Shared,
};

/// How long a project's processes may take to end, if nobody says otherwise.
const GRACE_MS: u64 = 10_000;

/// The states in which a project without a fence can be, of which it is known.
pub(super) const KNOWN: [ProjectState; 5] = [
    ProjectState::Stopped,
    ProjectState::Starting,
    ProjectState::Running,
    ProjectState::Stopping,
    ProjectState::Failed,
];

/// The states in which a project without a fence can be.
pub(super) const SETTLED: [ProjectState; 6] = [
    ProjectState::Unknown,
    ProjectState::Stopped,
    ProjectState::Starting,
    ProjectState::Running,
    ProjectState::Stopping,
    ProjectState::Failed,
];

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(show, delete))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(move_to))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewProject {
    name: String,
    /// The digest or the name of its image; default: its host's default.
    image: Option<String>,
    /// The host, by id or name; default: the master chooses.
    host: Option<String>,
    /// What it may use, as in `PUT /projects/{id}/limits`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    limits: Limits,
    /// The limit of its files and snapshots.
    quota_bytes: Option<u64>,
}

/// Makes a project, and begins to create it on a host.
#[utoipa::path(post, path = "/projects", tag = "projects",
    request_body = NewProject,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn create(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(new): Body<NewProject>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let name = clean_name(&new.name)?;
    let limits_max = shared.limits_max.clone();
    if caller.require_admin().is_err() {
        project_limits::within(&new.limits, &limits_max)?;
    }
    let id = ProjectId::from_random_bytes(caller.new_id("project"));
    caller.notes("project.create", id);
    let operation = OperationId::from_random_bytes(caller.new_id("create"));
    let only = match &new.host {
        Some(host) => Some(hosts::find(&shared, host).await?.id),
        None => None,
    };
    let image = match &new.image {
        Some(image) => Some(images::resolve(&shared, image).await?),
        None => None,
    };
    let needs = Needs { image, quota_bytes: new.quota_bytes, only };
    let candidates = shared.candidates().await?;
    let host = placed(&candidates, &needs)?;
    // The host's default is pinned now: it may change, and the project's upper
    // layer belongs to the image it was made on, wherever it moves.
    let default = || candidates.iter().find(|one| one.host == host)?.images.first().copied();
    let config = ProjectConfig {
        image: image.or_else(default),
        limits: new.limits,
        limits_max,
        quota_bytes: new.quota_bytes,
        ..ProjectConfig::default()
    };
    let project = shared.create_project(id, operation, name, caller.id, config, host, Job::Create).await?;
    Ok((StatusCode::ACCEPTED, Json(Begun { operation_id: operation.to_string(), project: project.into() })))
}

fn placed(candidates: &[Candidate], needs: &Needs) -> Answer<HostId> {
    place(candidates, needs).map_err(|reason| match reason {
        NoPlace::NoHost | NoPlace::NotAlive => Problem::unavailable("no_host", reason.to_string()),
        _ => Problem::conflict("no_host", reason.to_string()),
    })
}

/// A host for a project with this image and plan: `only` this one, if given.
pub(super) async fn chosen(
    shared: &Shared,
    image: Option<ImageDigest>,
    quota_bytes: Option<u64>,
    only: Option<HostId>,
) -> Answer<HostId> {
    placed(&shared.candidates().await?, &Needs { image, quota_bytes, only })
}

#[derive(Serialize, ToSchema)]
struct Projects {
    projects: Vec<ProjectView>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Page {
    /// Also those of others. Administrators.
    #[serde(default)]
    all: bool,
    /// The id after which to go on.
    after: Option<String>,
    /// At most so many; 1 to 1000, default 100.
    limit: Option<usize>,
}

/// Lists the caller's projects.
#[utoipa::path(get, path = "/projects", tag = "projects", params(Page),
    responses((status = 200, body = Projects), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(page): Asked<Page>,
) -> Answer<Json<Projects>> {
    if page.all {
        caller.require_admin()?;
    }
    let account = (!page.all).then_some(caller.id);
    let after =
        page.after.map(|id| id.parse().map_err(|_| Problem::invalid("after: not an id"))).transpose()?;
    let limit = page.limit.unwrap_or(100).clamp(1, 1000);
    let projects = shared.db(move |store| store.projects(account, after, limit)).await?;
    let projects = projects.into_iter().filter(|project| caller.covers(project.id)).map(Into::into);
    Ok(Json(Projects { projects: projects.collect() }))
}

/// Shows a project.
#[utoipa::path(get, path = "/projects/{id}", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = ProjectView), (status = "default", body = Problem)))]
async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<ProjectView>> {
    Ok(Json(caller.project(&shared, id, None).await?.into()))
}

/// Begins `job`, and answers with its operation and the project as it is then.
pub(super) async fn begin(
    shared: &Arc<Shared>,
    caller: &Caller,
    id: ProjectId,
    job: Job,
    allowed: &[ProjectState],
) -> Answer<(StatusCode, Json<Begun>)> {
    let operation = OperationId::from_random_bytes(caller.new_id(job.kind()));
    let operation = shared.begin(operation, id, caller.id, job, allowed).await?;
    begun(shared, operation.id, id).await
}

async fn begun(shared: &Shared, operation: OperationId, id: ProjectId) -> Answer<(StatusCode, Json<Begun>)> {
    let project = shared.db(move |store| store.project(id)).await?;
    Ok((StatusCode::ACCEPTED, Json(Begun { operation_id: operation.to_string(), project: project.into() })))
}

/// Starts a project.
#[utoipa::path(post, path = "/projects/{id}/start", tag = "projects", params(("id" = String, Path)),
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn start(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.project(&shared, id, Some(Action::Operate)).await?;
    begin(&shared, &caller, id, Job::Start, &KNOWN).await
}

/// A call without arguments.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Stop {
    /// How long its processes may take to end; at most 600000, default 10000.
    grace_ms: Option<u64>,
}

/// Stops a project.
#[utoipa::path(post, path = "/projects/{id}/stop", tag = "projects", params(("id" = String, Path)),
    request_body = Stop,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn stop(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(stop): Body<Stop>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.project(&shared, id, Some(Action::Operate)).await?;
    let grace_ms = stop.grace_ms.unwrap_or(GRACE_MS);
    if grace_ms > 600_000 {
        return Err(Problem::invalid("grace_ms: at most 600000"));
    }
    begin(&shared, &caller, id, Job::Stop { grace_ms }, &SETTLED).await
}

/// Deletes a project with its files and snapshots.
#[utoipa::path(delete, path = "/projects/{id}", tag = "projects", params(("id" = String, Path)),
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn delete(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<(StatusCode, Json<Begun>)> {
    let before = caller.project(&shared, id, Some(Action::Administer)).await?;
    let operation = OperationId::from_random_bytes(caller.new_id("delete"));
    shared.begin(operation, id, caller.id, Job::Delete, &KNOWN).await?;
    // It may be gone by now.
    let project = shared.db(move |store| store.project(id)).await.unwrap_or(Project {
        state: ProjectState::Deleted,
        fence: None,
        ..before
    });
    Ok((StatusCode::ACCEPTED, Json(Begun { operation_id: operation.to_string(), project: project.into() })))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MoveTo {
    /// The destination, by id or name.
    to: String,
}

/// Moves a project to another host.
#[utoipa::path(post, path = "/projects/{id}/move", tag = "projects", params(("id" = String, Path)),
    request_body = MoveTo,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn move_to(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(body): Body<MoveTo>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    let to = hosts::find(&shared, &body.to).await?.id;
    let operation = OperationId::from_random_bytes(caller.new_id("move"));
    shared.begin_move(operation, id, caller.id, to).await?;
    begun(&shared, operation, id).await
}
