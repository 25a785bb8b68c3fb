//! Local accounts: a name, a password, and a token that stands for both.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use axum::{Extension, Json, extract::State, response::Response};
use cocalc_ids::{AccountId, KeyId};
use cocalc_sqlite::master::ApiToken;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id, NAME_CHARS_MAX, clean_name, composed},
    problem::{Answer, Problem},
    receipts::{Ended, Wait},
    trail::Trail,
    view::time,
};
use crate::{limits::Source, secret, shared::Shared};

/// How long a log-in lasts.
const LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Passwords are hashed two at a time: each takes 19 MiB, and a core.
static HASHING: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(2)));
/// How long somebody waits for their turn.
const TURN_LIMIT: Duration = Duration::from_secs(10);
/// What could become a login in composed form is not longer.
const LOGIN_BYTES_MAX: usize = 16 * NAME_CHARS_MAX;
const PASSWORD_BYTES: std::ops::RangeInclusive<usize> = 8..=1024;

/// Without a bearer token: the password is the credential.
pub(super) fn open_routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(login))
}

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(set_password)).routes(routes!(logout))
}

/// Hashes or verifies, where it may take its time.
async fn work<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
    let busy = || Problem::unavailable("busy", "too many people log in at this moment");
    let turn = tokio::time::timeout(TURN_LIMIT, HASHING.clone().acquire_owned()).await;
    let turn = turn.map_err(|_| busy())?.map_err(|_| busy())?;
    let done = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(turn);
        done
    });
    done.await.map_err(|error| Problem::internal(&error))
}

fn hash(password: &str) -> Result<String, argon2::password_hash::Error> {
    let hash: PasswordHash = Argon2::default().hash_password(password.as_bytes())?;
    Ok(hash.to_string())
}

fn verifies(password: &str, hash: &str) -> bool {
    let parsed = PasswordHash::new(hash);
    parsed.is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok())
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewPassword {
    /// The name to log in with; 1 to 100 characters.
    login: String,
    /// 8 to 1024 bytes.
    password: String,
    /// The password of before, if there is one; administrators need not know
    /// it.
    current: Option<String>,
}

/// Sets the name and password with which an account logs in.
#[utoipa::path(put, path = "/accounts/{id}/password", tag = "accounts", params(("id" = String, Path)),
    request_body = NewPassword,
    responses((status = 204), (status = "default", body = Problem)))]
async fn set_password(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<AccountId>,
    Body(new): Body<NewPassword>,
) -> Answer<StatusCode> {
    caller.require_self(id)?;
    let login = clean_name(&new.login)?;
    if !PASSWORD_BYTES.contains(&new.password.len()) {
        return Err(Problem::invalid("password: 8 to 1024 bytes"));
    }
    let before = shared.db(move |store| store.password_of(id)).await?;
    if let (Some(before), false) = (before, caller.admin) {
        shared.limits.login(Some(id), "", shared.clock.boot())?;
        let current = new.current.unwrap_or_default();
        if !work(move || verifies(&current, &before)).await? {
            return Err(Problem::invalid("current: not the password of before"));
        }
    }
    let password = new.password;
    let hash = work(move || hash(&password)).await?.map_err(|error| Problem::internal(&error))?;
    let now = shared.now();
    shared.db(move |store| store.set_password(id, &login, &hash, now)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Login {
    login: String,
    password: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct LoggedIn {
    account_id: String,
    /// A bearer token; shown this once. It ends when the account signs out.
    pub(super) token: String,
    expires_at: String,
}

/// Logs in with a name and a password.
#[utoipa::path(post, path = "/login", tag = "accounts",
    request_body = Login,
    responses((status = 201, body = LoggedIn), (status = "default", body = Problem)))]
async fn login(
    State(shared): State<Arc<Shared>>,
    source: Option<Extension<Source>>,
    trail: Option<Extension<Trail>>,
    Body(asked): Body<Login>,
) -> Answer<(StatusCode, Json<LoggedIn>)> {
    let refused = || Problem::new(StatusCode::UNAUTHORIZED, "unauthenticated", "wrong name or password");
    // What nobody can have costs nothing, and is remembered by nobody.
    if asked.password.len() > *PASSWORD_BYTES.end() || asked.login.len() > LOGIN_BYTES_MAX {
        return Err(refused());
    }
    let login = composed(&asked.login);
    if login.chars().count() > NAME_CHARS_MAX {
        return Err(refused());
    }
    let name = login.clone();
    let found = shared.db(move |store| store.password(&name)).await?;
    // By name as well as by address, so that neither many addresses nor many
    // names give more tries.
    let account = found.as_ref().map(|(account, _)| account.id);
    shared.limits.login(account, &login, shared.clock.boot())?;
    let (account, expected) = match found {
        Some((account, hash)) => (Some(account), hash),
        // The same work for a name that nobody has.
        None => (None, nobody().await?),
    };
    let right = work(move || verifies(&asked.password, &expected)).await?;
    let account = match account {
        Some(account) if right && !account.banned => account,
        _ => {
            tracing::info!(source = ?source.map(|Extension(Source(source))| source), "a log-in was refused");
            return Err(refused());
        }
    };
    if let Some(Extension(trail)) = trail {
        trail.is(account.id, None);
    }
    Ok((StatusCode::CREATED, Json(log_in(&shared, account).await?)))
}

/// A token for an account that has shown who it is.
pub(super) async fn log_in(shared: &Shared, account: cocalc_sqlite::master::Account) -> Answer<LoggedIn> {
    let token = secret::generate("cct_").map_err(|error| Problem::internal(&error))?;
    let (hash, created) = (secret::hash(&token), shared.now());
    let expires = created.plus(LIFE);
    let row = ApiToken {
        id: KeyId::random(),
        name: "log-in".to_owned(),
        limits: None,
        created,
        expires: Some(expires),
    };
    let id = account.id;
    shared.db(move |store| store.add_login(&hash, &account, &row)).await?;
    Ok(LoggedIn { account_id: id.to_string(), token, expires_at: time(expires) })
}

/// The hash of a password that nobody has.
async fn nobody() -> Answer<String> {
    static HASH: tokio::sync::OnceCell<String> = tokio::sync::OnceCell::const_new();
    let make = || async {
        let text = secret::generate("").map_err(|error| Problem::internal(&error))?;
        work(move || hash(&text)).await?.map_err(|error| Problem::internal(&error))
    };
    HASH.get_or_try_init(make).await.cloned()
}

/// Ends the token that the call is made with, and what was opened under it, at
/// every host: browser sessions, and connections by connect tokens. Who calls
/// again, because the answer was lost, is told 401: it has ended.
#[utoipa::path(post, path = "/logout", tag = "accounts", params(Wait),
    responses((status = 204), (status = 200, description = "With `wait`", body = Ended),
        (status = "default", body = Problem)))]
async fn logout(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(wait): Asked<Wait>,
) -> Answer<Response> {
    let (account, Some(key)) = (caller.id, caller.key) else {
        return Err(Problem::conflict(
            "not_here",
            "this token is not the master's own: end it where it is from",
        ));
    };
    let now = shared.now();
    shared.db(move |store| store.remove_api_token(account, key, now)).await?;
    let targets = shared.announce_account(account).await?;
    wait.answer(&shared, caller.change("account.log-out", key), targets).await
}
