//! Hosts, proxies, and how they join.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{Extension, Json, extract::State};
use base64::Engine;
use cocalc_auth::PublicKey;
use cocalc_core::{connector::Peer, router::HostAddress};
use cocalc_ids::{HostId, HostName};
use cocalc_sqlite::master::{self as store, Host, JoinKind, Joining, Proxy};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id},
    problem::{Answer, Problem},
    projects::Nothing,
    receipts::Wait,
    trail::Trail,
    view::{AddressView, HostView, time},
};
use crate::{
    bus::{gate::joined, streams::peer_name},
    receipts::Receipt,
    secret,
    shared::Shared,
};

/// Without a bearer token: the join token is the credential.
pub(super) fn open_routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(join_host)).routes(routes!(join_proxy))
}

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(join_token))
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(cordon))
        .routes(routes!(uncordon))
        .routes(routes!(proxies))
        .routes(routes!(audit_head))
        .routes(routes!(audit_heads))
        .routes(routes!(proxy_audit_heads))
        .routes(routes!(rotate_host_key))
        .routes(routes!(rotate_proxy_key))
        .routes(routes!(withdraw_host))
        .routes(routes!(withdraw_proxy))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewJoinToken {
    /// `host` or `proxy`.
    #[schema(value_type = String)]
    kind: JoinKind,
    /// How long it is good; 1 to 604800, default 3600.
    ttl_secs: Option<u64>,
}

#[derive(Serialize, ToSchema)]
struct JoinTokenAnswer {
    /// Good for one join. Shown this once.
    token: String,
    expires_at: String,
}

/// Makes a one-use token, with which a host or proxy joins. Administrators.
#[utoipa::path(post, path = "/join-tokens", tag = "hosts",
    request_body = NewJoinToken,
    responses((status = 201, body = JoinTokenAnswer), (status = "default", body = Problem)))]
async fn join_token(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(new): Body<NewJoinToken>,
) -> Answer<(StatusCode, Json<JoinTokenAnswer>)> {
    caller.require_admin()?;
    let ttl = new.ttl_secs.unwrap_or(3600);
    if !(1..=604_800).contains(&ttl) {
        return Err(Problem::invalid("ttl_secs: 1 to 604800"));
    }
    caller.notes("join-token.create", new.kind.as_str());
    make_join_token(&shared, new.kind, None, ttl).await
}

async fn make_join_token(
    shared: &Shared,
    kind: JoinKind,
    peer: Option<[u8; 16]>,
    ttl: u64,
) -> Answer<(StatusCode, Json<JoinTokenAnswer>)> {
    let token = secret::generate("ccj_").map_err(|error| Problem::internal(&error))?;
    let (hash, now) = (secret::hash(&token), shared.now());
    let expires = now.plus(Duration::from_secs(ttl));
    shared.db(move |store| store.add_join_token(&hash, kind, now, expires, peer)).await?;
    Ok((StatusCode::CREATED, Json(JoinTokenAnswer { token, expires_at: time(expires) })))
}

/// Makes a one-use token, with which a host comes with another identity key:
/// its daemon finds the token in its `join_token_file` at its next start. Its
/// present key is good until then, and for nothing afterwards. A host that was
/// withdrawn is let in again with it. Administrators.
#[utoipa::path(post, path = "/hosts/{id}/rotate-key", tag = "hosts", params(("id" = String, Path)),
    request_body = RotateKey,
    responses((status = 201, body = JoinTokenAnswer), (status = "default", body = Problem)))]
async fn rotate_host_key(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Body(new): Body<RotateKey>,
) -> Answer<(StatusCode, Json<JoinTokenAnswer>)> {
    caller.require_admin()?;
    let ttl = new.ttl()?;
    let host = find(&shared, &id).await?.id;
    make_join_token(&shared, JoinKind::Host, Some(*host.as_bytes()), ttl).await
}

