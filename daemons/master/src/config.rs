//! The configuration file.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use cocalc_auth::token::Algorithm;
use cocalc_core::{control::Settings, runner::Limits};
use cocalc_daemon::{acme::AcmeSettings, ending::Drain};
use serde::Deserialize;

use crate::{
    backups::BackupsConfig,
    oidc::{self, OidcConfig},
};

/// What a master is told: one TOML file, every key also as
/// `COCALC_MASTER_<KEY>`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where it listens, for instance `127.0.0.1:7800`. Port 0 takes any.
    pub listen: SocketAddr,
    /// The file with the chain of certificates for `listen`, in PEM, the server's
    /// own first; with `tls_key`. Read again when it changes, within 10 s. Default:
    /// none, plain HTTP, for loopback or behind what terminates TLS.
    pub tls_cert: Option<PathBuf>,
    /// The file with the certificate's private key, in PEM.
    pub tls_key: Option<PathBuf>,
    /// Where it keeps its database and keys.
    pub data_dir: PathBuf,
    /// Its URL as users, hosts and proxies see it, without a trailing slash:
    /// the issuer of its tokens. Default: `http://`, or with a certificate `https://`,
    /// and the listen address.
    #[serde(default)]
    pub public_url: Option<String>,
    /// How often hosts renew their lease, in milliseconds. Default 5 s.
    #[serde(default = "keepalive_ms")]
    pub keepalive_ms: u64,
    /// How long a lease lasts, in milliseconds. Default 30 s.
    #[serde(default = "lease_ms")]
    pub lease_ms: u64,
    /// How long cached rights go on after the lease, in milliseconds. Default
    /// 15 min.
    #[serde(default = "grace_ms")]
    pub grace_ms: u64,
    /// The addresses of reverse proxies whose `X-Forwarded-For` says who
    /// calls. Of anybody else it is passed over. Default: none.
    #[serde(default)]
    pub trusted_proxies: Vec<IpAddr>,
    /// How many connections one address may have, those that became the bus's
    /// not counted. Behind a reverse proxy, which is one address, as many as
    /// that lets in. Default 500.
    #[serde(default = "connections_per_address_max")]
    pub connections_per_address_max: usize,
    /// What the headers of tokens call their algorithm: `EdDSA` (RFC 8037),
    /// which most libraries know, or `Ed25519` (RFC 9864). Keys made from now
    /// on have it; those in use keep theirs until they are rotated out. Default
    /// `EdDSA`.
    #[serde(default)]
    pub token_algorithm: Algorithm,
    /// What owners may ask for at most in the projects that are made from now on:
    /// `memory_bytes`, `swap_bytes`, `cpu_millis`, `cpu_weight`, `pids`, `nofile`,
    /// `io_weight`, `tmp_bytes`, `shm_bytes`, `log_bytes`. Administrators may change
    /// it for each. Default: as much as the host has.
    #[serde(default)]
    pub limits_max: Limits,
    /// OpenID providers with which people may log in. Default: none.
    #[serde(default)]
    pub oidc: Vec<OidcConfig>,
    /// Its certificate by ACME, instead of files. Default: no.
    #[serde(default)]
    pub acme: AcmeSettings,
    /// How it ends.
    #[serde(default)]
    pub drain: Drain,
    /// Backups. Default: none.
    #[serde(default)]
    pub backups: Option<BackupsConfig>,
}

fn connections_per_address_max() -> usize {
    500
}

fn keepalive_ms() -> u64 {
    Settings::default().keepalive_ms
}

fn lease_ms() -> u64 {
    Settings::default().lease_ms
}

fn grace_ms() -> u64 {
    Settings::default().grace_ms
}

