//! Who calls, and calls that may be repeated.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use cocalc_ids::{AccountId, Action, KeyId, ProjectId};
use cocalc_sqlite::master::{Bearer, KeyLimits, Project, Remembered, Store};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts};
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};

use super::{
    input::{harmless_name, whole},
    problem::{Answer, Problem},
    scope,
    trail::Trail,
};
use crate::{accounts::Accounts, secret, shared::Shared};

/// The account that a request speaks for.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) id: AccountId,
    /// Whether it administers the federation; a scoped API key never does.
    pub(crate) admin: bool,
    /// Which of the master's tokens it is; none if somebody else vouches.
    pub(crate) key: Option<KeyId>,
    /// What its API key is limited to.
    limits: Option<Arc<KeyLimits>>,
    /// From account and idempotency key, or random: ids of what the call makes
    /// follow from it, so that a repeated call makes nothing twice.
    seed: [u8; 32],
    /// What the audit log says of the call.
    trail: Trail,
}

impl Caller {
    /// Fails unless the account administers the federation.
    pub(crate) fn require_admin(&self) -> Answer<()> {
        if self.admin { Ok(()) } else { Err(Problem::denied()) }
    }

    /// Fails unless this is the caller's own account, or it is an
    /// administrator's; others learn nothing of the account.
    pub(crate) fn require_self(&self, account: AccountId) -> Answer<()> {
        if self.admin || self.id == account { Ok(()) } else { Err(Problem::not_found("account")) }
    }

    /// Whether its API key is good for this project.
    pub(crate) fn covers(&self, project: ProjectId) -> bool {
        self.limits.as_ref().is_none_or(|limits| scope::covers(limits, project))
    }

    /// Says in the audit log what is changed, where the path does not.
    pub(crate) fn notes(&self, what: &str, subject: impl ToString) {
        self.trail.changes(what, subject);
    }

    /// Says in the audit log that a secret is told, though nothing is changed.
    pub(crate) fn reveals(&self, what: &str, subject: impl ToString) {
        self.trail.reveals(what, subject);
    }

    /// The id of the `what` that this call makes.
    pub(crate) fn new_id(&self, what: &str) -> [u8; 16] {
        let digest = Sha256::new().chain_update(self.seed).chain_update(what).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        id
    }

    /// The project, if the caller may do `action` to it. To whom is no member
    /// it does not exist.
    pub(crate) async fn project(
        &self,
        shared: &Shared,
        id: ProjectId,
        action: Option<Action>,
    ) -> Answer<Project> {
        if !self.covers(id) {
            return Err(Problem::not_found("project"));
        }
        let (account, admin) = (self.id, self.admin);
        let found = shared.db(move |store| Ok((store.project(id)?, store.role(id, account)?))).await;
        let (project, role) = found?;
        if admin {
            return Ok(project);
        }
        match (role, action) {
            (None, _) => Err(Problem::not_found("project")),
            (Some(role), Some(action)) if !role.permits(action) => Err(Problem::denied()),
            _ => Ok(project),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // Put there by `authenticate`; a route outside it has no caller.
        parts.extensions.get::<Self>().cloned().ok_or_else(Problem::unauthenticated)
    }
}

/// Who the bearer token speaks for. With a scoped key nobody is an administrator.
pub(crate) async fn bearer(shared: &Shared, headers: &HeaderMap) -> Answer<Bearer> {
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim())
        .ok_or_else(Problem::unauthenticated)?;
    let now = shared.now();
    let mut bearer = match &shared.accounts {
        Some(accounts) if !token.starts_with("cct_") => vouched(shared, &**accounts, token).await?,
        _ => {
            let hash = secret::hash(token);
            shared.db(move |store| store.bearer(&hash, now)).await?
        }
    };
    bearer.account.admin &= bearer.limits.is_none();
    if bearer.account.banned {
        return Err(Problem::denied());
    }
    shared.limits.account(bearer.account.id, shared.clock.boot())?;
    Ok(bearer)
}

/// How long an integrator's accounts may take to answer.
const VOUCH_LIMIT: Duration = Duration::from_secs(2);

/// Whom an integrator's accounts vouch for. They administer nothing.
async fn vouched(shared: &Shared, accounts: &dyn Accounts, token: &str) -> Answer<Bearer> {
    let unavailable = || Problem::unavailable("accounts_unavailable", "who this is cannot be found out now");
    let person = match tokio::time::timeout(VOUCH_LIMIT, accounts.bearer(token)).await {
        Ok(Ok(person)) => person.ok_or_else(Problem::unauthenticated)?,
        Ok(Err(error)) => {
            tracing::error!(error = %cocalc_core::chain(&*error), "the accounts failed");
            return Err(unavailable());
        }
        Err(_) => return Err(unavailable()),
    };
    let (provider, id, now) = (accounts.provider().to_owned(), AccountId::random(), shared.now());
    let name = harmless_name(&person.name);
    let find =
        move |store: &Store| store.account_of_identity(&provider, &person.subject, Some((id, &name)), now);
    let mut account = shared.db(find).await?;
    account.admin = false;
    Ok(Bearer { account, key: None, limits: None })
}

