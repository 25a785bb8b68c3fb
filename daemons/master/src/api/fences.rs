//! Hosts that are lost: somebody says so, and what they had comes up elsewhere.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_core::connector::Peer;
use cocalc_ids::{HostId, OperationId, Timestamp};
use cocalc_sqlite::master::{Fence, Host};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    hosts::find,
    input::{Body, Id},
    problem::{Answer, Problem},
    projects::Nothing,
    view::HostView,
};
use crate::shared::Shared;

/// What a reason has at most.
const REASON_CHARS_MAX: usize = 500;
/// How many hosts a recovery may be limited to.
const DESTINATIONS_MAX: usize = 100;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(fence)).routes(routes!(unfence)).routes(routes!(restore_all))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Attestation {
    /// Why the host is dead: what was seen. Kept, and shown to administrators.
    reason: String,
    /// That it is: it is switched off, or will never run a project again. The
    /// federation cannot see that, and believes it.
    attest: bool,
}

/// Says that a host is dead. Administrators.
///
/// From now on it gets no lease, nothing is asked of it, and nobody is sent
/// there; what it had may be restored elsewhere with `restore-all`, which never
/// happens by itself. If it comes back, it hears which of its projects have
/// another owner, stops them, and keeps their files aside. Refused while the
/// host is connected.
#[utoipa::path(post, path = "/hosts/{id}/fence", tag = "hosts", params(("id" = String, Path)),
    request_body = Attestation,
    responses((status = 200, body = HostView), (status = "default", body = Problem)))]
async fn fence(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Body(attestation): Body<Attestation>,
) -> Answer<Json<HostView>> {
    caller.require_admin()?;
    let host = find(&shared, &id).await?;
    caller.notes("host.fence", host.id);
    let reason = attestation.reason.trim().to_owned();
    let length = reason.chars().count();
    if !(1..=REASON_CHARS_MAX).contains(&length) || reason.chars().any(char::is_control) {
        return Err(Problem::invalid(format!(
            "reason: 1 to {REASON_CHARS_MAX} characters, none of control: what shows that the host is dead"
        )));
    }
    if !attestation.attest {
        return Err(Problem::invalid(
            "attest: must be true. If the host is only cut off, its projects go on there, and what they write \
             is lost when they are restored elsewhere",
        ));
    }
    if host.fenced.is_none() && shared.alive(Peer::Host(host.id)) {
        return Err(Problem::conflict(
            "host_alive",
            "the host is connected, so it is not dead: move its projects away, or switch it off and wait until \
             its lease has run out",
        ));
    }
    let fence = Fence { at: shared.now(), by: caller.id, reason, heard: last_heard(&shared, &host) };
    let id = host.id;
    shared.db(move |store| store.fence(id, &fence)).await?;
    shared.peers.fence(id);
    // What it may be about to say counts for nothing.
    shared.disconnect(Peer::Host(id)).await;
    shared.announce_host(id).await?;
    tracing::warn!(host = %id, "the host is fenced, on an operator's word that it is dead");
    shown(&shared, id).await
}

/// When a host was heard of last: by this process, or as its row says.
fn last_heard(shared: &Shared, host: &Host) -> Option<Timestamp> {
    let heard = shared.peers.heard_of(Peer::Host(host.id)).map(|heard| {
        let ago = shared.clock.boot().saturating_sub(heard);
        let ago = i64::try_from(ago.as_millis()).unwrap_or(i64::MAX);
        Timestamp::from_millis(shared.now().millis().saturating_sub(ago))
    });
    heard.max(host.last_seen)
}

async fn shown(shared: &Shared, id: HostId) -> Answer<Json<HostView>> {
    let (host, counts) = shared.db(move |store| Ok((store.host(id)?, store.project_counts()?))).await?;
    let projects = counts.into_iter().find(|(host, _)| *host == id).map_or(0, |(_, count)| count);
    let connected = shared.alive(Peer::Host(id));
    Ok(Json(HostView::new(host, connected, projects, true)))
}

/// Takes back that a host is dead: it gets a lease again, and goes on with the
/// projects that it still owns. Administrators.
#[utoipa::path(post, path = "/hosts/{id}/unfence", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = HostView), (status = "default", body = Problem)))]
async fn unfence(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<HostView>> {
    caller.require_admin()?;
    let id = find(&shared, &id).await?.id;
    caller.notes("host.unfence", id);
    let running = shared.db(|store| store.recoveries_running()).await?;
    if let Some(recovery) = running.iter().find(|recovery| recovery.host == id) {
        return Err(cocalc_sqlite::master::Error::Busy { operation: recovery.id }.into());
    }
    shared.db(move |store| store.unfence(id)).await?;
    shared.peers.unfence(id);
    // It introduces itself anew, with what it holds.
    shared.disconnect(Peer::Host(id)).await;
    shared.announce_host(id).await?;
    shown(&shared, id).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RestoreAll {
    /// To which hosts, by id or name; default: wherever there is room.
    #[serde(default)]
    to: Vec<String>,
}

#[derive(Serialize, ToSchema)]
struct RecoveryBegun {
    /// Its `progress.projects` says of each project what became of it, and what
    /// was lost.
    operation_id: String,
}

/// Brings the projects of a fenced host up elsewhere, each from its newest
/// backup. What was written after that is lost, which the operation states for
/// each project. Projects without a backup are not touched: they are lost until
/// the host returns. Asked again, it goes on with those that failed.
/// Administrators.
#[utoipa::path(post, path = "/hosts/{id}/restore-all", tag = "hosts", params(("id" = String, Path)),
    request_body = RestoreAll,
    responses((status = 202, body = RecoveryBegun), (status = "default", body = Problem)))]
async fn restore_all(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Body(asked): Body<RestoreAll>,
) -> Answer<(StatusCode, Json<RecoveryBegun>)> {
    caller.require_admin()?;
    let host = find(&shared, &id).await?.id;
    caller.notes("host.restore-all", host);
    if shared.backups.is_none() {
        return Err(Problem::conflict(
            "no_backups",
            "this federation has no backups: the master's [backups] is not set",
        ));
    }
    if asked.to.len() > DESTINATIONS_MAX {
        return Err(Problem::invalid(format!("to: at most {DESTINATIONS_MAX} hosts")));
    }
    let mut to = Vec::with_capacity(asked.to.len());
    for name in &asked.to {
        let destination = find(&shared, name).await?;
        if destination.id == host || destination.is_out() {
            return Err(Problem::invalid(format!("to: {} is fenced or withdrawn", destination.name)));
        }
        to.push(destination.id);
    }
    let operation = OperationId::from_random_bytes(caller.new_id("restore_all"));
    let recovery = shared.begin_recovery(operation, host, caller.id, to).await?;
    Ok((StatusCode::ACCEPTED, Json(RecoveryBegun { operation_id: recovery.id.to_string() })))
}