/// The same for a proxy. Administrators.
#[utoipa::path(post, path = "/proxies/{id}/rotate-key", tag = "hosts", params(("id" = String, Path)),
    request_body = RotateKey,
    responses((status = 201, body = JoinTokenAnswer), (status = "default", body = Problem)))]
async fn rotate_proxy_key(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Body(new): Body<RotateKey>,
) -> Answer<(StatusCode, Json<JoinTokenAnswer>)> {
    caller.require_admin()?;
    let ttl = new.ttl()?;
    let proxy = find_proxy(&shared, &id).await?.id;
    make_join_token(&shared, JoinKind::Proxy, Some(*proxy.as_bytes()), ttl).await
}

#[derive(Serialize, ToSchema)]
struct AuditHead {
    /// How many lines the audit log had when its host or proxy last said so.
    count: u64,
    /// The hash of the last of them.
    head: String,
}

/// Shows the end of a host's audit chain, as the host told it last: a log that
/// does not reach it, or says otherwise there, was cut or changed.
/// Administrators.
#[utoipa::path(get, path = "/hosts/{id}/audit-head", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = AuditHead), (status = "default", body = Problem)))]
async fn audit_head(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
) -> Answer<Json<AuditHead>> {
    caller.require_admin()?;
    let peer = peer_name(Peer::Host(find(&shared, &id).await?.id));
    let mut known = shared.db(move |store| store.audit_heads(&peer)).await?;
    let last = known.heads.pop();
    let (count, head) = last.map_or_else(Default::default, |last| (last.count, last.hash));
    Ok(Json(AuditHead { count, head }))
}

#[derive(Serialize, ToSchema)]
struct SignedHead {
    /// How many lines the log had.
    count: u64,
    /// The hash of the last of them.
    head: String,
    /// When, by the clock of who signed.
    time: String,
    /// The same in milliseconds since 1970, as it was signed.
    time_ms: i64,
    /// When the master heard it.
    received_at: String,
    /// The identity key that signed, base64url.
    identity: String,
    /// Its signature over `cocalc-audit-head-1 <peer> <count> <head>
    /// <time_ms>`, base64url without padding.
    signature: String,
}

impl From<store::AuditHead> for SignedHead {
    fn from(head: store::AuditHead) -> Self {
        Self {
            count: head.count,
            head: head.hash,
            time: time(head.time),
            time_ms: head.time.millis(),
            received_at: time(head.received),
            identity: head.identity,
            signature: head.signature,
        }
    }
}

#[derive(Serialize, ToSchema)]
struct AuditHeads {
    /// `host:<id>` or `proxy:<id>`.
    peer: String,
    /// The last of each day, oldest first; of the last 400 days.
    heads: Vec<SignedHead>,
    /// The last one that contradicts them, if there was any: the log was cut,
    /// or written anew.
    contradiction: Option<SignedHead>,
}

async fn heads_of(shared: &Shared, peer: Peer) -> Answer<Json<AuditHeads>> {
    let name = peer_name(peer);
    let peer = name.clone();
    let known = shared.db(move |store| store.audit_heads(&name)).await?;
    let heads = known.heads.into_iter().map(Into::into).collect();
    Ok(Json(AuditHeads { peer, heads, contradiction: known.contradiction.map(Into::into) }))
}

/// Shows where a host's audit chain was, day by day, as the host signed it.
/// Administrators.
#[utoipa::path(get, path = "/hosts/{id}/audit-heads", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = AuditHeads), (status = "default", body = Problem)))]
async fn audit_heads(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
) -> Answer<Json<AuditHeads>> {
    caller.require_admin()?;
    heads_of(&shared, Peer::Host(find(&shared, &id).await?.id)).await
}

