//! Inside a project: its apps, its logs, what it uses, its environment and its
//! secrets.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use cocalc_core::{
    apps::{AppName, AppStatus},
    control::{HostCommand, HostReply, InsideCommand, InsideReply, is_secret_name},
    runner::Stats,
};
use cocalc_ids::{Action, ProjectId, Scope};
use cocalc_sqlite::master::{Project, StoredSecret};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};
use zeroize::Zeroizing;

use super::{
    caller::Caller,
    files::{ask, configure, nonsense},
    input::{Asked, Body, Id, Ids},
    problem::{Answer, Problem},
    projects::Nothing,
    view::time,
};
use crate::shared::Shared;

/// The longest value of a variable and of a secret, and how much variables may
/// take all together: a host's commands have to fit a frame.
const ENV_BYTES_MAX: usize = 8 << 10;
const ENV_ALL_BYTES_MAX: usize = 32 << 10;
const ENV_MAX: usize = 128;
const SECRET_BYTES_MAX: usize = 16 << 10;
const SECRETS_ALL_BYTES_MAX: usize = 64 << 10;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(apps))
        .routes(routes!(app_logs))
        .routes(routes!(restart_app))
        .routes(routes!(logs))
        .routes(routes!(stats))
        .routes(routes!(env))
        .routes(routes!(set_env, unset_env))
        .routes(routes!(secrets))
        .routes(routes!(set_secret, unset_secret))
}

async fn look(shared: &Shared, project: &Project, what: InsideCommand) -> Answer<InsideReply> {
    let command = HostCommand::Inside { project: project.id, epoch: project.epoch, what };
    match ask(shared, project, &command).await? {
        HostReply::Inside { project: id, answer } if id == project.id => Ok(answer),
        _ => Err(nonsense()),
    }
}

#[derive(Serialize, ToSchema)]
struct AppView {
    name: String,
    command: String,
    port: Option<u16>,
    /// `starting`, `ready`, `waiting` to be tried again, or `ended`.
    #[schema(value_type = String)]
    state: Value,
    /// `always`, `on-failure` or `never`.
    #[schema(value_type = String)]
    restart: Value,
    /// Whether viewers may see it: its file says so, and its port is among the
    /// project's `viewable_ports`.
    viewable: bool,
    /// Whether its file says so.
    wants_viewers: bool,
    /// How its last run ended: `{"code":1}` or `{"signal":"KILL"}`.
    #[schema(value_type = Option<Object>)]
    exit: Option<Value>,
    /// How often it was started in this run of the project.
    starts: u64,
    /// How often it has failed in a row.
    failures: u32,
    /// For how long it has run.
    ran_secs: u64,
    /// In how many seconds it is tried again.
    again_in_secs: Option<u64>,
    /// The path at its host, below its URL.
    path: Option<String>,
}

impl AppView {
    fn new(project: &Project, status: AppStatus) -> Self {
        let text = |value: Result<Value, serde_json::Error>| value.unwrap_or_default();
        let permitted = status.app.port.is_some_and(|port| project.viewable_ports.contains(&port));
        Self {
            name: status.name.to_string(),
            command: status.app.command,
            port: status.app.port,
            state: text(serde_json::to_value(status.state)),
            restart: text(serde_json::to_value(status.app.restart)),
            viewable: status.app.viewable && permitted,
            wants_viewers: status.app.viewable,
            exit: status.exit.and_then(|exit| serde_json::to_value(exit).ok()),
            starts: status.starts,
            failures: status.failures,
            ran_secs: status.ran_ms / 1000,
            again_in_secs: status.again_in_ms.map(|ms| ms.div_ceil(1000)),
            path: status.app.port.map(|port| format!("/{}/proxy/{port}/", project.id)),
        }
    }
}

#[derive(Serialize, ToSchema)]
struct AppsView {
    /// In the order of their names.
    apps: Vec<AppView>,
    /// What is wrong with `~/.cocalc/apps.toml`; what ran before goes on.
    complaint: Option<String>,
}

/// Lists the apps that a running project declares in `~/.cocalc/apps.toml`.
#[utoipa::path(get, path = "/projects/{id}/apps", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = AppsView), (status = "default", body = Problem)))]
async fn apps(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<AppsView>> {
    let project = caller.project(&shared, id, Some(Action::Operate)).await?;
    match look(&shared, &project, InsideCommand::Apps).await? {
        InsideReply::Apps { apps, complaint } => {
            let apps = apps.into_iter().map(|status| AppView::new(&project, status)).collect();
            Ok(Json(AppsView { apps, complaint }))
        }
        _ => Err(nonsense()),
    }
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct From {
    /// From this byte on; default 0, the earliest that is kept.
    #[serde(default)]
    offset: u64,
}

#[derive(Serialize, ToSchema)]
struct OutputView {
    /// Where the text begins: later than asked for, if the rest is no longer kept.
    offset: u64,
    text: String,
    /// From where on to ask next.
    next: u64,
}

/// Reads what an app has printed, the last 256 KiB, piece by piece.
#[utoipa::path(get, path = "/projects/{id}/apps/{name}/logs", tag = "projects",
    params(("id" = String, Path), ("name" = String, Path), From),
    responses((status = 200, body = OutputView), (status = "default", body = Problem)))]