/// Requires a bearer token, and answers a repeated call as the first time.
pub(crate) async fn authenticate(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    match answer(&shared, request, next).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

async fn answer(shared: &Arc<Shared>, mut request: Request, next: Next) -> Answer<Response> {
    let Bearer { account, limits, key: token } = bearer(shared, request.headers()).await?;
    let trail = request.extensions().get::<Trail>().cloned().unwrap_or_default();
    trail.is(account.id, token);
    if let Some(limits) = &limits {
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str).unwrap_or_default();
        scope::check(limits, request.method(), route, request.uri().path())?;
    }
    let changing = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH | Method::DELETE);
    let key = match request.headers().get("idempotency-key") {
        Some(key) if changing => Some(parse_key(key)?),
        _ => None,
    };
    let mut seed = [0; 32];
    match &key {
        Some(key) => {
            let digest = Sha256::new().chain_update(account.id.as_bytes()).chain_update(key).finalize();
            seed.copy_from_slice(&digest);
        }
        None => getrandom::fill(&mut seed).map_err(|error| Problem::internal(&error))?,
    }
    request.extensions_mut().insert(Caller {
        id: account.id,
        admin: account.admin,
        key: token,
        limits: limits.map(Arc::new),
        seed,
        trail,
    });
    match key {
        // Answers with a secret are not kept: only its hash is, anywhere. Such
        // a call makes another secret when it is repeated, which harms nobody.
        Some(key) if !answers_secret(request.uri().path()) => {
            once(shared, account.id, key, request, next).await
        }
        _ => Ok(next.run(request).await),
    }
}

fn parse_key(key: &HeaderValue) -> Answer<String> {
    match key.to_str() {
        Ok(key) if (1..=200).contains(&key.len()) => Ok(key.to_owned()),
        _ => Err(Problem::invalid("Idempotency-Key: 1 to 200 visible characters")),
    }
}

fn answers_secret(path: &str) -> bool {
    ["/tokens", "/join-tokens", "/connect", "/rotate-key", "/login"].iter().any(|end| path.ends_with(end))
}

async fn once(
    shared: &Arc<Shared>,
    account: AccountId,
    key: String,
    request: Request,
    next: Next,
) -> Answer<Response> {
    let (parts, body) = request.into_parts();
    let body = whole(body).await?;
    let fingerprint: [u8; 32] = Sha256::new()
        .chain_update(parts.method.as_str())
        .chain_update([0])
        .chain_update(parts.uri.to_string())
        .chain_update([0])
        .chain_update(&body)
        .finalize()
        .into();
    let (now, name) = (shared.now(), key.clone());
    let sought = key.clone();
    match shared.db(move |store| store.recall(account, &sought, &fingerprint, now)).await? {
        Remembered::New => {}
        Remembered::Answered { status, body } => return Ok(replay(status, body)),
        Remembered::UnderWay => {
            return Err(Problem::conflict("call_under_way", "a call with this Idempotency-Key is under way"));
        }
        Remembered::Other => {
            return Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_key_reused",
                "this Idempotency-Key was used for another call",
            ));
        }
    }
    // On a task of its own: a client that goes away must not leave the call
    // marked as under way.
    let task = shared.clone();
    let work = tokio::spawn(async move {
        let response = next.run(Request::from_parts(parts, Body::from(body))).await;
        let (parts, body) = response.into_parts();
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return Err(Problem::internal(&error)),
        };
        let (status, kept) = (parts.status.as_u16(), body.to_vec());
        // What may turn out otherwise next time is not remembered.
        let settled = parts.status.is_success();
        let recorded = task.db(move |store| match settled {
            true => store.remember(account, &key, status, &kept),
            false => store.forget(account, &key),
        });
        if let Err(error) = recorded.await {
            return Err(error.into());
        }
        Ok(Response::from_parts(parts, Body::from(body)))
    });
    match work.await {
        Ok(answer) => answer,
        Err(error) => {
            // It panicked: a repeated call finds what it made by its name.
            shared.db(move |store| store.forget(account, &name)).await?;
            Err(Problem::internal(&error))
        }
    }
}

fn replay(status: u16, body: Vec<u8>) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}
