//! The keys that sign connect tokens.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id},
    problem::{Answer, Problem},
    projects::Nothing,
    receipts::Wait,
    view::time,
};
use crate::{receipts::Receipt, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(rotate)).routes(routes!(withdraw))
}

#[derive(Serialize, ToSchema)]
struct Ring {
    /// Grows with each change.
    version: u64,
    /// The key that signs.
    current: String,
    /// All keys that are accepted.
    keys: Vec<String>,
    /// Where it is in force; with `wait`, when it is so everywhere.
    receipt: Option<Receipt>,
}

impl Ring {
    fn new(shared: &Shared, receipt: Option<Receipt>) -> Self {
        let public = shared.signing.public();
        Self {
            version: public.version,
            current: shared.signing.current_kid(),
            keys: public.keys.into_iter().map(|key| key.kid).collect(),
            receipt,
        }
    }
}

#[derive(Serialize, ToSchema)]
struct SigningKeyView {
    kid: String,
    alg: &'static str,
    /// `next`: published, and does not sign yet; `current`: signs; `previous`:
    /// accepted until its last token has expired.
    state: &'static str,
    /// When it was published, or began to sign; of `previous`, none.
    since: Option<String>,
    /// Of `previous`: when it is retired.
    until: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct SigningKeys {
    /// Grows with each change.
    version: u64,
    keys: Vec<SigningKeyView>,
    /// Keys that were withdrawn, the latest last.
    withdrawn: Vec<String>,
}

/// Lists the keys that sign connect tokens, without their secrets.
/// Administrators.
#[utoipa::path(get, path = "/keys", tag = "keys",
    responses((status = 200, body = SigningKeys), (status = "default", body = Problem)))]
async fn list(State(shared): State<Arc<Shared>>, caller: Caller) -> Answer<Json<SigningKeys>> {
    caller.require_admin()?;
    let (public, keys) = shared.signing.list();
    let keys = keys.into_iter().map(|key| SigningKeyView {
        kid: key.kid,
        alg: key.algorithm.name(),
        state: key.state.as_str(),
        since: key.since.map(time),
        until: key.until.map(time),
    });
    Ok(Json(SigningKeys { version: public.version, keys: keys.collect(), withdrawn: public.withdrawn }))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Force {
    /// Even if hosts may not know the next key yet.
    #[serde(default)]
    force: bool,
}

/// Lets the next key sign. Administrators.
#[utoipa::path(post, path = "/keys/rotate", tag = "keys", params(Force, Wait),
    responses((status = 200, body = Ring), (status = "default", body = Problem)))]
async fn rotate(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(force): Asked<Force>,
    Asked(wait): Asked<Wait>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<Ring>> {
    caller.require_admin()?;
    let task = shared.clone();
    let changed = tokio::task::spawn_blocking(move || task.signing.rotate(force.force, task.now())).await;
    changed.map_err(|error| Problem::internal(&error))??;
    let targets = shared.announce_ring().await?;
    let receipt =
        wait.receipt(&shared, caller.change("keys.rotate", shared.signing.current_kid()), targets).await?;
    Ok(Json(Ring::new(&shared, receipt)))
}

/// Withdraws a key at once: what it signed is refused. Administrators.
#[utoipa::path(post, path = "/keys/{kid}/withdraw", tag = "keys", params(("kid" = String, Path), Wait),
    responses((status = 200, body = Ring), (status = "default", body = Problem)))]
async fn withdraw(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(kid): Id<String>,
    Asked(wait): Asked<Wait>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<Json<Ring>> {
    caller.require_admin()?;
    let (task, name) = (shared.clone(), kid.clone());
    let changed = tokio::task::spawn_blocking(move || task.signing.withdraw(&kid, task.now())).await;
    if !changed.map_err(|error| Problem::internal(&error))?? {
        return Err(Problem::not_found("key"));
    }
    let targets = shared.announce_ring().await?;
    let receipt = wait.receipt(&shared, caller.change("keys.withdraw", name), targets).await?;
    Ok(Json(Ring::new(&shared, receipt)))
}

/// The public keys, for third parties.
pub(super) async fn jwks(
    State(shared): State<Arc<Shared>>,
) -> ([(http::HeaderName, &'static str); 1], Json<Value>) {
    let cache = [(http::header::CACHE_CONTROL, "public, max-age=60")];
    (cache, Json(cocalc_auth::jwks::document(&shared.signing.public())))
}