async fn app_logs(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, AppName>,
    Asked(from): Asked<From>,
) -> Answer<Json<OutputView>> {
    let project = caller.project(&shared, id, Some(Action::Operate)).await?;
    match look(&shared, &project, InsideCommand::AppOutput { name, offset: from.offset }).await? {
        InsideReply::AppOutput { offset, text, next } => Ok(Json(OutputView { offset, text, next })),
        _ => Err(nonsense()),
    }
}

/// Ends an app, so that it is started anew at once.
#[utoipa::path(post, path = "/projects/{id}/apps/{name}/restart", tag = "projects",
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn restart_app(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, AppName>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<StatusCode> {
    let project = caller.project(&shared, id, Some(Action::Operate)).await?;
    look(&shared, &project, InsideCommand::RestartApp { name }).await.map(|_| StatusCode::NO_CONTENT)
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Lines {
    /// At most so many lines; 1 to 10000, default 1000.
    lines: Option<usize>,
}

#[derive(Serialize, ToSchema)]
struct LogsView {
    text: String,
}

/// Reads the last lines that a project's first process wrote, of at most 1 MiB.
#[utoipa::path(get, path = "/projects/{id}/logs", tag = "projects", params(("id" = String, Path), Lines),
    responses((status = 200, body = LogsView), (status = "default", body = Problem)))]
async fn logs(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Asked(lines): Asked<Lines>,
) -> Answer<Json<LogsView>> {
    let project = caller.project(&shared, id, Some(Action::Operate)).await?;
    let lines = lines.lines.unwrap_or(1000).clamp(1, 10_000);
    match look(&shared, &project, InsideCommand::Logs { lines }).await? {
        InsideReply::Logs { text } => Ok(Json(LogsView { text })),
        _ => Err(nonsense()),
    }
}

/// What a project uses.
#[derive(Serialize, ToSchema)]
struct StatsView {
    running: bool,
    /// Memory, and the most that it may have.
    memory_bytes: u64,
    memory_limit_bytes: Option<u64>,
    /// Processor time since its start, in microseconds.
    cpu_micros: u64,
    /// Processes and threads.
    pids: u64,
    /// From and to disks, since its start.
    read_bytes: u64,
    written_bytes: u64,
    /// Over its own network, since its start; without what its users send and
    /// receive through the host.
    received_bytes: u64,
    sent_bytes: u64,
    /// How many of its processes were killed because its memory was used up.
    oom_kills: u64,
    /// What its files and snapshots are charged, and the limit of that.
    disk_bytes: Option<u64>,
    disk_limit_bytes: Option<u64>,
}

/// Measures what a project uses.
#[utoipa::path(get, path = "/projects/{id}/stats", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = StatsView), (status = "default", body = Problem)))]
async fn stats(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<StatsView>> {
    let project = caller.project(&shared, id, None).await?;
    let InsideReply::Stats { stats, usage } = look(&shared, &project, InsideCommand::Stats).await? else {
        return Err(nonsense());
    };
    let running = stats.is_some();
    let Stats {
        memory_bytes,
        memory_limit_bytes,
        cpu_micros,
        pids,
        read_bytes,
        written_bytes,
        received_bytes,
        sent_bytes,
        oom_kills,
    } = stats.unwrap_or_default();
    Ok(Json(StatsView {
        running,
        memory_bytes,
        memory_limit_bytes,
        cpu_micros,
        pids,
        read_bytes,
        written_bytes,
        received_bytes,
        sent_bytes,
        oom_kills,
        disk_bytes: usage.as_ref().map(|usage| usage.charged_bytes),
        disk_limit_bytes: usage.and_then(|usage| usage.limit_bytes),
    }))
}

#[derive(Serialize, ToSchema)]
struct EnvView {
    /// Names and values. They are no secrets: every member reads them.
    env: BTreeMap<String, String>,
}

/// Shows the environment variables of a project.
#[utoipa::path(get, path = "/projects/{id}/env", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = EnvView), (status = "default", body = Problem)))]
async fn env(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<EnvView>> {
    let project = caller.project(&shared, id, Some(Action::Use(Scope::Ssh))).await?;
    Ok(Json(EnvView { env: project.config.env }))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewValue {
    value: String,
}

impl Drop for NewValue {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.value);
    }
}

/// Whether a text can be the name of a variable that a project's owner sets.
fn check_env_name(name: &str) -> Answer<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let good = (1..=64).contains(&name.len())
        && name.bytes().all(plain)
        && !name.as_bytes()[0].is_ascii_digit()
        && !name.starts_with("LD_");
    match good {
        true => Ok(()),
        false => Err(Problem::invalid("name: 1 to 64 of A-Z a-z 0-9 _, no digit first, not LD_…")),
    }
}

