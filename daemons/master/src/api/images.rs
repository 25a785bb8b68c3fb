//! Images: which there are, how they come, and how they go.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{Json, extract::State};
use cocalc_core::{
    connector::Peer,
    control::{CommandError, ImageReply, ImageRequest, ImageTask},
    images::{ImageName, Reference},
};
use cocalc_ids::{Action, HostId, ImageDigest, OperationId, ProjectId};
use cocalc_sqlite::master::{Job, ProjectState};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    hosts,
    input::{Body, Id},
    problem::{Answer, Problem},
    projects,
    view::{Begun, time},
};
use crate::{operations, shared::Shared};

/// A recipe has no more bytes than fit a request.
const UNUSED_DAYS: u32 = 30;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(pull))
        .routes(routes!(build))
        .routes(routes!(import))
        .routes(routes!(fetch))
        .routes(routes!(note))
        .routes(routes!(prune))
        .routes(routes!(set))
}

fn refused(error: CommandError) -> Problem {
    let code = operations::code(error.code);
    match code {
        "host_unavailable" => Problem::unavailable(code, error.message),
        "invalid_request" => Problem::invalid(error.message),
        _ => Problem::conflict(code, error.message),
    }
}

/// The image that is meant.
pub(super) async fn resolve(shared: &Shared, text: &str) -> Answer<ImageDigest> {
    shared.resolve_image(text).await?.ok_or_else(|| {
        let reason = format!(
            "{text:?} is neither the digest nor the name of an image; `cocalc image list` shows them"
        );
        Problem::conflict("no_image", reason)
    })
}

#[derive(Serialize, ToSchema)]
struct ImagesView {
    images: Vec<ImageView>,
}

/// An image.
#[derive(Serialize, ToSchema)]
struct ImageView {
    digest: String,
    names: BTreeSet<String>,
    /// Where it came from.
    sources: BTreeSet<String>,
    bytes: u64,
    /// How many projects have it.
    projects: u64,
    /// On which hosts it is.
    hosts: Vec<OnHost>,
}

/// An image on one host.
#[derive(Serialize, ToSchema)]
struct OnHost {
    host_id: String,
    /// Whether it stays there, used or not.
    pinned: bool,
    projects: u64,
    used: Option<String>,
    imported: Option<String>,
}

/// Lists the images of all connected hosts.
#[utoipa::path(get, path = "/images", tag = "images",
    responses((status = 200, body = ImagesView), (status = "default", body = Problem)))]
async fn list(State(shared): State<Arc<Shared>>, _caller: Caller) -> Answer<Json<ImagesView>> {
    let mut found: BTreeMap<ImageDigest, ImageView> = BTreeMap::new();
    for (host, images) in shared.images.told() {
        if !shared.alive(Peer::Host(host)) {
            continue;
        }
        for image in images {
            let view = found.entry(image.digest).or_insert_with(|| ImageView {
                digest: image.digest.to_string(),
                names: BTreeSet::new(),
                sources: BTreeSet::new(),
                bytes: 0,
                projects: 0,
                hosts: Vec::new(),
            });
            view.sources.extend(image.sources);
            view.bytes = view.bytes.max(image.bytes);
            view.projects += image.projects;
            view.hosts.push(OnHost {
                host_id: host.to_string(),
                pinned: image.pinned,
                projects: image.projects,
                used: image.used.map(time),
                imported: image.imported.map(time),
            });
        }
    }
    for (name, digest) in shared.db(|store| store.image_names()).await? {
        if let Some(view) = found.get_mut(&digest) {
            view.names.insert(name);
        }
    }
    Ok(Json(ImagesView { images: found.into_values().collect() }))
}

