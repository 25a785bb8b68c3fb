//! Errors as problem documents (RFC 9457) with a stable `code`.

use std::time::Duration;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use cocalc_ids::OperationId;
use cocalc_sqlite::master::{self as store, ProjectState};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{operations::NewMoveError, signing::ChangeError};

/// What is said of a project that nothing is done to because it may run.
const UNKNOWN: &str = "its host cannot tell now whether the project runs, so it is neither started nor moved nor \
    deleted; `cocalc project why` says why, and what to do";

/// A problem document.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Problem {
    /// The HTTP status again.
    status: u16,
    /// For programs; never changes its meaning.
    code: &'static str,
    /// What the status means.
    title: &'static str,
    /// For people: what is wrong here.
    detail: String,
    /// The operation that is in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    operation_id: Option<OperationId>,
    /// After how many seconds it helps to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_secs: Option<u64>,
}

/// Rides on a response, for who writes down how a call ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Code(pub(crate) &'static str);

/// What a handler returns.
pub(crate) type Answer<T> = Result<T, Problem>;

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status: status.as_u16(),
            code,
            title: status.canonical_reason().unwrap_or("Error"),
            detail: detail.into(),
            operation_id: None,
            retry_after_secs: None,
        }
    }

    pub(crate) fn rate_limited(wait: Duration) -> Self {
        let secs = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        let detail = "too many calls; wait a while";
        let problem = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail);
        Self { retry_after_secs: Some(secs.max(1)), ..problem }
    }

    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", detail)
    }

    pub(crate) fn unauthenticated() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", "a valid bearer token is required")
    }

    pub(crate) fn denied() -> Self {
        Self::new(StatusCode::FORBIDDEN, "access_denied", "this account may not do that")
    }

    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", format!("there is no such {what}"))
    }

    pub(crate) fn conflict(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, detail)
    }

    pub(crate) fn unavailable(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, detail)
    }

    /// The HTTP status.
    pub(crate) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    pub(crate) fn code(&self) -> &'static str {
        self.code
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    /// Something of ours failed: the log says what, the caller learns nothing.
    pub(crate) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = %cocalc_core::chain(error), "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the master could not do it")
    }
}

impl From<store::Error> for Problem {
    fn from(error: store::Error) -> Self {
        let detail = error.to_string();
        match error {
            store::Error::NotFound { what } => Self::not_found(what),
            store::Error::Exists { .. } => Self::conflict("already_exists", detail),
            store::Error::Owner => Self::conflict("owner_stays", detail),
            store::Error::Busy { operation } => {
                Self { operation_id: Some(operation), ..Self::conflict("project_busy", detail) }
            }
            store::Error::NotFenced => {
                Self::conflict("host_not_fenced", format!("{detail}: cocalc host fence"))
            }
            store::Error::WrongState { state: ProjectState::Unknown } => {
                Self::conflict("state_unknown", UNKNOWN)
            }
            store::Error::WrongState { .. } => Self::conflict("wrong_state", detail),
            store::Error::Stale { .. } => Self::conflict("conflict", detail),
            store::Error::TooMany { .. } => Self::conflict("limit_reached", detail),
            store::Error::LastWayIn => Self::conflict("last_way_in", detail),
            store::Error::BadToken => Self::unauthenticated(),
            other => Self::internal(&other),
        }
    }
}

impl From<NewMoveError> for Problem {
    fn from(error: NewMoveError) -> Self {
        match error {
            NewMoveError::Store(error) => error.into(),
            NewMoveError::There => Self::conflict("already_there", error.to_string()),
            NewMoveError::NotConnected => Self::unavailable("host_unavailable", error.to_string()),
            NewMoveError::Storage { .. } => Self::conflict("storage_differs", error.to_string()),
        }
    }
}

impl From<ChangeError> for Problem {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::TooEarly(_) => Self::conflict("too_early", cocalc_core::chain(&error)),
            ChangeError::Failed(_) => Self::internal(&error),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = (status, Json(&self)).into_response();
        response.extensions_mut().insert(Code(self.code));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(secs) = self.retry_after_secs {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
        } else if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        response
    }
}
