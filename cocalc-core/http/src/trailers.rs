//! Fields that follow a body (RFC 9110, 6.5).
//!
//! What was decided by a message's head must not be changed by what comes after
//! its body, and some servers merge the two: whatever frames, routes, controls
//! or authenticates a message is dropped from its trailers. Over HTTP/1.1 only
//! what the head announced in `Trailer` can be sent on, and only a client that
//! has said `TE: trailers` gets any.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::headers::{has_option, is_forwarding, is_ours};

/// Fields that have no place behind a body: framing and hops (RFC 9110, 7.6.1),
/// routing, request modifiers, authentication, response control, and the format
/// of the content (6.5.1).
const FORBIDDEN: [&str; 40] = [
    "age",
    "alt-svc",
    "authentication-info",
    "authorization",
    "cache-control",
    "clear-site-data",
    "connection",
    "cookie",
    "cookie2",
    "date",
    "expect",
    "expires",
    "host",
    "http2-settings",
    "keep-alive",
    "location",
    "max-forwards",
    "origin",
    "pragma",
    "prefer",
    "priority",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "referer",
    "refresh",
    "retry-after",
    "set-cookie",
    "set-cookie2",
    "strict-transport-security",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "vary",
    "warning",
    "www-authenticate",
    "x-frame-options",
];

/// Whole families of the same kinds.
const FORBIDDEN_PREFIXES: [&str; 5] = ["accept", "access-control-", "content-", "if-", "sec-"];

/// Whether a field may follow a body.
fn is_permitted(name: &str) -> bool {
    // Servers that turn fields into variables see no difference.
    let dashed = name.replace('_', "-");
    !(FORBIDDEN.contains(&&*dashed)
        || FORBIDDEN_PREFIXES.iter().any(|prefix| dashed.starts_with(prefix))
        || is_forwarding(&dashed)
        || is_ours(&dashed))
}

/// Removes what may not follow a body.
pub(crate) fn filter(trailers: &mut HeaderMap) {
    let forbidden: Vec<HeaderName> =
        trailers.keys().filter(|name| !is_permitted(name.as_str())).cloned().collect();
    for name in forbidden {
        trailers.remove(name);
    }
}

/// The names that a message announces and that may pass, as one field.
pub(crate) fn announced(headers: &HeaderMap) -> Option<HeaderValue> {
    let fields = headers.get_all(header::TRAILER).iter().filter_map(|value| value.to_str().ok());
    let names = fields.flat_map(|value| value.split(',')).filter_map(|name| {
        let name: HeaderName = name.trim().parse().ok()?;
        is_permitted(name.as_str()).then_some(name)
    });
    let names: Vec<HeaderName> = names.collect();
    if names.is_empty() {
        return None;
    }
    let names: Vec<&str> = names.iter().map(HeaderName::as_str).collect();
    HeaderValue::try_from(names.join(", ")).ok()
}

/// Whether whoever asks can take trailers.
pub(crate) fn are_accepted(headers: &HeaderMap) -> bool {
    has_option(headers, &header::TE, "trailers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_head_decides_follows_a_body() {
        let mut trailers = HeaderMap::new();
        for name in [
            "grpc-status",
            "digest",
            "server-timing",
            "etag",
            "x-checksum",
            "content-length",
            "content_length",
            "transfer-encoding",
            "host",
            "set-cookie",
            "authorization",
            "cocalc-code",
            "x-forwarded-for",
            "x_forwarded_for",
            "connection",
            "sec-websocket-key",
            "access-control-allow-origin",
            "if-match",
            "trailer",
        ] {
            trailers.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        filter(&mut trailers);
        let mut kept: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["digest", "etag", "grpc-status", "server-timing", "x-checksum"]);
    }

    #[test]
    fn what_is_announced_is_what_may_pass() {
        let mut headers = HeaderMap::new();
        assert_eq!(announced(&headers), None);
        headers.append(header::TRAILER, HeaderValue::from_static("Set-Cookie, X-Sum"));
        headers.append(header::TRAILER, HeaderValue::from_static("bad name,, Digest"));
        assert_eq!(announced(&headers).unwrap(), "x-sum, digest");
        headers.insert(header::TRAILER, HeaderValue::from_static("Content-Length"));
        assert_eq!(announced(&headers), None);
        headers.insert(header::TE, HeaderValue::from_static("gzip, Trailers"));
        assert!(are_accepted(&headers));
    }

    #[test]
    fn names_are_sorted_and_lower_case() {
        assert!(FORBIDDEN.is_sorted());
        assert!(FORBIDDEN.iter().chain(&FORBIDDEN_PREFIXES).all(|name| *name == name.to_ascii_lowercase()));
    }
}
