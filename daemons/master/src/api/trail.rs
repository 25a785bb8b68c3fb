//! The master's own audit log: who changed what, and who was refused.
//!
//! Every call that changes something is a line, and every refusal; of reading
//! with an API key, and of minted tokens, a sample. Bodies are never written,
//! so that no secret is; where a path does not say what was changed, handlers
//! say it in the words of a receipt.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use cocalc_auth::audit::{Event, shortened};
use cocalc_ids::{AccountId, KeyId};
use http::{Method, StatusCode};

use super::problem::{Code, Problem};
use crate::{limits::Source, shared::Shared};

/// One in so many allowed calls that change nothing is a line.
const ALLOWED_SAMPLE: u64 = 64;

/// What becomes known of a call while it is answered. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trail(Arc<Mutex<Known>>);

#[derive(Clone, Debug, Default)]
struct Known {
    account: Option<AccountId>,
    key: Option<KeyId>,
    subject: Option<String>,
    refused: Option<&'static str>,
    revealed: bool,
}

impl Trail {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who calls, proved.
    pub(crate) fn is(&self, account: AccountId, key: Option<KeyId>) {
        let mut known = self.lock();
        (known.account, known.key) = (Some(account), key);
    }

    /// That the call is refused with this code, where the answer's status does
    /// not tell: a redirect, for one.
    pub(crate) fn refuses(&self, code: &'static str) {
        self.lock().refused = Some(code);
    }

    /// What is changed, and on what; never a secret, nor a tenant's text.
    pub(crate) fn changes(&self, what: &str, subject: impl ToString) {
        self.lock().subject = Some(format!("{what} {}", subject.to_string()));
    }
}

impl Trail {
    /// That a secret is told, which is a line though nothing is changed.
    pub(crate) fn reveals(&self, what: &str, subject: impl ToString) {
        self.changes(what, subject);
        self.lock().revealed = true;
    }
}

/// Writes down how a call ended.
pub(crate) async fn record(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let trail = Trail::default();
    request.extensions_mut().insert(trail.clone());
    let source = request.extensions().get::<Source>().map(|Source(source)| *source);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if method.is_safe() && !path.starts_with("/auth/oidc/") {
        let response = next.run(request).await;
        write(&shared, &trail, &method, path, source, &response);
        return response;
    }
    // On a task of its own: a client that goes away in the middle of a change
    // must not leave it without its line, nor half announced.
    let work = tokio::spawn(async move {
        let response = next.run(request).await;
        write(&shared, &trail, &method, path, source, &response);
        response
    });
    work.await.unwrap_or_else(|error| Problem::internal(&error).into_response())
}

fn write(
    shared: &Shared,
    trail: &Trail,
    method: &Method,
    path: String,
    source: Option<IpAddr>,
    response: &Response,
) {
    static ALLOWED: AtomicU64 = AtomicU64::new(0);
    let known = trail.lock().clone();
    let kind = kind(method, &path, response.status(), known.account.is_some(), || {
        ALLOWED.fetch_add(1, Ordering::Relaxed).is_multiple_of(ALLOWED_SAMPLE)
    });
    let kind = match (known.refused, known.revealed && response.status().is_success()) {
        (Some(_), _) => Some("deny"),
        (None, true) => Some("reveal"),
        (None, false) => kind,
    };
    if let Some(kind) = kind {
        let code = response.extensions().get::<Code>().map(|Code(code)| *code);
        let code = known.refused.or(code).unwrap_or("");
        shared.audit.record(event(shared, kind, method, path, source, known, response.status(), code));
    }
}

/// What kind of line a call is, if it is one.
fn kind(
    method: &Method,
    path: &str,
    status: StatusCode,
    proved: bool,
    sampled: impl FnOnce() -> bool,
) -> Option<&'static str> {
    let changing = matches!(*method, Method::POST | Method::PUT | Method::PATCH | Method::DELETE);
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Some("deny"),
        // To whom is no member, it does not exist.
        StatusCode::NOT_FOUND if proved => Some("deny"),
        StatusCode::NOT_FOUND => None,
        status if changing && matches!(path, "/login" | "/login/oidc") => {
            Some(if status.is_success() { "login" } else { "fail" })
        }
        // A browser that comes back from its provider.
        status if proved && path.starts_with("/auth/oidc/") && !status.is_client_error() => Some("login"),
        status if status.is_success() && changing && !path.ends_with("/connect") => Some("change"),
        status if status.is_success() => (proved && sampled()).then_some("allow"),
        _ if changing => Some("fail"),
        _ => None,
    }
}

#[expect(clippy::too_many_arguments, reason = "they are the columns of a line")]
fn event(
    shared: &Shared,
    kind: &str,
    method: &Method,
    path: String,
    source: Option<IpAddr>,
    known: Known,
    status: StatusCode,
    code: &str,
) -> Event {
    let reason = format!("{} {code}", status.as_u16());
    let mut event = Event::new(kind, reason.trim_end(), shared.now());
    let mut parts = path.split('/').skip(1);
    if parts.next() == Some("projects") {
        event.project = parts.next().and_then(|id| id.parse().ok());
    }
    event.account = known.account;
    event.key = known.key;
    event.subject = known.subject.map(shortened);
    event.source = source.map(|source| source.to_string());
    event.action = Some(shortened(format!("{method} {path}")));
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_and_refusals_are_lines() {
        for (method, path, status, proved, expected) in [
            (Method::POST, "/projects/x/members", 200, true, Some("change")),
            (Method::DELETE, "/projects/x", 202, true, Some("change")),
            (Method::PATCH, "/projects/x", 409, true, Some("fail")),
            (Method::GET, "/projects/x", 200, true, None),
            (Method::POST, "/projects/x/connect", 200, true, None),
            (Method::GET, "/projects/x", 403, true, Some("deny")),
            (Method::GET, "/projects/x", 404, true, Some("deny")),
            (Method::GET, "/projects/x", 401, false, Some("deny")),
            (Method::GET, "/nothing", 404, false, None),
            (Method::GET, "/projects", 500, true, None),
            (Method::POST, "/login", 201, true, Some("login")),
            (Method::POST, "/login", 401, false, Some("deny")),
            (Method::POST, "/login/oidc", 201, true, Some("login")),
            (Method::GET, "/auth/oidc/uni/start", 303, false, None),
            (Method::GET, "/auth/oidc/uni/callback", 303, true, Some("login")),
            (Method::GET, "/auth/oidc/uni/callback", 200, true, Some("login")),
            (Method::GET, "/auth/oidc/uni/callback", 403, false, Some("deny")),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(kind(&method, path, status, proved, || false), expected, "{method} {path} {status}");
        }
        let sampled = |path| kind(&Method::POST, path, StatusCode::OK, true, || true);
        assert_eq!((sampled("/projects/x/connect"), sampled("/projects")), (Some("allow"), Some("change")));
    }
}
