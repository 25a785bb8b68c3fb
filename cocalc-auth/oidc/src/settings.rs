//! What a provider and we agreed upon.

use std::fmt;

use openidconnect::url::{Host, Url};

/// A client secret; its `Debug` prints nothing.
#[derive(Clone)]
pub struct Secret(pub(crate) String);

impl Secret {
    /// Takes it as it is, without space around it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a provider and we agreed upon.
#[derive(Clone, Debug)]
pub struct Settings {
    pub(crate) issuer: String,
    pub(crate) client_id: String,
    pub(crate) secret: Option<Secret>,
    pub(crate) redirect: String,
    pub(crate) scopes: Vec<String>,
}

/// A setting makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct SettingsError {
    /// Which.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl Settings {
    /// A client named `client_id` of the provider at `issuer`, which sends
    /// browsers back to `redirect`.
    pub fn new(issuer: impl Into<String>, client_id: impl Into<String>, redirect: impl Into<String>) -> Self {
        Self {
            issuer: issuer.into(),
            client_id: client_id.into(),
            secret: None,
            redirect: redirect.into(),
            scopes: vec!["profile".to_owned(), "email".to_owned()],
        }
    }

    /// What proves to the provider that we are that client. Default: nothing; a
    /// public client, for which PKCE alone stands.
    pub fn secret(mut self, secret: Option<Secret>) -> Self {
        self.secret = secret;
        self
    }

    /// What is asked for beside `openid`. Default: `profile` and `email`.
    pub fn scopes(mut self, scopes: Vec<String>) -> Self {
        self.scopes = scopes;
        self
    }

    /// Whether the provider is on this machine, and may do without TLS.
    pub(crate) fn loopback(&self) -> bool {
        Url::parse(&self.issuer).is_ok_and(|url| url.scheme() == "http" && is_loopback(&url))
    }

    /// Checks them, without asking anybody.
    ///
    /// # Errors
    ///
    /// Which makes no sense, and why.
    pub fn validate(&self) -> Result<(), SettingsError> {
        let wrong = |field, problem: &str| Err(SettingsError { field, problem: problem.to_owned() });
        let Ok(issuer) = Url::parse(&self.issuer) else {
            return wrong("issuer", "not a URL");
        };
        if !may_be_asked(&issuer, true) {
            return wrong("issuer", "expected https://…; http only on this machine");
        }
        let bare = issuer.query().is_none() && issuer.fragment().is_none();
        if !bare || !issuer.username().is_empty() || issuer.password().is_some() {
            return wrong("issuer", "no query, no fragment, no user name");
        }
        if self.client_id.is_empty() || !self.client_id.chars().all(|c| c.is_ascii_graphic()) {
            return wrong("client_id", "visible ASCII characters");
        }
        if Url::parse(&self.redirect).is_err() {
            return wrong("redirect", "not a URL");
        }
        // RFC 6749, section 3.3.
        let is_scope = |scope: &String| {
            !scope.is_empty() && scope.chars().all(|c| c.is_ascii_graphic() && c != '"' && c != '\\')
        };
        if self.scopes.len() > 20 || !self.scopes.iter().all(is_scope) {
            return wrong("scopes", "at most 20, each of visible ASCII characters");
        }
        match &self.secret {
            Some(Secret(text)) if text.is_empty() || text.chars().any(char::is_control) => {
                wrong("client_secret", "is empty, or has control characters")
            }
            _ => Ok(()),
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Whether secrets may go there: by TLS, or within this machine if it was
/// configured so.
pub(crate) fn may_be_asked(url: &Url, loopback: bool) -> bool {
    match url.scheme() {
        "https" => url.has_host(),
        "http" => loopback && is_loopback(url),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        let good = || Settings::new("https://id.example/realm", "us", "https://we.example/callback");
        good().validate().unwrap();
        Settings::new("http://127.0.0.1:8080", "us", "http://127.0.0.1/").validate().unwrap();
        for (field, bad) in [
            ("issuer", Settings { issuer: "http://id.example".into(), ..good() }),
            ("issuer", Settings { issuer: "http://127.0.0.1.id.example".into(), ..good() }),
            ("issuer", Settings { issuer: "https://id.example/?x".into(), ..good() }),
            ("issuer", Settings { issuer: "https://a:b@id.example/".into(), ..good() }),
            ("issuer", Settings { issuer: "file:///etc".into(), ..good() }),
            ("client_id", Settings { client_id: "a b".into(), ..good() }),
            ("redirect", Settings { redirect: "/callback".into(), ..good() }),
            ("scopes", good().scopes(vec!["a b".into()])),
            ("client_secret", good().secret(Some(Secret::new("")))),
        ] {
            assert_eq!(bad.validate().unwrap_err().field, field, "{bad:?}");
        }
        assert!(!format!("{:?}", good().secret(Some(Secret::new("hunter2")))).contains("hunter2"));
    }
}
