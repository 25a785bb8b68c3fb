//! Where a client connects.

use std::{fmt, str::FromStr};

use http::Uri;

/// A URL of a bus.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) uri: Uri,
}

/// A URL that names no bus.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// It is not a URL.
    #[error("not a URL")]
    Malformed,
    /// The scheme is none of `ws`, `http`, `wss`, `https`.
    #[error("the scheme must be ws, http, wss or https")]
    Scheme,
    /// It needs TLS, and nothing that dials with it was given.
    #[error("wss needs a dialer that speaks TLS")]
    Tls,
}

impl Target {
    pub(super) fn parse(url: &str, may_use_tls: bool) -> Result<Self, UrlError> {
        let uri = Uri::from_str(url).map_err(|_| UrlError::Malformed)?;
        let (scheme, default_port) = match uri.scheme_str() {
            Some("ws" | "http") => ("ws", 80),
            Some("wss" | "https") if may_use_tls => ("wss", 443),
            Some("wss" | "https") => return Err(UrlError::Tls),
            _ => return Err(UrlError::Scheme),
        };
        let authority = uri.authority().ok_or(UrlError::Malformed)?;
        // An address in brackets is dialed without them.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(default_port);
        let base = uri.path().trim_end_matches('/');
        let path = if base.ends_with("/conat") { base.to_owned() } else { format!("{base}/conat") };
        let uri = Uri::builder()
            .scheme(scheme)
            .authority(authority.clone())
            .path_and_query(format!("{path}/?EIO=4&transport=websocket"))
            .build()
            .map_err(|_| UrlError::Malformed)?;
        Ok(Self { host, port, uri })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}{}", self.host, self.port, self.uri.path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_completed() {
        for (url, path) in [
            ("ws://a:1", "/conat/"),
            ("http://a:1/", "/conat/"),
            ("ws://a:1/base", "/base/conat/"),
            ("ws://a:1/base/conat/", "/base/conat/"),
            ("ws://a:1/base/conat", "/base/conat/"),
        ] {
            let target = Target::parse(url, false).unwrap();
            assert_eq!(target.uri.path(), path, "{url}");
            assert_eq!(target.uri.query(), Some("EIO=4&transport=websocket"));
        }
        assert_eq!(Target::parse("ws://[::1]:5", false).unwrap().host, "::1");
        assert_eq!(Target::parse("ws://a", false).unwrap().port, 80);
        assert_eq!(Target::parse("wss://a", true).unwrap().port, 443);
        assert_eq!(Target::parse("wss://a", false).unwrap_err(), UrlError::Tls);
        assert_eq!(Target::parse("ftp://a", false).unwrap_err(), UrlError::Scheme);
        assert!(Target::parse("not a url", false).is_err());
    }
}
