//! The keys that sign connect tokens.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    accounts::Wait,
    caller::Caller,
    input::{Asked, Body, Id},
    problem::{Answer, Problem},
    projects::Nothing,
};
use crate::{bus::streams::Receipt, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(rotate)).routes(routes!(withdraw))
}

#[derive(Serialize, ToSchema)]
struct Ring {
    /// Grows with each change.
    version: u64,
    /// The key that signs.
    current: String,
    /// All keys that are accepted.
    keys: Vec<String>,
    /// With `wait`: where it is in force.
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
    let receipt = wait.receipt(&shared, targets).await;
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
    let task = shared.clone();
    let changed = tokio::task::spawn_blocking(move || task.signing.withdraw(&kid, task.now())).await;
    if !changed.map_err(|error| Problem::internal(&error))?? {
        return Err(Problem::not_found("key"));
    }
    let targets = shared.announce_ring().await?;
    let receipt = wait.receipt(&shared, targets).await;
    Ok(Json(Ring::new(&shared, receipt)))
}

/// The public keys, for third parties.
pub(super) async fn jwks(
    State(shared): State<Arc<Shared>>,
) -> ([(http::HeaderName, &'static str); 1], Json<Value>) {
    let cache = [(http::header::CACHE_CONTROL, "public, max-age=60")];
    (cache, Json(cocalc_auth::jwks::document(&shared.signing.public())))
}