impl Config {
    /// A configuration with defaults, for embedders and tests.
    pub fn new(listen: SocketAddr, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            listen,
            tls_cert: None,
            tls_key: None,
            data_dir: data_dir.into(),
            public_url: None,
            keepalive_ms: keepalive_ms(),
            lease_ms: lease_ms(),
            grace_ms: grace_ms(),
            trusted_proxies: Vec::new(),
            connections_per_address_max: connections_per_address_max(),
            token_algorithm: Algorithm::default(),
            limits_max: Limits::default(),
            oidc: Vec::new(),
            acme: AcmeSettings::default(),
            drain: Drain::default(),
            backups: None,
        }
    }

    /// Checks what the types can't, before anything is opened.
    ///
    /// # Errors
    ///
    /// Names the key, and says what is wrong with it.
    pub fn validate(&self) -> Result<(), String> {
        if let Some(url) = &self.public_url {
            let uri: http::Uri = url.parse().map_err(|error| format!("public_url: {error}"))?;
            if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
                return Err("public_url: expected http://… or https://…".to_owned());
            }
            if url.ends_with('/') || uri.query().is_some() {
                return Err("public_url: no trailing slash and no query".to_owned());
            }
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return Err("tls_cert: goes with tls_key; set both or none".to_owned());
        }
        let plain = |url: &String| url.starts_with("http://");
        if (self.tls_cert.is_some() || self.acme.is_on()) && self.public_url.as_ref().is_some_and(plain) {
            return Err(
                "public_url: begins with http://, but tls_cert or acme.names is set; use https://".to_owned()
            );
        }
        if self.data_dir.as_os_str().is_empty() {
            return Err("data_dir: is empty".to_owned());
        }
        if self.keepalive_ms < 100 {
            return Err("keepalive_ms: at least 100".to_owned());
        }
        if self.lease_ms < self.keepalive_ms.saturating_mul(2) {
            return Err("lease_ms: at least twice keepalive_ms, or one lost message ends a lease".to_owned());
        }
        if self.connections_per_address_max == 0 {
            return Err("connections_per_address_max: at least 1".to_owned());
        }
        self.acme.validate(self.tls_cert.is_some(), "")?;
        self.drain.validate()?;
        if let Some(backups) = &self.backups {
            backups.validate()?;
        }
        oidc::validate(&self.oidc)
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings { keepalive_ms: self.keepalive_ms, lease_ms: self.lease_ms, grace_ms: self.grace_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let config: Config =
            cocalc_daemon::config::parse("master", text, []).map_err(|error| error.to_string())?;
        config.validate().map(|()| config)
    }

    #[test]
    fn defaults_and_mistakes() {
        let least = "listen = '127.0.0.1:0'\ndata_dir = 'data'\n";
        let config = parse(least).unwrap();
        assert_eq!(config.settings(), Settings::default());
        for (wrong, key) in [
            ("public_url = 'ftp://x'", "public_url"),
            ("public_url = 'http://x/'", "public_url"),
            ("tls_cert = '/c'", "tls_key"),
            ("tls_cert = '/c'\ntls_key = '/k'\npublic_url = 'http://x'", "public_url"),
            ("lease_ms = 100", "lease_ms"),
            ("keepalive_ms = 1", "keepalive_ms"),
            ("connections_per_address_max = 0", "connections_per_address_max"),
            ("token_algorithm = 'none'", "token_algorithm"),
            ("leese_ms = 100", "leese_ms"),
            ("[drain]\nlimit_secs = 4000", "drain.limit_secs"),
            ("[backups]\n[backups.place]\nkind = 'directory'\npath = 'b'", "backups.place.path"),
            ("[backups]\ncolour = 1", "colour"),
            ("[[oidc]]\nname = 'x'\nclient_id = 'y'", "issuer"),
            ("[[oidc]]\nname = 'x'\nclient_id = 'y'\nissuer = 'http://id.example'", "issuer"),
            ("[[oidc]]\nname = 'x'\nclient_id = 'y'\nissuer = 'https://id.example'\nsecret = 'z'", "secret"),
        ] {
            let error = parse(&format!("{least}{wrong}")).unwrap_err();
            assert!(error.contains(key), "{wrong}: {error}");
        }
    }
}
