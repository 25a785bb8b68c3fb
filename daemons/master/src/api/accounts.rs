//! Accounts and their tokens.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use axum::{Json, extract::State, response::Response};
use cocalc_ids::{AccountId, KeyId, ProjectId};
use cocalc_sqlite::master::{ApiToken, KeyLimits, Verb};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id, Ids, clean_name},
    problem::{Answer, Problem},
    receipts::{Ended, Wait},
    scope,
    view::{AccountView, time},
};
use crate::{receipts::Receipt, secret, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(show))
        .routes(routes!(me))
        .routes(routes!(add_token, tokens))
        .routes(routes!(remove_token))
        .routes(routes!(sign_out))
        .routes(routes!(ban))
        .routes(routes!(unban))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewAccount {
    name: String,
    #[serde(default)]
    admin: bool,
}

/// Makes an account. Administrators.
#[utoipa::path(post, path = "/accounts", tag = "accounts",
    request_body = NewAccount,
    responses((status = 201, body = AccountView), (status = "default", body = Problem)))]
async fn create(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(new): Body<NewAccount>,
) -> Answer<(StatusCode, Json<AccountView>)> {
    caller.require_admin()?;
    let name = clean_name(&new.name)?;
    let (id, now) = (AccountId::from_random_bytes(caller.new_id("account")), shared.now());
    caller.notes("account.create", id);
    let account = shared.db(move |store| store.create_account(id, &name, new.admin, now)).await?;
    Ok((StatusCode::CREATED, Json(account.into())))
}

#[derive(Serialize, ToSchema)]
struct Accounts {
    accounts: Vec<AccountView>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Page {
    /// The id after which to go on.
    after: Option<String>,
    /// At most so many; 1 to 1000, default 100.
    limit: Option<usize>,
}

/// Lists accounts. Administrators.
#[utoipa::path(get, path = "/accounts", tag = "accounts", params(Page),
    responses((status = 200, body = Accounts), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(page): Asked<Page>,
) -> Answer<Json<Accounts>> {
    caller.require_admin()?;
    let after =
        page.after.map(|id| id.parse().map_err(|_| Problem::invalid("after: not an id"))).transpose()?;
    let limit = page.limit.unwrap_or(100).clamp(1, 1000);
    let accounts = shared.db(move |store| store.accounts(after, limit)).await?;
    Ok(Json(Accounts { accounts: accounts.into_iter().map(Into::into).collect() }))
}

/// Shows an account: one's own, or any for administrators.
#[utoipa::path(get, path = "/accounts/{id}", tag = "accounts", params(("id" = String, Path)),
    responses((status = 200, body = AccountView), (status = "default", body = Problem)))]
async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
) -> Answer<Json<AccountView>> {
    caller.require_self(id)?;
    Ok(Json(shared.db(move |store| store.account(id)).await?.into()))
}

/// Shows the caller's account.
#[utoipa::path(get, path = "/account", tag = "accounts",
    responses((status = 200, body = AccountView), (status = "default", body = Problem)))]
async fn me(State(shared): State<Arc<Shared>>, caller: Caller) -> Answer<Json<AccountView>> {
    let id = caller.id;
    Ok(Json(shared.db(move |store| store.account(id)).await?.into()))
}

/// The longest life of an API token that has an end: ten years.
const TTL_SECS_MAX: u64 = 10 * 365 * 24 * 3600;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewToken {
    /// What people call it; at most 100 characters.
    #[serde(default)]
    name: String,
    /// How long it lives; 1 to 315360000, ten years; default: for ever.
    ttl_secs: Option<u64>,
    /// Only for these projects.
    #[schema(value_type = Option<Vec<String>>)]
    projects: Option<BTreeSet<ProjectId>>,
    /// Only for this, of `read connect operate manage create account`. A key
    /// with verbs never administers the federation; one without may do all
    /// that its account may.
    #[schema(value_type = Option<Vec<String>>)]
    verbs: Option<BTreeSet<Verb>>,
}

#[derive(Serialize, ToSchema)]
struct TokenAnswer {
    id: String,
    /// Shown this once.
    token: String,
    expires_at: Option<String>,
}

/// Makes an API key.
#[utoipa::path(post, path = "/accounts/{id}/tokens", tag = "accounts", params(("id" = String, Path)),
    request_body = NewToken,
    responses((status = 201, body = TokenAnswer), (status = "default", body = Problem)))]
