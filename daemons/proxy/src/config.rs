//! A proxy's configuration.

use std::{net::SocketAddr, path::PathBuf};

use cocalc_core::ids::HostName;
use cocalc_daemon::{acme::AcmeSettings, ending::Drain};
use cocalc_http::HttpSettings;
use cocalc_ssh::HostKeyType;
use serde::Deserialize;

use crate::limits::ProxyLimits;

/// What a proxy is told. Every key is also `COCALC_PROXY_<KEY>`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its name in the federation.
    pub name: HostName,
    /// The master's address, for instance `https://cocalc.example.org`.
    pub master_url: String,
    /// The file with the one-use token; needed until the proxy has joined.
    pub join_token_file: Option<PathBuf>,
    /// Where it keeps its keys.
    pub data_dir: PathBuf,
    /// Where it serves HTTP.
    pub listen: SocketAddr,
    /// Where it serves SSH.
    pub ssh_listen: SocketAddr,
    /// The types of SSH host keys that it has beside Ed25519: `rsa` (3072 bits)
    /// and `ecdsa` (P-256), for clients that know nothing newer. Default: `rsa`,
    /// of which nobody complains.
    #[serde(default = "more_host_keys")]
    pub ssh_more_host_keys: Vec<HostKeyType>,
    /// The file with the chain of certificates for `listen`, in PEM, the
    /// server's own first; with `tls_key`. Read again when it changes, within
    /// 10 s. Default: none, plain HTTP.
    pub tls_cert: Option<PathBuf>,
    /// The file with the certificate's private key, in PEM.
    pub tls_key: Option<PathBuf>,
    /// How users reach `listen`. Default: `http://<listen>`, or `https://` where
    /// there is a certificate.
    pub public_url: Option<String>,
    /// How users reach `ssh_listen`, as `host:port`. Default: `ssh_listen`.
    pub public_ssh: Option<String>,
    /// Its certificate by ACME, instead of files. Default: no.
    #[serde(default)]
    pub acme: AcmeSettings,
    /// How it ends.
    #[serde(default)]
    pub drain: Drain,
    /// The domain under which each project has its own origin, with the port
    /// if it is not the scheme's own. Default: none, path routing only.
    #[serde(default)]
    pub domain: String,
    /// How much one address and all of them may ask.
    #[serde(default)]
    pub limits: ProxyLimits,
    /// Bytes and waits of its HTTP ingress.
    #[serde(default)]
    pub http: HttpSettings,
}

fn more_host_keys() -> Vec<HostKeyType> {
    vec![HostKeyType::Rsa]
}

impl Config {
    pub(crate) fn has_certificate(&self) -> bool {
        self.tls_cert.is_some() || self.acme.is_on()
    }

    /// Finds what no single value shows.
    ///
    /// # Errors
    ///
    /// Naming the key at fault and what to do.
    pub fn validate(&self) -> Result<(), String> {
        if !self.master_url.starts_with("http://") && !self.master_url.starts_with("https://") {
            return Err(format!(
                "master_url: {:?} begins with neither http:// nor https://",
                self.master_url
            ));
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return Err("tls_cert: goes with tls_key; set both or none".into());
        }
        let plain = |url: &String| url.starts_with("http://");
        if self.has_certificate() && self.public_url.as_ref().is_some_and(plain) {
            return Err(
                "public_url: begins with http://, but tls_cert or acme.names is set; use https://".into()
            );
        }
        self.acme.validate(self.tls_cert.is_some(), &self.domain)?;
        self.drain.validate()?;
        self.http.validate()?;
        self.limits.validate()
    }
}
