//! TLS to the master, which proves itself to the authorities that this machine
//! trusts: those of the system, or of `SSL_CERT_FILE` and `SSL_CERT_DIR`.

use std::{io, sync::Arc};

use async_trait::async_trait;
use cocalc_conat::Dial;
use cocalc_core::{BoxError, stream::BoxStream};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The trusted authorities. Some of a system's may be of a kind that is not
/// understood here, which costs those whom only they have certified.
fn authorities() -> Vec<CertificateDer<'static>> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "cannot read trusted certificates");
    }
    found.certs
}

/// What an HTTP agent of this machine's daemons and programs needs to call
/// `url`: trusted authorities, if it begins with `https://`.
pub fn for_agent(url: &str) -> ureq::tls::TlsConfig {
    let builder = ureq::tls::TlsConfig::builder().unversioned_rustls_crypto_provider(provider());
    if !url.starts_with("https://") {
        return builder.build();
    }
    let found = authorities();
    let certificates: Vec<_> =
        found.iter().map(|certificate| ureq::tls::Certificate::from_der(certificate).to_owned()).collect();
    builder.root_certs(ureq::tls::RootCerts::new_with_certs(&certificates)).build()
}

/// Opens connections of the bus over TLS.
pub(crate) struct OverTls(TlsConnector);

impl OverTls {
    pub(crate) fn new() -> Result<Self, BoxError> {
        let mut roots = RootCertStore::empty();
        let (taken, _) = roots.add_parsable_certificates(authorities());
        if taken == 0 {
            return Err(
                "this machine trusts no authority: install ca-certificates, or set SSL_CERT_FILE".into()
            );
        }
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

impl std::fmt::Debug for OverTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OverTls").finish_non_exhaustive()
    }
}

#[async_trait]
impl Dial for OverTls {
    async fn dial(&self, host: &str, port: u16) -> io::Result<BoxStream> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        Ok(Box::pin(self.0.connect(name, stream).await?))
    }
}
