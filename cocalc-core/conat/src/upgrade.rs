//! The upgrade of an HTTP request to the bus, for whoever owns the listener.
//!
//! [`check`] says whether a request may become a connection; the answer goes
//! out as `101` with [`Upgrade::headers`], and the stream behind it goes to
//! [`Broker::accept`](crate::Broker::accept).

use std::{fmt, net::SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use tungstenite::handshake::derive_accept_key;

use crate::broker::Handshake;

/// From which origins browsers may connect. Programs send no origin, and are
/// not bound by this.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum OriginPolicy {
    /// From pages of the host that is connected to.
    #[default]
    SameHost,
    /// From these, as `https://example.org`, and from the same host.
    List(Vec<String>),
    /// From anywhere: only where no cookie identifies anybody.
    Any,
}

impl OriginPolicy {
    fn permits(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else { return true };
        let Ok(origin) = origin.to_str() else { return false };
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let own = origin.split_once("://").is_some_and(|(_, authority)| Some(authority) == host);
        match self {
            Self::Any => true,
            Self::SameHost => own,
            Self::List(origins) => own || origins.iter().any(|permitted| permitted == origin),
        }
    }
}

/// A request that may become a connection.
#[derive(Debug)]
pub struct Upgrade {
    /// What the broker has to know of it. Without the peer's address, which
    /// is set with [`with_peer`](Self::with_peer).
    pub handshake: Handshake,
    accept: HeaderValue,
}

impl Upgrade {
    /// Notes the other end.
    pub fn with_peer(mut self, peer: SocketAddr) -> Self {
        self.handshake.peer = Some(peer);
        self
    }

    /// The headers of the `101` answer.
    pub fn headers(&self) -> [(HeaderName, HeaderValue); 3] {
        [
            (header::CONNECTION, HeaderValue::from_static("Upgrade")),
            (header::UPGRADE, HeaderValue::from_static("websocket")),
            (header::SEC_WEBSOCKET_ACCEPT, self.accept.clone()),
        ]
    }
}

/// Why a request cannot become a connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refused {
    /// The status to answer with.
    pub status: StatusCode,
    /// The body to answer with, in JSON.
    pub body: &'static str,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the request cannot be upgraded: {}", self.body)
    }
}

impl std::error::Error for Refused {}

/// Checks whether a request may become a connection of the bus. The path is
/// the caller's matter.
///
/// # Errors
///
/// Requests that aren't such an upgrade, or come from a page that may not.
pub fn check(
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    origins: &OriginPolicy,
) -> Result<Upgrade, Refused> {
    let bad = |body| Refused { status: StatusCode::BAD_REQUEST, body };
    let query = |name: &str| {
        let query = uri.query().unwrap_or_default();
        query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    };
    if method != Method::GET {
        return Err(bad(r#"{"code":2,"message":"Bad handshake method"}"#));
    }
    if query("transport") != Some("websocket") {
        return Err(bad(r#"{"code":0,"message":"Transport unknown"}"#));
    }
    if query("EIO") != Some("4") {
        return Err(bad(r#"{"code":5,"message":"Unsupported protocol version"}"#));
    }
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let has = |name: HeaderName, wanted: &str| {
        text(name).is_some_and(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(wanted)))
    };
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let (true, true, Some("13"), Some(key)) = (
        has(header::CONNECTION, "upgrade"),
        has(header::UPGRADE, "websocket"),
        text(header::SEC_WEBSOCKET_VERSION),
        // Sixteen bytes in base64.
        key.filter(|key| key.len() == 24),
    ) else {
        return Err(bad(r#"{"code":3,"message":"Bad request"}"#));
    };
    if !origins.permits(headers) {
        return Err(Refused { status: StatusCode::FORBIDDEN, body: r#"{"code":4,"message":"Forbidden"}"# });
    }
    let accept = derive_accept_key(key.as_bytes());
    let bearer = text(header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
    });
    Ok(Upgrade {
        handshake: Handshake {
            bearer,
            cookie: text(header::COOKIE).map(str::to_owned),
            origin: text(header::ORIGIN).map(str::to_owned),
            peer: None,
        },
        // Base64 is always a legal header value.
        accept: HeaderValue::try_from(accept).map_err(|_| bad("{}"))?,
    })
}