/// Sets an environment variable of a project. Its processes have it from its next
/// start on.
#[utoipa::path(put, path = "/projects/{id}/env/{name}", tag = "projects",
    params(("id" = String, Path), ("name" = String, Path)), request_body = NewValue,
    responses((status = 200, body = EnvView), (status = "default", body = Problem)))]
async fn set_env(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, String>,
    Body(new): Body<NewValue>,
) -> Answer<Json<EnvView>> {
    let project = caller.project(&shared, id, Some(Action::Administer)).await?;
    check_env_name(&name)?;
    if new.value.len() > ENV_BYTES_MAX || new.value.contains('\0') {
        return Err(Problem::invalid("value: at most 8192 bytes, without NUL"));
    }
    let mut wanted = project.config.env;
    wanted.insert(name.clone(), new.value.clone());
    let bytes: usize = wanted.iter().map(|(name, value)| name.len() + value.len()).sum();
    if wanted.len() > ENV_MAX || bytes > ENV_ALL_BYTES_MAX {
        return Err(Problem::invalid("a project has at most 128 variables, of 32768 bytes all together"));
    }
    let value = new.value.clone();
    let project = configure(&shared, id, move |config| drop(config.env.insert(name, value))).await?;
    Ok(Json(EnvView { env: project.config.env }))
}

/// Removes an environment variable of a project, from its next start on.
#[utoipa::path(delete, path = "/projects/{id}/env/{name}", tag = "projects",
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = EnvView), (status = "default", body = Problem)))]
async fn unset_env(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, String>,
) -> Answer<Json<EnvView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    let project = configure(&shared, id, move |config| drop(config.env.remove(&name))).await?;
    Ok(Json(EnvView { env: project.config.env }))
}

#[derive(Serialize, ToSchema)]
struct SecretView {
    name: String,
    /// When it was set.
    updated: String,
}

#[derive(Serialize, ToSchema)]
struct SecretsView {
    /// Their names. Values are never shown.
    secrets: Vec<SecretView>,
}

async fn listed(shared: &Shared, id: ProjectId) -> Answer<Json<SecretsView>> {
    let stored = shared.db(move |store| store.secrets(id)).await?;
    let secrets = stored.into_iter().map(|one| SecretView { name: one.name, updated: time(one.updated) });
    Ok(Json(SecretsView { secrets: secrets.collect() }))
}

/// Lists the names of a project's secrets.
#[utoipa::path(get, path = "/projects/{id}/secrets", tag = "projects", params(("id" = String, Path)),
    responses((status = 200, body = SecretsView), (status = "default", body = Problem)))]
async fn secrets(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<SecretsView>> {
    caller.project(&shared, id, Some(Action::Operate)).await?;
    listed(&shared, id).await
}

/// Sets a secret of a project: the file `/run/secrets/NAME` inside, in memory, for
/// its ordinary user alone. Written anew at once where the project runs.
#[utoipa::path(put, path = "/projects/{id}/secrets/{name}", tag = "projects",
    params(("id" = String, Path), ("name" = String, Path)), request_body = NewValue,
    responses((status = 200, body = SecretsView), (status = "default", body = Problem)))]
async fn set_secret(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, String>,
    Body(new): Body<NewValue>,
) -> Answer<Json<SecretsView>> {
    let project = caller.project(&shared, id, Some(Action::Administer)).await?;
    if !is_secret_name(&name) {
        return Err(Problem::invalid("name: 1 to 64 of A-Z a-z 0-9 _ . -, a letter, digit or _ first"));
    }
    if new.value.len() > SECRET_BYTES_MAX {
        return Err(Problem::invalid("value: at most 16384 bytes"));
    }
    let value = Zeroizing::new(new.value.clone());
    let wrapped = shared.secrets.wrap(id, &name, &value).map_err(|error| Problem::internal(&*error))?;
    // What is wrapped is a little longer than what it holds.
    let before = shared.db(move |store| store.secrets(id)).await?;
    let others = before.iter().filter(|one| one.name != name).map(|one| one.wrapped.len() * 3 / 4);
    if others.sum::<usize>() + value.len() > SECRETS_ALL_BYTES_MAX {
        return Err(Problem::invalid("the secrets of a project have at most 65536 bytes all together"));
    }
    let secret = StoredSecret { name, wrapped, updated: shared.now() };
    shared.db(move |store| store.set_secret(id, &secret)).await?;
    if project.made {
        shared.configure_at_host(id).await;
    }
    listed(&shared, id).await
}

/// Removes a secret of a project, at once where the project runs.
#[utoipa::path(delete, path = "/projects/{id}/secrets/{name}", tag = "projects",
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = SecretsView), (status = "default", body = Problem)))]
async fn unset_secret(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<ProjectId, String>,
) -> Answer<Json<SecretsView>> {
    let project = caller.project(&shared, id, Some(Action::Administer)).await?;
    if !shared.db(move |store| store.remove_secret(id, &name)).await? {
        return Err(Problem::not_found("secret"));
    }
    if project.made {
        shared.configure_at_host(id).await;
    }
    listed(&shared, id).await
}