/// The same of a proxy. Administrators.
#[utoipa::path(get, path = "/proxies/{id}/audit-heads", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = AuditHeads), (status = "default", body = Problem)))]
async fn proxy_audit_heads(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
) -> Answer<Json<AuditHeads>> {
    caller.require_admin()?;
    heads_of(&shared, Peer::Proxy(find_proxy(&shared, &id).await?.id)).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RotateKey {
    /// How long the token is good; 1 to 604800, default 3600.
    ttl_secs: Option<u64>,
}

impl RotateKey {
    fn ttl(&self) -> Answer<u64> {
        match self.ttl_secs.unwrap_or(3600) {
            ttl if (1..=604_800).contains(&ttl) => Ok(ttl),
            _ => Err(Problem::invalid("ttl_secs: 1 to 604800")),
        }
    }
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Force {
    /// Even if it owns projects, which nobody can reach then.
    #[serde(default)]
    force: bool,
}

#[derive(Serialize, ToSchema)]
struct Withdrawn {
    id: String,
    /// Where it is in force; with `wait`, when it is so everywhere.
    receipt: Option<Receipt>,
}

/// Withdraws a host: its key is good for nothing from now on, its connections
/// are closed, and it lets nobody in any more. Its projects run on, out of
/// reach. Administrators.
#[utoipa::path(post, path = "/hosts/{id}/withdraw", tag = "hosts", params(("id" = String, Path), Force, Wait),
    responses((status = 200, body = Withdrawn), (status = "default", body = Problem)))]
async fn withdraw_host(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Asked(force): Asked<Force>,
    Asked(wait): Asked<Wait>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<Withdrawn>> {
    caller.require_admin()?;
    let host = find(&shared, &id).await?.id;
    let owned = shared.db(move |store| Ok(store.projects_of_host(host)?.len())).await?;
    if owned > 0 && !force.force {
        let detail =
            format!("the host owns {owned} projects, which nobody could reach: move them, or force it");
        return Err(Problem::conflict("host_not_empty", detail));
    }
    let now = shared.now();
    shared.db(move |store| store.withdraw_peer(JoinKind::Host, *host.as_bytes(), now)).await?;
    let mut targets = shared.announce_host(host).await?;
    targets.push(shared.dismiss(Peer::Host(host)).await?);
    let receipt = wait.receipt(&shared, caller.change("host.withdraw", host), targets).await?;
    Ok(Json(Withdrawn { id: host.to_string(), receipt }))
}

/// Withdraws a proxy: its key is good for nothing from now on, and what it
/// carries is closed. Administrators.
#[utoipa::path(post, path = "/proxies/{id}/withdraw", tag = "hosts", params(("id" = String, Path), Wait),
    responses((status = 200, body = Withdrawn), (status = "default", body = Problem)))]
async fn withdraw_proxy(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
    Asked(wait): Asked<Wait>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<Withdrawn>> {
    caller.require_admin()?;
    let proxy = find_proxy(&shared, &id).await?.id;
    let now = shared.now();
    shared.db(move |store| store.withdraw_peer(JoinKind::Proxy, *proxy.as_bytes(), now)).await?;
    let targets = shared.announce_proxy(proxy).await?;
    shared.dismiss(Peer::Proxy(proxy)).await?;
    let receipt = wait.receipt(&shared, caller.change("proxy.withdraw", proxy), targets).await?;
    Ok(Json(Withdrawn { id: proxy.to_string(), receipt }))
}

/// A proxy that was not withdrawn, by id or name; by id also one that was.
async fn find_proxy(shared: &Shared, text: &str) -> Answer<Proxy> {
    if let Ok(id) = text.parse() {
        return Ok(shared.db(move |store| store.proxy(id)).await?);
    }
    let proxies = shared.db(|store| store.proxies()).await?;
    let found = proxies.into_iter().find(|proxy| proxy.name.as_str() == text);
    found.ok_or_else(|| Problem::not_found("proxy"))
}

/// Somebody joins.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Join {
    /// The join token.
    token: String,
    /// Its name, unique in the federation.
    #[schema(value_type = String)]
    name: HostName,
    /// Its Ed25519 identity key, base64url without padding.
    identity: String,
    /// Where it listens: `url`, `domain`, `ssh`, `peer`.
    #[schema(value_type = Object)]
    address: HostAddress,
    /// The identity key's signature over
    /// `cocalc-join-2 <token> <name> <identity> <url> <ssh> <peer>`, base64url
    /// without padding.
    proof: String,
}

