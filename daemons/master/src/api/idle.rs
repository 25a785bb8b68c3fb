//! Why a project runs or does not, until when, and how to have it run on.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use cocalc_core::{
    activity::{IdleReport, IdleSettings, explain},
    connector::Peer,
    control::{HostCommand, HostReply},
};
use cocalc_ids::{Action, ProjectId};
use cocalc_sqlite::master::Project;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    files::{self, configure},
    input::{Body, Id},
    problem::{Answer, Problem},
    view::time,
};
use crate::shared::Shared;

/// How long a host may take to say who uses a project.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// How long one call keeps a project at most.
const KEEP_SECS_MAX: u64 = 7 * 86_400;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(why)).routes(routes!(keep)).routes(routes!(settings, set_settings))
}

#[derive(Serialize, ToSchema)]
struct Why {
    state: String,
    /// In one sentence with times, for people.
    reason: String,
    /// When it was last started.
    started: Option<String>,
    /// Whether its host is connected.
    host_connected: bool,
    /// When it was last used.
    last_used: Option<String>,
    /// When it is stopped for being idle, unless it is used; null: never, or it
    /// does not run.
    stops_at: Option<String>,
    /// Whether its users are being warned of that.
    warned: bool,
    /// Until when it is kept, whether it is used or not.
    keep_until: Option<String>,
    /// After how many seconds without use it is stopped; null: never.
    idle_secs: Option<u64>,
    /// What must not be cut off now: `a move`, `a backup`.
    busy: Option<String>,
    /// The jobs that it declares.
    jobs: Vec<String>,
    /// For each kind of use how many seconds ago it was last seen: `start http
    /// web_socket ssh bus cpu network job`.
    #[schema(value_type = Object)]
    uses: Value,
}

/// Says why a project runs, or does not, and when it will be stopped.
#[utoipa::path(get, path = "/projects/{id}/why", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = Why), (status = "default", body = Problem)))]
async fn why(State(shared): State<Arc<Shared>>, caller: Caller, Id(id): Id<ProjectId>) -> Answer<Json<Why>> {
    let project = caller.project(&shared, id, None).await?;
    let connected = shared.alive(Peer::Host(project.host));
    let report = if connected && project.made { report(&shared, &project).await } else { None };
    let explained = report.as_ref().map(|report| explain(report, shared.now()));
    let mut reason = words(&shared, &project, &explained, &report).await?;
    if connected && let Some(notice) = files::notice(&shared, &project).await {
        reason.push_str("; ");
        reason.push_str(&notice);
    }
    if !connected {
        reason.push_str("; its host is not connected, so this may be old");
    }
    let uses = report.iter().flat_map(|report| &report.work);
    let uses: serde_json::Map<String, Value> = uses
        .filter_map(|(source, ago)| {
            let name = serde_json::to_value(source).ok()?;
            Some((name.as_str()?.to_owned(), (ago / 1000).into()))
        })
        .collect();
    Ok(Json(Why {
        state: project.state.to_string(),
        reason,
        started: project.started.map(time),
        host_connected: connected,
        last_used: explained.as_ref().and_then(|why| why.last_used).map(time),
        stops_at: explained.as_ref().and_then(|why| why.stops_at).map(time),
        warned: report.as_ref().is_some_and(|report| report.warned),
        keep_until: project.config.idle.keep_until.filter(|until| *until > shared.now()).map(time),
        idle_secs: report.as_ref().and_then(|report| report.timeout_ms).map(|ms| ms / 1000),
        busy: report.as_ref().and_then(|report| report.busy.clone()),
        jobs: report.iter().flat_map(|report| &report.jobs).map(|(name, _)| name.clone()).collect(),
        uses: uses.into(),
    }))
}

/// The sentence: of an operation that is under way, of a host that knows, or of
/// what is remembered here.
async fn words(
    shared: &Shared,
    project: &Project,
    explained: &Option<cocalc_core::activity::Explained>,
    report: &Option<IdleReport>,
) -> Answer<String> {
    let id = project.id;
    let last = shared.db(move |store| store.operations_of(id, 1)).await?.into_iter().next();
    if let Some(last) = last.as_ref().filter(|last| project.fence == Some(last.id)) {
        return Ok(format!("operation {} ({}) is under way: {}", last.id, last.job.kind(), last.phase));
    }
    if let (Some(explained), Some(IdleReport { running: true, .. })) = (explained, report) {
        return Ok(explained.sentence.clone());
    }
    Ok(match (&project.reason, last) {
        (Some(reason), _) => reason.clone(),
        (None, Some(last)) => {
            let ended = time(last.updated);
            format!("the last operation was {}, {} at {ended}", last.job.kind(), last.state.as_str())
        }
        (None, None) => "nothing has happened to it yet".to_owned(),
    })
}

