//! What a project may use, and how it is kept apart.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use cocalc_core::{
    control::{HostCommand, HostReply, ProjectConfig},
    runner::{Applied, Isolation, LimitKind, Limits, NetworkPolicy},
};
use cocalc_ids::{Action, ProjectId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Body, Id},
    problem::{Answer, Problem},
};
use crate::{operations, shared::Shared};

/// How long a host may take to change what a project may use.
const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(limits, set_limits))
        .routes(routes!(set_limits_max))
        .routes(routes!(isolation, set_isolation))
}

/// What a project may use. Numbers of bytes, of thousandths of a core, of
/// processes and files, and weights from 1 to 10000 against 100 of others:
/// `memory_bytes`, `swap_bytes`, `cpu_millis`, `cpu_weight`, `pids`, `nofile`,
/// `io_weight`, `tmp_bytes`, `shm_bytes`, `log_bytes`.
#[derive(Serialize, ToSchema)]
struct LimitsView {
    /// What was asked for; null is `max`, or else the host's default.
    #[schema(value_type = Object)]
    limits: Limits,
    /// What the owner may ask for at most, as an administrator says.
    #[schema(value_type = Object)]
    max: Limits,
    /// Whether the running project has them already.
    applied: bool,
    /// Those that count from the next start only.
    #[schema(value_type = Vec<String>)]
    later: Vec<LimitKind>,
}

/// Shows what a project may use.
#[utoipa::path(get, path = "/projects/{id}/limits", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = LimitsView), (status = "default", body = Problem)))]
async fn limits(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<LimitsView>> {
    let config = caller.project(&shared, id, None).await?.config;
    Ok(Json(LimitsView { limits: config.limits, max: config.limits_max, applied: false, later: Vec::new() }))
}

/// What may be said of limits: unknown names are refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedLimits {
    memory_bytes: Option<u64>,
    swap_bytes: Option<u64>,
    cpu_millis: Option<u32>,
    cpu_weight: Option<u16>,
    pids: Option<u32>,
    nofile: Option<u32>,
    io_weight: Option<u16>,
    tmp_bytes: Option<u64>,
    shm_bytes: Option<u64>,
    log_bytes: Option<u64>,
}

impl From<AskedLimits> for Limits {
    fn from(asked: AskedLimits) -> Self {
        let AskedLimits {
            memory_bytes,
            swap_bytes,
            cpu_millis,
            cpu_weight,
            pids,
            nofile,
            io_weight,
            tmp_bytes,
            shm_bytes,
            log_bytes,
        } = asked;
        Self {
            memory_bytes,
            swap_bytes,
            cpu_millis,
            cpu_weight,
            pids,
            nofile,
            io_weight,
            tmp_bytes,
            shm_bytes,
            log_bytes,
        }
    }
}

/// How a new project of the caller is run that is made of another one: as that
/// one, but within the plan of new projects. What an operator granted to the
/// other one's owner is not the caller's to multiply.
pub(super) fn of_copy(shared: &Shared, caller: &Caller, mut config: ProjectConfig) -> ProjectConfig {
    config.idle.keep_until = None;
    // Of a name there is one.
    config.alias = None;
    if caller.admin {
        return config;
    }
    config.idle.plan_secs = None;
    config.limits_max = shared.limits_max.clone();
    if config.limits.above(&config.limits_max).is_some() {
        config.limits = Limits::default();
    }
    config
}

/// Refuses what is above a plan.
pub(super) fn within(limits: &Limits, max: &Limits) -> Answer<()> {
    match limits.above(max) {
        None => Ok(()),
        Some((kind, asked, most)) => Err(Problem::new(
            http::StatusCode::FORBIDDEN,
            "limit_above_plan",
            format!(
                "{asked} as limit of {kind} is above the {most} of the project's plan; an administrator can raise that"
            ),
        )),
    }
}

/// Says what a project may use, in the place of what was said before. A running
/// project has it at once, without being restarted. Owners may ask for what their
/// plan has at most; administrators for more.
#[utoipa::path(put, path = "/projects/{id}/limits", tag = "projects", params(("id" = String, Path)),
    request_body(content = Object),
    responses((status = 200, body = LimitsView), (status = "default", body = Problem)))]
async fn set_limits(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(asked): Body<AskedLimits>,
) -> Answer<Json<LimitsView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    let limits = Limits::from(asked);
    let admin = caller.require_admin().is_ok();
    caller.notes("project.limits", id);
    let check = |config: &ProjectConfig| if admin { Ok(()) } else { within(&limits, &config.limits_max) };
    let new = limits.clone();
    change(&shared, id, check, move |config| config.limits = new.clone()).await
}

/// Says what a project's owner may ask for at most: its plan. Administrators.
#[utoipa::path(put, path = "/projects/{id}/limits-max", tag = "projects", params(("id" = String, Path)),
    request_body(content = Object),
    responses((status = 200, body = LimitsView), (status = "default", body = Problem)))]