/// The master's answer to one that joined.
#[derive(Serialize, ToSchema)]
struct Joined {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    host_id: Option<HostId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    proxy_id: Option<cocalc_ids::ProxyId>,
    /// The master's URL: issuer of connect tokens, audience of assertions.
    issuer: String,
}

/// Enrolls a host with a join token.
#[utoipa::path(post, path = "/hosts/join", tag = "hosts",
    request_body = Join,
    responses((status = 200, body = Joined), (status = "default", body = Problem)))]
async fn join_host(
    State(shared): State<Arc<Shared>>,
    trail: Option<Extension<Trail>>,
    Body(body): Body<Join>,
) -> Answer<Json<Joined>> {
    join(&shared, JoinKind::Host, trail, body).await
}

/// Enrolls a proxy with a join token.
#[utoipa::path(post, path = "/proxies/join", tag = "hosts",
    request_body = Join,
    responses((status = 200, body = Joined), (status = "default", body = Problem)))]
async fn join_proxy(
    State(shared): State<Arc<Shared>>,
    trail: Option<Extension<Trail>>,
    Body(body): Body<Join>,
) -> Answer<Json<Joined>> {
    join(&shared, JoinKind::Proxy, trail, body).await
}

async fn join(
    shared: &Shared,
    kind: JoinKind,
    trail: Option<Extension<Trail>>,
    join: Join,
) -> Answer<Json<Joined>> {
    // Parsing refuses weak points, with which anything would verify.
    let key: PublicKey =
        join.identity.parse().map_err(|_| Problem::invalid("identity: not an Ed25519 key"))?;
    // No part of what is signed has a space in it, so that it means one thing.
    if join.token.chars().any(char::is_whitespace) {
        return Err(Problem::unauthenticated());
    }
    for text in [&join.address.url, &join.address.domain, &join.address.ssh, &join.address.peer] {
        if text.len() > 300 || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(Problem::invalid("address: a part is too long, or no address"));
        }
    }
    let HostAddress { url, ssh, peer, .. } = &join.address;
    let message = format!("cocalc-join-2 {} {} {} {url} {ssh} {peer}", join.token, join.name, join.identity);
    let signature = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(&join.proof).ok();
    let signature: Option<[u8; 64]> = signature.and_then(|bytes| bytes.try_into().ok());
    if !signature.is_some_and(|signature| key.verify(message.as_bytes(), &signature)) {
        return Err(Problem::invalid("proof: not this key's signature of this join"));
    }
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| Problem::internal(&error))?;
    let address = HostAddress { identity: join.identity, ..join.address };
    let (hash, now, name) = (secret::hash(&join.token), shared.now(), join.name);
    let id = shared
        .db(move |store| store.join(&Joining { token: &hash, kind, name: &name, address: &address, id }, now))
        .await?;
    let mut answer = Joined { host_id: None, proxy_id: None, issuer: shared.issuer.clone() };
    // A connection that was opened with a key of before ends with it.
    shared.disconnect(joined(kind, id)).await;
    if let Some(Extension(trail)) = trail {
        trail.changes("join", peer_name(joined(kind, id)));
    }
    match joined(kind, id) {
        Peer::Host(host) => {
            shared.announce_host(host).await?;
            answer.host_id = Some(host);
        }
        Peer::Proxy(proxy) => {
            shared.announce_proxy(proxy).await?;
            answer.proxy_id = Some(proxy);
        }
    }
    Ok(Json(answer))
}

#[derive(Serialize, ToSchema)]
struct Hosts {
    hosts: Vec<HostView>,
}