async fn report(shared: &Shared, project: &Project) -> Option<IdleReport> {
    let command = HostCommand::Why { project: project.id };
    match shared.command(project.host, &command, ASK_LIMIT).await {
        Ok(HostReply::Why(report)) if report.project == project.id => Some(report),
        _ => None,
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Keep {
    /// For how many seconds from now, at most 604800; 0 takes it back.
    for_secs: u64,
}

/// Until when a project is kept.
#[derive(Serialize, ToSchema)]
struct Kept {
    /// Null if it is not.
    keep_until: Option<String>,
}

/// Has a project run on for a while, whether it is used or not.
#[utoipa::path(post, path = "/projects/{id}/keep", tag = "projects", params(("id" = String, Path)),
    request_body = Keep,
    responses((status = 200, body = Kept), (status = "default", body = Problem)))]
async fn keep(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(keep): Body<Keep>,
) -> Answer<Json<Kept>> {
    caller.project(&shared, id, Some(Action::Operate)).await?;
    if keep.for_secs > KEEP_SECS_MAX {
        return Err(Problem::invalid("for_secs: at most 604800, a week; call again before that is over"));
    }
    let until = (keep.for_secs > 0).then(|| shared.now().plus(Duration::from_secs(keep.for_secs)));
    let project = configure(&shared, id, move |config| config.idle.keep_until = until).await?;
    Ok(Json(Kept { keep_until: project.config.idle.keep_until.map(time) }))
}

/// When a project is stopped for being idle.
#[derive(Serialize, ToSchema)]
struct IdleView {
    /// What its owner wishes, in seconds, 0 for never; null if they said nothing.
    timeout_secs: Option<u32>,
    /// The longest that its plan permits, 0 without end; null for its host's.
    plan_secs: Option<u32>,
    /// Until when it is kept, whether it is used or not.
    keep_until: Option<String>,
}

impl From<IdleSettings> for IdleView {
    fn from(settings: IdleSettings) -> Self {
        let IdleSettings { plan_secs, timeout_secs, keep_until } = settings;
        Self { timeout_secs, plan_secs, keep_until: keep_until.map(time) }
    }
}

/// Shows when a project is stopped for being idle.
#[utoipa::path(get, path = "/projects/{id}/idle", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = IdleView), (status = "default", body = Problem)))]
async fn settings(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<IdleView>> {
    Ok(Json(caller.project(&shared, id, None).await?.config.idle.into()))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewIdle {
    /// In seconds, 60 to 2592000, or 0 for never; null for what its plan or host
    /// does. No longer than the plan. Left out: as it is.
    #[serde(default, deserialize_with = "some")]
    #[schema(value_type = Option<u32>)]
    timeout_secs: Option<Option<u32>>,
    /// The longest that its plan permits; null for its host's. Administrators.
    #[serde(default, deserialize_with = "some")]
    #[schema(value_type = Option<u32>)]
    plan_secs: Option<Option<u32>>,
}

/// Tells null from what is left out.
fn some<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Option<u32>>, D::Error> {
    Option::deserialize(value).map(Some)
}

/// Says when a project is stopped for being idle.
#[utoipa::path(patch, path = "/projects/{id}/idle", tag = "projects", params(("id" = String, Path)),
    request_body = NewIdle,
    responses((status = 200, body = IdleView), (status = "default", body = Problem)))]
async fn set_settings(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(new): Body<NewIdle>,
) -> Answer<Json<IdleView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    if new.plan_secs.is_some() {
        caller.require_admin()?;
    }
    let change = move |settings: &mut IdleSettings| {
        if let Some(secs) = new.timeout_secs {
            settings.timeout_secs = secs;
        }
        if let Some(secs) = new.plan_secs {
            settings.plan_secs = secs;
        }
    };
    let mut wanted = IdleSettings::default();
    change(&mut wanted);
    wanted.validate().map_err(|error| Problem::invalid(error.to_string()))?;
    let project = configure(&shared, id, move |config| change(&mut config.idle)).await?;
    Ok(Json(project.config.idle.into()))
}
