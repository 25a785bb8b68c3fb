//! Whom an account is at OpenID providers.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_ids::AccountId;
use cocalc_sqlite::master::Identity;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Body, Id, Ids},
    problem::{Answer, Problem},
    view::time,
};
use crate::{oidc::Handoff, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(list, link)).routes(routes!(unlink))
}

#[derive(Serialize, ToSchema)]
struct IdentityView {
    /// Names it within the account.
    id: String,
    /// What the provider is called here; none if it is no more.
    provider: Option<String>,
    /// Who vouches: the provider's issuer, or an integrator's accounts.
    issuer: String,
    /// Their name for the person.
    subject: String,
    created: String,
}

#[derive(Serialize, ToSchema)]
struct Identities {
    identities: Vec<IdentityView>,
}

/// From provider and subject, either of which would be awkward in a path.
fn id_of(identity: &Identity) -> String {
    let digest =
        Sha256::new().chain_update(&identity.provider).chain_update([0]).chain_update(&identity.subject);
    digest.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn view(shared: &Shared, identity: Identity) -> IdentityView {
    IdentityView {
        id: id_of(&identity),
        provider: shared.oidc.by_issuer(&identity.provider).map(|known| known.name.clone()),
        issuer: identity.provider,
        subject: identity.subject,
        created: time(identity.created),
    }
}

async fn found(shared: &Shared, account: AccountId) -> Answer<Json<Identities>> {
    let identities = shared.db(move |store| store.identities(account)).await?;
    Ok(Json(Identities { identities: identities.into_iter().map(|one| view(shared, one)).collect() }))
}

/// Lists with whom an account can log in.
#[utoipa::path(get, path = "/accounts/{id}/identities", tag = "identities", params(("id" = String, Path)),
    responses((status = 200, body = Identities), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
) -> Answer<Json<Identities>> {
    caller.require_self(id)?;
    found(&shared, id).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewIdentity {
    /// What the program's own address got, when somebody had shown who they are.
    code: String,
    /// The secret whose hash was named at the beginning.
    verifier: String,
}

/// Links an identity to the caller's own account: who has it can log in.
#[utoipa::path(post, path = "/accounts/{id}/identities", tag = "identities", params(("id" = String, Path)),
    request_body = NewIdentity,
    responses((status = 200, body = Identities), (status = "default", body = Problem)))]
async fn link(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
    Body(new): Body<NewIdentity>,
) -> Answer<Json<Identities>> {
    caller.require_self(id)?;
    if caller.id != id {
        return Err(Problem::denied());
    }
    let Some(Handoff::Link { provider, subject }) =
        shared.oidc.redeem(&new.code, &new.verifier, shared.clock.boot())
    else {
        return Err(Problem::invalid("code: is not good, was used, or is older than two minutes"));
    };
    caller.notes("identity.link", &provider);
    let now = shared.now();
    shared.db(move |store| store.link_identity(id, &provider, &subject, now)).await?;
    tracing::info!(account = %id, "an identity was linked");
    found(&shared, id).await
}

/// Takes an identity from an account. The last way to log in stays.
#[utoipa::path(delete, path = "/accounts/{id}/identities/{identity}", tag = "identities",
    params(("id" = String, Path), ("identity" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn unlink(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, name): Ids<AccountId, String>,
) -> Answer<StatusCode> {
    caller.require_self(id)?;
    let vouching = shared.accounts.as_ref().map(|accounts| accounts.provider().to_owned());
    let issuers = shared.oidc.all().iter().map(|known| known.provider.issuer().to_owned());
    let usable: Vec<String> = issuers.chain(vouching).collect();
    shared
        .db(move |store| {
            let found = store.identities(id)?.into_iter().find(|identity| id_of(identity) == name);
            let Some(identity) = found else {
                return Err(cocalc_sqlite::master::Error::NotFound { what: "identity" });
            };
            store.unlink_identity(id, &identity.provider, &identity.subject, &usable)
        })
        .await?;
    tracing::info!(account = %id, "an identity was unlinked");
    Ok(StatusCode::NO_CONTENT)
}