/// Work on an image that was begun.
#[derive(Serialize, ToSchema)]
struct ImageBegun {
    operation_id: String,
    /// Where it goes on.
    host_id: String,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PullImage {
    /// An OCI reference with its registry, for instance
    /// `docker.io/library/debian:12`.
    reference: String,
    /// What it is called here.
    name: Option<String>,
    /// The host that pulls it, by id or name; others fetch it from there when
    /// they need it. Default: the master chooses.
    host: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BuildImage {
    /// TOML with `suite`, `packages`, `mirror` and `run`.
    recipe: String,
    /// What it is called here.
    name: Option<String>,
    /// The host that builds it, by id or name. Default: the master chooses.
    host: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ImportImage {
    /// The name of a file in the host's directory for images: a root file system
    /// as tar, or what `podman save` or `docker save` wrote.
    file: String,
    /// What it is called here.
    name: Option<String>,
    /// The host, by id or name. Default: the master chooses.
    host: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct FetchImage {
    /// The host that is to have it, by id or name.
    host: String,
}

async fn begin(
    shared: &Arc<Shared>,
    caller: &Caller,
    host: Option<&str>,
    what: &str,
    task: ImageTask,
) -> Answer<(StatusCode, Json<ImageBegun>)> {
    let host = choose(shared, host).await?;
    caller.notes(what, host);
    let operation = OperationId::from_random_bytes(caller.new_id(what));
    shared.begin_image_job(operation, caller.id, host, task).map_err(refused)?;
    let begun = ImageBegun { operation_id: operation.to_string(), host_id: host.to_string() };
    Ok((StatusCode::ACCEPTED, Json(begun)))
}

/// The host that is named, or the one with the most free space.
async fn choose(shared: &Shared, host: Option<&str>) -> Answer<HostId> {
    if let Some(host) = host {
        return Ok(hosts::find(shared, host).await?.id);
    }
    let hosts = shared.db(|store| store.hosts()).await?;
    let able = hosts.into_iter().filter(|host| host.withdrawn.is_none() && shared.alive(Peer::Host(host.id)));
    let best = able
        .filter_map(|host| Some((host.id, host.capabilities?)))
        .filter(|(_, can)| can.runner.isolation)
        .max_by_key(|(id, can)| (can.free_bytes, *id));
    let none = || Problem::unavailable("no_host", "no host that keeps images is connected");
    best.map(|(id, _)| id).ok_or_else(none)
}

fn checked_name(name: Option<String>) -> Answer<Option<String>> {
    let Some(name) = name else { return Ok(None) };
    match name.parse::<ImageName>() {
        Ok(name) => Ok(Some(name.to_string())),
        Err(error) => Err(Problem::invalid(format!("name: {error}"))),
    }
}

/// Has a host pull an image from a registry. Administrators.
#[utoipa::path(post, path = "/images/pull", tag = "images", request_body = PullImage,
    responses((status = 202, body = ImageBegun), (status = "default", body = Problem)))]
async fn pull(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(body): Body<PullImage>,
) -> Answer<(StatusCode, Json<ImageBegun>)> {
    caller.require_admin()?;
    let reference: Reference =
        body.reference.parse().map_err(|error| Problem::invalid(format!("reference: {error}")))?;
    let task = ImageTask::Pull { reference: reference.as_str().to_owned(), name: checked_name(body.name)? };
    begin(&shared, &caller, body.host.as_deref(), "image.pull", task).await
}

/// Has a host build an image from Debian packages. What the recipe runs, it runs
/// as root on that host. Administrators.
#[utoipa::path(post, path = "/images/build", tag = "images", request_body = BuildImage,
    responses((status = 202, body = ImageBegun), (status = "default", body = Problem)))]
async fn build(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(body): Body<BuildImage>,
) -> Answer<(StatusCode, Json<ImageBegun>)> {
    caller.require_admin()?;
    let task = ImageTask::Build { recipe: body.recipe, name: checked_name(body.name)? };
    begin(&shared, &caller, body.host.as_deref(), "image.build", task).await
}

/// Has a host import an archive from its directory for that. Administrators.
#[utoipa::path(post, path = "/images/import", tag = "images", request_body = ImportImage,
    responses((status = 202, body = ImageBegun), (status = "default", body = Problem)))]
async fn import(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(body): Body<ImportImage>,
) -> Answer<(StatusCode, Json<ImageBegun>)> {
    caller.require_admin()?;
    let task = ImageTask::Import { file: body.file, name: checked_name(body.name)? };
    begin(&shared, &caller, body.host.as_deref(), "image.import", task).await
}

/// Has a host fetch an image from another one. Administrators.
#[utoipa::path(post, path = "/images/{id}/fetch", tag = "images", params(("id" = String, Path)),
    request_body = FetchImage,
    responses((status = 202, body = ImageBegun), (status = "default", body = Problem)))]
async fn fetch(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(image): Id<String>,
    Body(body): Body<FetchImage>,
) -> Answer<(StatusCode, Json<ImageBegun>)> {
    caller.require_admin()?;
    let digest = resolve(&shared, &image).await?;
    let host = hosts::find(&shared, &body.host).await?.id;
    let task = ImageTask::Fetch { digest, from: host };
    begin(&shared, &caller, Some(&body.host), "image.fetch", task).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Note {
    /// Whether it stays, used or not.
    pinned: Option<bool>,
    /// A name that it gets, and that whichever image has it loses.
    name: Option<String>,
    /// Only on this host, by id or name. Default: wherever it is.
    host: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Noted {
    digest: String,
    /// Where that is so now.
    hosts: Vec<String>,
}

/// Pins an image, or gives it a name. Administrators.
#[utoipa::path(patch, path = "/images/{id}", tag = "images", params(("id" = String, Path)),
    request_body = Note,
    responses((status = 200, body = Noted), (status = "default", body = Problem)))]