fn view(shared: &Shared, host: Host, counts: &BTreeMap<HostId, u64>, admin: bool) -> HostView {
    let connected = shared.alive(Peer::Host(host.id));
    let projects = counts.get(&host.id).copied().unwrap_or(0);
    HostView::new(host, connected, projects, admin)
}

/// Lists hosts.
#[utoipa::path(get, path = "/hosts", tag = "hosts",
    responses((status = 200, body = Hosts), (status = "default", body = Problem)))]
async fn list(State(shared): State<Arc<Shared>>, caller: Caller) -> Answer<Json<Hosts>> {
    let (hosts, counts) = shared.db(|store| Ok((store.hosts()?, store.project_counts()?))).await?;
    let counts = counts.into_iter().collect();
    let view = |host| view(&shared, host, &counts, caller.admin);
    Ok(Json(Hosts { hosts: hosts.into_iter().map(view).collect() }))
}

/// A host, by id or name.
pub(super) async fn find(shared: &Shared, text: &str) -> Answer<Host> {
    if let Ok(id) = text.parse::<HostId>() {
        return Ok(shared.db(move |store| store.host(id)).await?);
    }
    match text.parse::<HostName>() {
        Ok(name) => Ok(shared.db(move |store| store.host_named(&name)).await?),
        Err(_) => Err(Problem::not_found("host")),
    }
}

/// Shows a host, by id or name.
#[utoipa::path(get, path = "/hosts/{id}", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = HostView), (status = "default", body = Problem)))]
async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
) -> Answer<Json<HostView>> {
    let host = find(&shared, &id).await?;
    let counts = shared.db(|store| store.project_counts()).await?.into_iter().collect();
    Ok(Json(view(&shared, host, &counts, caller.admin)))
}

/// Keeps new projects away from a host. Administrators.
#[utoipa::path(post, path = "/hosts/{id}/cordon", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = HostView), (status = "default", body = Problem)))]
async fn cordon(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
) -> Answer<Json<HostView>> {
    set_cordon(&shared, &caller, &id, true).await
}

/// Lets new projects come to a host again. Administrators.
#[utoipa::path(post, path = "/hosts/{id}/uncordon", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = HostView), (status = "default", body = Problem)))]
async fn uncordon(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<String>,
) -> Answer<Json<HostView>> {
    set_cordon(&shared, &caller, &id, false).await
}

async fn set_cordon(shared: &Shared, caller: &Caller, id: &str, cordoned: bool) -> Answer<Json<HostView>> {
    caller.require_admin()?;
    let id = find(shared, id).await?.id;
    let host = shared.db(move |store| store.cordon(id, cordoned)).await?;
    let counts = shared.db(|store| store.project_counts()).await?.into_iter().collect();
    Ok(Json(view(shared, host, &counts, true)))
}

#[derive(Serialize, ToSchema)]
struct ProxyView {
    id: String,
    name: String,
    /// `connected`, or `away`.
    state: &'static str,
    address: AddressView,
    ssh_host_keys: Vec<String>,
    last_seen: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Proxies {
    proxies: Vec<ProxyView>,
}

/// Lists proxies.
#[utoipa::path(get, path = "/proxies", tag = "hosts",
    responses((status = 200, body = Proxies), (status = "default", body = Problem)))]
async fn proxies(State(shared): State<Arc<Shared>>, _: Caller) -> Answer<Json<Proxies>> {
    let proxies = shared.db(|store| store.proxies()).await?;
    let view = |proxy: Proxy| ProxyView {
        id: proxy.id.to_string(),
        name: proxy.name.to_string(),
        state: if shared.alive(Peer::Proxy(proxy.id)) { "connected" } else { "away" },
        address: proxy.address.into(),
        ssh_host_keys: proxy.ssh_host_keys,
        last_seen: proxy.last_seen.map(time),
    };
    Ok(Json(Proxies { proxies: proxies.into_iter().map(view).collect() }))
}