async fn set_limits_max(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(asked): Body<AskedLimits>,
) -> Answer<Json<LimitsView>> {
    caller.require_admin()?;
    caller.project(&shared, id, None).await?;
    let max = Limits::from(asked);
    caller.notes("project.limits_max", id);
    let check = |config: &ProjectConfig| match config.limits.above(&max) {
        None => Ok(()),
        Some((kind, asked, most)) => {
            let detail = format!(
                "the project asks for {asked} as limit of {kind} now, above {most}; lower that first"
            );
            Err(Problem::conflict("limit_above_plan", detail))
        }
    };
    let new = max.clone();
    change(&shared, id, check, move |config| config.limits_max = new.clone()).await
}

/// Changes the configuration, if `check` allows it, first on the host, which may
/// refuse it.
///
/// That takes the project's turn: what it is checked against and what the host
/// is told is what is stored then, and of two changes both know the same last.
async fn change(
    shared: &Shared,
    id: ProjectId,
    check: impl Fn(&ProjectConfig) -> Answer<()> + Send,
    change: impl Fn(&mut ProjectConfig) + Send + 'static,
) -> Answer<Json<LimitsView>> {
    let turn = shared.turns.of(id, LIMIT).await;
    let _turn = turn.ok_or_else(|| {
        Problem::unavailable("host_unavailable", "the project's host has not heard of an earlier change yet")
    })?;
    let before = shared.db(move |store| store.project(id)).await?;
    check(&before.config)?;
    if let Some(operation) = before.fence {
        return Err(cocalc_sqlite::master::Error::Busy { operation }.into());
    }
    let mut config = before.config.clone();
    change(&mut config);
    let mut applied = None;
    let mut told = true;
    if before.made {
        let command = HostCommand::Configure { project: id, epoch: before.epoch, config };
        match shared.command(before.host, &command, LIMIT).await {
            Ok(HostReply::Error(error)) => {
                return Err(Problem::conflict(operations::code(error.code), error.message));
            }
            Ok(HostReply::Limits { applied: done, .. }) => applied = Some(done),
            Ok(_) => {}
            Err(_) => {
                told = false;
                tracing::info!(project = %id, "the host hears of the limits when it is back, or with the next start");
            }
        }
    }
    let stored = shared.db(move |store| store.configure(id, change)).await;
    if stored.is_err() && before.made {
        // An operation began meanwhile: the host goes on with what is stored.
        told = shared.say_how_it_runs(id).await;
    }
    shared.note_told(id, told);
    let project = stored?;
    let Applied { later, .. } = applied.clone().unwrap_or_default();
    Ok(Json(LimitsView {
        limits: project.config.limits,
        max: project.config.limits_max,
        applied: applied.is_some(),
        later,
    }))
}

/// How a project is kept apart.
#[derive(Serialize, ToSchema)]
struct IsolationView {
    /// No process in it gains privileges: no sudo, no setuid.
    strict: bool,
    /// What it reaches outside: `{"policy": "full"}`, `{"policy": "none"}` or
    /// `{"policy": "only", "allow": ["pypi.org:443", "192.0.2.0/24:5432"]}`.
    #[schema(value_type = Object)]
    network: NetworkPolicy,
    /// Whether only an administrator may change it.
    fixed: bool,
}

impl From<ProjectConfig> for IsolationView {
    fn from(config: ProjectConfig) -> Self {
        let Isolation { strict, network } = config.isolation;
        Self { strict, network, fixed: config.isolation_fixed }
    }
}

/// Shows how a project is kept apart.
#[utoipa::path(get, path = "/projects/{id}/isolation", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = IsolationView), (status = "default", body = Problem)))]
async fn isolation(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<IsolationView>> {
    Ok(Json(caller.project(&shared, id, None).await?.config.into()))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct AskedIsolation {
    /// Default: as it is.
    strict: Option<bool>,
    /// Default: as it is.
    #[schema(value_type = Option<Object>)]
    network: Option<NetworkPolicy>,
    /// Whether only an administrator may change it from now on. Administrators.
    fixed: Option<bool>,
}

/// Says how a project is kept apart, from its next start.
#[utoipa::path(put, path = "/projects/{id}/isolation", tag = "projects", params(("id" = String, Path)),
    request_body = AskedIsolation,
    responses((status = 200, body = IsolationView), (status = "default", body = Problem)))]
async fn set_isolation(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(asked): Body<AskedIsolation>,
) -> Answer<Json<IsolationView>> {
    let before = caller.project(&shared, id, Some(Action::Administer)).await?;
    if before.config.isolation_fixed || asked.fixed.is_some() {
        caller.require_admin()?;
    }
    caller.notes("project.isolation", id);
    let project = shared
        .db(move |store| {
            store.configure(id, |config| {
                let before = config.isolation.clone();
                config.isolation = Isolation {
                    strict: asked.strict.unwrap_or(before.strict),
                    network: asked.network.unwrap_or(before.network),
                };
                config.isolation_fixed = asked.fixed.unwrap_or(config.isolation_fixed);
            })
        })
        .await?;
    Ok(Json(project.config.into()))
}
