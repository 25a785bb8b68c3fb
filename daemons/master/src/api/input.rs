//! What requests carry, and how it is refused.

use std::str::FromStr;

use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use http::{StatusCode, request::Parts};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::{BODY_BYTES_MAX, problem::Problem};

/// A JSON body; an empty one is `{}`.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let bytes = http_body_util::Limited::new(request.into_body(), BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|_| Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is too large"))?
            .to_bytes();
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text).map(Self).map_err(|error| Problem::invalid(error.to_string()))
    }
}

/// The query.
pub(crate) struct Asked<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(query)) => Ok(Self(query)),
            Err(error) => Err(Problem::invalid(error.body_text())),
        }
    }
}

/// The id in the path. What is no id names nothing.
pub(crate) struct Id<T>(pub(crate) T);

impl<T: FromStr, S: Send + Sync> FromRequestParts<S> for Id<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.ok().and_then(|Path(id)| id.parse().ok()).map(Self).ok_or_else(|| Problem::not_found("thing"))
    }
}

/// Two of them.
pub(crate) struct Ids<T, U>(pub(crate) T, pub(crate) U);

impl<T: FromStr, U: FromStr, S: Send + Sync> FromRequestParts<S> for Ids<T, U> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<(String, String)>::from_request_parts(parts, state).await;
        path.ok()
            .and_then(|Path((first, second))| Some(Self(first.parse().ok()?, second.parse().ok()?)))
            .ok_or_else(|| Problem::not_found("thing"))
    }
}

/// A name that people give, for people: no control characters, no limits on
/// script.
pub(crate) fn check_name(name: &str) -> Result<(), Problem> {
    let length = name.chars().count();
    if (1..=100).contains(&length) && name.trim() == name && !name.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(Problem::invalid("name: 1 to 100 characters, none of control, no space around it"))
    }
}
