//! How a project may be reached: what viewers see, and how long without us.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_ids::{Action, ProjectId};
use cocalc_sqlite::master::ProjectAccess;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id},
    problem::{Answer, Problem},
    receipts::Wait,
};
use crate::{receipts::Receipt, shared::Shared};

/// The longest grace: a day.
const GRACE_SECS_MAX: u64 = 24 * 3600;
const VIEWABLE_MAX: usize = 64;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(show, change))
}

#[derive(Serialize, ToSchema)]
struct AccessView {
    /// The ports whose apps viewers may see.
    viewable_ports: Vec<u16>,
    /// How long its host lets in who was let in before, when the master is
    /// away for longer than the lease; none: the federation's default.
    grace_secs: Option<u64>,
    /// Whether a proxy that terminates SSH may attest for it.
    proxy_ssh: bool,
    /// Whether the project's own `~/.ssh/authorized_keys` opens it.
    authorized_keys: bool,
    /// The version of the ACL that says so.
    acl_version: u64,
    /// Where it is in force; with `wait`, when it is so everywhere. Only in the
    /// answer to a change.
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<Receipt>,
}

impl AccessView {
    fn new((acl_version, access): (u64, ProjectAccess), receipt: Option<Receipt>) -> Self {
        Self {
            viewable_ports: access.viewable_ports,
            grace_secs: access.grace_ms.map(|millis| millis / 1000),
            proxy_ssh: access.proxy_ssh,
            authorized_keys: access.authorized_keys,
            acl_version,
            receipt,
        }
    }
}

/// Shows how a project may be reached.
#[utoipa::path(get, path = "/projects/{id}/access", tag = "access", params(("id" = String, Path)),
    responses((status = 200, body = AccessView), (status = "default", body = Problem)))]
async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<AccessView>> {
    caller.project(&shared, id, None).await?;
    let access = shared.db(move |store| store.project_access(id)).await?;
    Ok(Json(AccessView::new(access, None)))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ChangedAccess {
    /// At most 64 ports; what is left out stays as it is.
    #[schema(value_type = Option<Vec<u16>>)]
    viewable_ports: Option<Vec<u16>>,
    /// 0 to 86400; null: the federation's default.
    #[serde(default, deserialize_with = "some")]
    #[schema(value_type = Option<u64>)]
    grace_secs: Option<Option<u64>>,
    proxy_ssh: Option<bool>,
    /// Whoever writes to that file in the project lets in whom they like, with
    /// the rights of a collaborator. Default: no.
    authorized_keys: Option<bool>,
}

/// Tells null from nothing.
fn some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Changes how a project may be reached. Owners.
#[utoipa::path(patch, path = "/projects/{id}/access", tag = "access", params(("id" = String, Path), Wait),
    request_body = ChangedAccess,
    responses((status = 200, body = AccessView), (status = "default", body = Problem)))]
async fn change(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Asked(wait): Asked<Wait>,
    Body(mut new): Body<ChangedAccess>,
) -> Answer<Json<AccessView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    if let Some(ports) = &mut new.viewable_ports {
        ports.sort_unstable();
        ports.dedup();
        if ports.len() > VIEWABLE_MAX || ports.contains(&0) {
            return Err(Problem::invalid("viewable_ports: at most 64, each 1 to 65535"));
        }
    }
    if new.grace_secs.flatten().is_some_and(|secs| secs > GRACE_SECS_MAX) {
        return Err(Problem::invalid("grace_secs: 0 to 86400, or null for the default"));
    }
    let default_ms = shared.settings.grace_ms;
    let changed = shared
        .db(move |store| {
            store.change_access(id, default_ms, |access| {
                if let Some(ports) = new.viewable_ports {
                    access.viewable_ports = ports;
                }
                if let Some(grace) = new.grace_secs {
                    access.grace_ms = grace.map(|secs| secs.saturating_mul(1000));
                }
                if let Some(proxy_ssh) = new.proxy_ssh {
                    access.proxy_ssh = proxy_ssh;
                }
                if let Some(authorized_keys) = new.authorized_keys {
                    access.authorized_keys = authorized_keys;
                }
            })
        })
        .await?;
    let targets = shared.announce_project(id).await?;
    let mut why = caller.change("project.access", id);
    why.grace = Some((id, changed.0));
    let receipt = wait.receipt(&shared, why, targets).await?;
    Ok(Json(AccessView::new(changed, receipt)))
}
