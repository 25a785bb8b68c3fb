//! HTTPS: certificates from files, which may change while connections are open.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use cocalc_core::BoxError;
use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::TcpStream,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// The protocol by which authorities check names (RFC 8737).
const CHALLENGE: &[u8] = b"acme-tls/1";

/// Most bytes of one of the files. A chain of certificates has some thousand.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The certificate and key of a listener. TLS 1.2 and 1.3; HTTP/2 and HTTP/1.1
/// are offered, in this order.
///
/// Cloning is cheap; clones share the certificate.
#[derive(Clone)]
pub struct Tls {
    files: Arc<Files>,
    acceptor: TlsAcceptor,
}

/// Why there is no certificate to show.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not have in PEM what it should have.
    #[error("{path} has no usable {what} in PEM")]
    Pem {
        /// Which.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The key cannot be used, or is not the certificate's.
    #[error("the key in {path} cannot be used with the certificate")]
    Key {
        /// The key's file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// TLS itself.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

impl Tls {
    /// Reads a chain of certificates, the server's own first, and its private
    /// key, both in PEM. Blocks for as long as the disk takes.
    ///
    /// # Errors
    ///
    /// As [`TlsError`] says.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let shown = Shown::read(&certificate, &key, &provider)?;
        let files = Arc::new(Files {
            certificate,
            key,
            provider: provider.clone(),
            shown: RwLock::new(shown),
            challenges: Mutex::default(),
        });
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?
            .with_no_client_auth()
            .with_cert_resolver(files.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { files, acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Also answers an authority's challenges of TLS-ALPN-01 (RFC 8737).
    #[must_use]
    pub fn with_challenges(mut self) -> Self {
        let mut config = ServerConfig::clone(self.acceptor.config());
        config.alpn_protocols.push(CHALLENGE.to_vec());
        self.acceptor = TlsAcceptor::from(Arc::new(config));
        self
    }

    /// Shows this certificate, with its key, both in DER, to whoever checks `name`
    /// by TLS-ALPN-01, and to nobody else.
    ///
    /// # Errors
    ///
    /// [`TlsError::Key`].
    pub fn answer_challenge(&self, name: &str, certificate: Vec<u8>, key: Vec<u8>) -> Result<(), TlsError> {
        let failed = |source| TlsError::Key { path: PathBuf::from(name), source };
        let key =
            PrivateKeyDer::try_from(key).map_err(|why| failed(rustls::Error::General(why.to_owned())))?;
        let chain = vec![CertificateDer::from(certificate)];
        let key = self.files.provider.key_provider.load_private_key(key).map_err(failed)?;
        // Whether it fits is not looked at: the proof is an extension that every
        // client must refuse.
        let certified = CertifiedKey::new(chain, key);
        self.files.challenges().insert(name.to_owned(), Arc::new(certified));
        Ok(())
    }

    /// Answers no challenge any more.
    pub fn clear_challenges(&self) {
        self.files.challenges().clear();
    }

    /// For servers that speak HTTP/1.1 only.
    #[must_use]
    pub fn only_http1(mut self) -> Self {
        let mut config = ServerConfig::clone(self.acceptor.config());
        config.alpn_protocols.retain(|name| name != b"h2");
        self.acceptor = TlsAcceptor::from(Arc::new(config));
        self
    }

    /// As [`open`](Self::open) with the files that a configuration names, if it
    /// names any, apart from the runtime.
    ///
    /// # Errors
    ///
    /// As [`TlsError`] says.
    pub async fn configured(
        certificate: Option<&Path>,
        key: Option<&Path>,
    ) -> Result<Option<Self>, BoxError> {
        let (Some(certificate), Some(key)) = (certificate, key) else { return Ok(None) };
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        Ok(Some(tokio::task::spawn_blocking(move || Self::open(&certificate, &key)).await??))
    }

    /// Reads the files again, and shows what they have to new connections, if
    /// that is something else. Returns whether it is. Open connections are not
    /// touched. Blocks for as long as the disk takes.
    ///
    /// # Errors
    ///
    /// As [`TlsError`] says; what was shown before is shown then. So a look
    /// between the writing of the two files does no harm.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let files = &self.files;
        let shown = Shown::read(&files.certificate, &files.key, &files.provider)?;
        let mut now = files.shown.write().unwrap_or_else(PoisonError::into_inner);
        let changed = now.certified.cert != shown.certified.cert || now.key != shown.key;
        if changed {
            *now = shown;
        }
        Ok(changed)
    }

    /// Reloads every 10 s, for as long as it is polled.
    pub async fn keep_fresh(&self) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.look_again().await;
        }
    }

    /// Reloads now, apart from the runtime, and logs what came of it.
    pub async fn look_again(&self) {
        let tls = self.clone();
        match tokio::task::spawn_blocking(move || tls.reload()).await {
            Ok(Ok(true)) => tracing::info!("a new certificate is shown"),
            Ok(Ok(false)) => tracing::debug!("the certificate is the same"),
            Ok(Err(error)) => {
                tracing::warn!(error = %cocalc_core::chain(&error), "the old certificate is kept");
            }
            Err(error) => tracing::warn!(%error, "the certificate was not looked at"),
        }
    }

    /// Shakes hands. The caller bounds the time.
    ///
    /// # Errors
    ///
    /// The client speaks no TLS that is allowed here, or has gone.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let stream = self.acceptor.accept(stream).await?;
        if stream.get_ref().1.alpn_protocol() == Some(CHALLENGE) {
            // That was all.
            return Err(io::Error::other("an authority has checked a name"));
        }
        Ok(stream)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("certificate", &self.files.certificate).finish_non_exhaustive()
    }
}

struct Files {
    certificate: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    shown: RwLock<Shown>,
    /// By name.
    challenges: Mutex<BTreeMap<String, Arc<CertifiedKey>>>,
}

impl Files {
    fn challenges(&self) -> MutexGuard<'_, BTreeMap<String, Arc<CertifiedKey>>> {
        self.challenges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Files").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Files {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // As its only protocol (RFC 8737, 3).
        if hello.alpn().is_some_and(|mut names| names.next() == Some(CHALLENGE) && names.next().is_none()) {
            return self.challenges().get(hello.server_name()?).cloned();
        }
        Some(self.shown.read().unwrap_or_else(PoisonError::into_inner).certified.clone())
    }
}

struct Shown {
    certified: Arc<CertifiedKey>,
    key: PrivateKeyDer<'static>,
}

impl Shown {
    fn read(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<Self, TlsError> {
        let pem = |path: &Path, what| {
            let path = path.to_owned();
            move |source| TlsError::Pem { path, what, source }
        };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes(certificate)?).collect();
        let chain = chain.map_err(pem(certificate, "certificate"))?;
        if chain.is_empty() {
            return Err(pem(certificate, "certificate")(rustls::pki_types::pem::Error::NoItemsFound));
        }
        let private = PrivateKeyDer::from_pem_slice(&bytes(key)?).map_err(pem(key, "private key"))?;
        let certified = CertifiedKey::from_der(chain, private.clone_key(), provider)
            .map_err(|source| TlsError::Key { path: key.to_owned(), source })?;
        Ok(Self { certified: Arc::new(certified), key: private })
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, TlsError> {
    use io::Read;

    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