async fn note(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(image): Id<String>,
    Body(body): Body<Note>,
) -> Answer<Json<Noted>> {
    caller.require_admin()?;
    let digest = resolve(&shared, &image).await?;
    caller.notes("image.note", digest);
    let name = checked_name(body.name)?;
    let hosts: Vec<HostId> = match &body.host {
        Some(host) => vec![hosts::find(&shared, host).await?.id],
        None => {
            let told = shared.images.told();
            let has = |images: &Vec<_>| {
                images.iter().any(|image: &cocalc_core::control::ImageReport| image.digest == digest)
            };
            told.iter().filter(|(_, images)| has(images)).map(|(host, _)| *host).collect()
        }
    };
    if hosts.is_empty() {
        return Err(Problem::conflict("no_image", format!("image {digest} is on no connected host")));
    }
    shared.name_image(name.clone(), digest, caller.id).await.map_err(refused)?;
    let mut noted = Vec::new();
    for host in hosts {
        let request = ImageRequest::Note { digest, pinned: body.pinned, name: name.clone() };
        match shared.ask_images(host, &request).await.map_err(refused)? {
            ImageReply::Noted(_) => noted.push(host.to_string()),
            _ => return Err(Problem::unavailable("host_failed", "the host's answer makes no sense")),
        }
    }
    Ok(Json(Noted { digest: digest.to_string(), hosts: noted }))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Prune {
    /// For how many days nobody has used them; default 30.
    unused_days: Option<u32>,
    /// Only say which would go.
    #[serde(default)]
    dry_run: bool,
    /// Only on this host, by id or name. Default: on all that are connected.
    host: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Pruned {
    removed: Vec<Removed>,
}

#[derive(Serialize, ToSchema)]
struct Removed {
    host_id: String,
    digest: String,
    names: BTreeSet<String>,
    bytes: u64,
}

/// Deletes images that no project of their host has, that nobody has used for so
/// long, and that are not pinned. Administrators.
#[utoipa::path(post, path = "/images/prune", tag = "images", request_body = Prune,
    responses((status = 200, body = Pruned), (status = "default", body = Problem)))]
async fn prune(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(body): Body<Prune>,
) -> Answer<Json<Pruned>> {
    caller.require_admin()?;
    caller.notes("image.prune", body.host.clone().unwrap_or_default());
    let hosts: Vec<HostId> = match &body.host {
        Some(host) => vec![hosts::find(&shared, host).await?.id],
        None => shared.images.told().into_keys().filter(|host| shared.alive(Peer::Host(*host))).collect(),
    };
    let unused_secs = u64::from(body.unused_days.unwrap_or(UNUSED_DAYS)) * 86_400;
    let mut removed = Vec::new();
    for host in hosts {
        let request = ImageRequest::Prune { unused_secs, dry_run: body.dry_run };
        match shared.ask_images(host, &request).await.map_err(refused)? {
            ImageReply::Pruned { images } => removed.extend(images.into_iter().map(|image| Removed {
                host_id: host.to_string(),
                digest: image.digest.to_string(),
                names: image.names,
                bytes: image.bytes,
            })),
            _ => return Err(Problem::unavailable("host_failed", "the host's answer makes no sense")),
        }
    }
    Ok(Json(Pruned { removed }))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SetImage {
    /// The digest or the name of an image.
    image: String,
    /// Stop and start the project for it if it runs; otherwise it must be
    /// stopped.
    #[serde(default)]
    restart: bool,
}

/// Gives a project another image. Its home stays. What was installed on the
/// former image is kept with it, and is there again when the project goes back
/// to it.
#[utoipa::path(put, path = "/projects/{id}/image", tag = "projects", params(("id" = String, Path)),
    request_body = SetImage,
    responses((status = 202, body = Begun), (status = "default", body = Problem)))]
async fn set(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(body): Body<SetImage>,
) -> Answer<(StatusCode, Json<Begun>)> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    let image = resolve(&shared, &body.image).await?;
    let allowed: &[ProjectState] = if body.restart {
        &[ProjectState::Stopped, ProjectState::Failed, ProjectState::Running]
    } else {
        &[ProjectState::Stopped, ProjectState::Failed]
    };
    projects::begin(&shared, &caller, id, Job::SetImage { image, restart: body.restart }, allowed).await
}