async fn add_token(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
    Body(new): Body<NewToken>,
) -> Answer<(StatusCode, Json<TokenAnswer>)> {
    caller.require_self(id)?;
    if new.ttl_secs.is_some_and(|ttl| !(1..=TTL_SECS_MAX).contains(&ttl)) {
        return Err(Problem::invalid("ttl_secs: 1 to 315360000"));
    }
    let name = if new.name.is_empty() { String::new() } else { clean_name(&new.name)? };
    let limits = match (new.projects, new.verbs) {
        (None, None) => None,
        // All that can be done to projects that exist.
        (projects, None) => {
            let verbs = [Verb::Read, Verb::Connect, Verb::Operate, Verb::Manage].into();
            Some(KeyLimits { projects, verbs })
        }
        (projects, Some(verbs)) => Some(KeyLimits { projects, verbs }),
    };
    if let Some(limits) = &limits {
        scope::validate(limits)?;
    }
    let text = secret::generate("cct_").map_err(|error| Problem::internal(&error))?;
    let (hash, created) = (secret::hash(&text), shared.now());
    let expires = new.ttl_secs.map(|ttl| created.plus(Duration::from_secs(ttl)));
    let token = ApiToken { id: KeyId::random(), name, limits, created, expires };
    caller.notes("api-key.create", token.id);
    let answer = TokenAnswer { id: token.id.to_string(), token: text, expires_at: expires.map(time) };
    shared.db(move |store| store.add_api_token(&hash, id, &token)).await?;
    Ok((StatusCode::CREATED, Json(answer)))
}

#[derive(Serialize, ToSchema)]
struct TokenView {
    id: String,
    name: String,
    created: String,
    expires_at: Option<String>,
    /// Only for these projects; none: any.
    projects: Option<Vec<String>>,
    /// Only for this; none: all that its account may.
    #[schema(value_type = Option<Vec<String>>)]
    verbs: Option<BTreeSet<Verb>>,
}

#[derive(Serialize, ToSchema)]
struct Tokens {
    tokens: Vec<TokenView>,
}

/// Lists an account's API keys and log-ins, without the tokens themselves.
#[utoipa::path(get, path = "/accounts/{id}/tokens", tag = "accounts", params(("id" = String, Path)),
    responses((status = 200, body = Tokens), (status = "default", body = Problem)))]
async fn tokens(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
) -> Answer<Json<Tokens>> {
    caller.require_self(id)?;
    let tokens = shared.db(move |store| store.api_tokens(id)).await?;
    let view = |token: ApiToken| {
        let (projects, verbs) = match token.limits {
            None => (None, None),
            Some(KeyLimits { projects, verbs }) => {
                (projects.map(|ids| ids.iter().map(ProjectId::to_string).collect()), Some(verbs))
            }
        };
        TokenView {
            id: token.id.to_string(),
            name: token.name,
            created: time(token.created),
            expires_at: token.expires.map(time),
            projects,
            verbs,
        }
    };
    Ok(Json(Tokens { tokens: tokens.into_iter().map(view).collect() }))
}

/// Ends an API token, and what was opened under it, at every host.
#[utoipa::path(delete, path = "/accounts/{id}/tokens/{token}", tag = "accounts",
    params(("id" = String, Path), ("token" = String, Path), Wait),
    responses((status = 204), (status = 200, description = "With `wait`", body = Ended),
        (status = "default", body = Problem)))]
async fn remove_token(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, token): Ids<AccountId, KeyId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Response> {
    caller.require_self(id)?;
    let now = shared.now();
    shared.db(move |store| store.remove_api_token(id, token, now)).await?;
    let targets = shared.announce_account(id).await?;
    wait.answer(&shared, caller.change("api-key.revoke", token), targets).await
}

#[derive(Serialize, ToSchema)]
struct Revoked {
    #[serde(flatten)]
    account: AccountView,
    /// Where it is in force; with `wait`, when it is so everywhere.
    receipt: Option<Receipt>,
}

/// Signs the account out everywhere.
#[utoipa::path(post, path = "/accounts/{id}/sign-out", tag = "accounts", params(("id" = String, Path), Wait),
    responses((status = 200, body = Revoked), (status = "default", body = Problem)))]
async fn sign_out(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Json<Revoked>> {
    caller.require_self(id)?;
    let account = shared.db(move |store| store.sign_out(id)).await?;
    let targets = shared.announce_account(id).await?;
    let receipt = wait.receipt(&shared, caller.change("account.sign-out", id), targets).await?;
    Ok(Json(Revoked { account: account.into(), receipt }))
}

/// Bans an account. Administrators.
#[utoipa::path(post, path = "/accounts/{id}/ban", tag = "accounts", params(("id" = String, Path), Wait),
    responses((status = 200, body = Revoked), (status = "default", body = Problem)))]
async fn ban(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Json<Revoked>> {
    set_ban(&shared, &caller, id, true, &wait).await
}

/// Lifts a ban. Administrators.
#[utoipa::path(post, path = "/accounts/{id}/unban", tag = "accounts", params(("id" = String, Path), Wait),
    responses((status = 200, body = Revoked), (status = "default", body = Problem)))]
async fn unban(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Json<Revoked>> {
    set_ban(&shared, &caller, id, false, &wait).await
}

async fn set_ban(
    shared: &Shared,
    caller: &Caller,
    id: AccountId,
    banned: bool,
    wait: &Wait,
) -> Answer<Json<Revoked>> {
    caller.require_admin()?;
    if banned && caller.id == id {
        return Err(Problem::conflict("own_account", "an administrator cannot ban themselves"));
    }
    let account = shared.db(move |store| store.ban(id, banned)).await?;
    let targets = shared.announce_account(id).await?;
    let change = caller.change(if banned { "account.ban" } else { "account.unban" }, id);
    let receipt = wait.receipt(shared, change, targets).await?;
    Ok(Json(Revoked { account: account.into(), receipt }))
}
