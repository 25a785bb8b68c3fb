//! TLS 1.3 with raw Ed25519 keys on both ends.

use std::{fmt, sync::Arc};

use cocalc_auth::{PublicKey, identity::Identity};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};

use crate::PeerDirectory;

/// Everything before the 32 bytes of an Ed25519 key in its
/// SubjectPublicKeyInfo (RFC 8410); there is no other encoding.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Why TLS cannot be set up. It says nothing of a peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The identity key cannot be encoded.
    #[error("the identity key cannot be used")]
    Identity(#[from] cocalc_auth::identity::IdentityError),
    /// The TLS library refuses it.
    #[error("TLS cannot be set up")]
    Tls {
        /// Why.
        source: cocalc_core::BoxError,
    },
}

impl From<Error> for SetupError {
    fn from(error: Error) -> Self {
        Self::Tls { source: error.into() }
    }
}

/// This process's end of TLS, for dialing and for listening.
#[derive(Clone)]
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    key: Arc<CertifiedKey>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    pub(crate) fn new(identity: &Identity) -> Result<Self, SetupError> {
        let provider = Arc::new(ring::default_provider());
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.pkcs8_der()?.to_vec()));
        let key = provider.key_provider.load_private_key(der)?;
        let spki = [&SPKI_PREFIX[..], identity.public_key().as_bytes()].concat();
        let key = Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], key));
        Ok(Self { provider, key })
    }

    /// For a connection to whoever holds `expected`.
    pub(crate) fn client(&self, expected: PublicKey) -> Result<ClientConfig, SetupError> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ExpectServer(expected)))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(
                &self.key,
            ))));
        // A resumed session would be trusted for what the key was then.
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// For connections from whoever `directory` knows.
    pub(crate) fn server(&self, directory: Arc<dyn PeerDirectory>) -> Result<ServerConfig, SetupError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(KnownClient(directory)))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(&self.key))));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

/// The key in what a peer presented as its raw public key.
pub(crate) fn presented(spki: &CertificateDer<'_>) -> Result<PublicKey, Error> {
    let bytes = spki.as_ref().strip_prefix(&SPKI_PREFIX).and_then(|key| <&[u8; 32]>::try_from(key).ok());
    let bytes = bytes.ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
    // A weak key "signs" everything; it becomes no PublicKey.
    PublicKey::from_bytes(bytes).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))
}

fn check_signature(
    message: &[u8],
    spki: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let bad = Error::InvalidCertificate(CertificateError::BadSignature);
    if signed.scheme != SignatureScheme::ED25519 {
        return Err(bad);
    }
    let Ok(signature) = <&[u8; 64]>::try_from(signed.signature()) else { return Err(bad) };
    if presented(spki)?.verify(message, signature) {
        Ok(HandshakeSignatureValid::assertion())
    } else {
        Err(bad)
    }
}

fn only_tls13() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled)
}

#[derive(Debug)]
struct ExpectServer(PublicKey);

impl ServerCertVerifier for ExpectServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if presented(end_entity)? == self.0 {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

struct KnownClient(Arc<dyn PeerDirectory>);

impl fmt::Debug for KnownClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KnownClient")
    }
}

impl ClientCertVerifier for KnownClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.0.peer(&presented(end_entity)?) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_encoding_of_a_strong_key_is_a_key() {
        let key = Identity::from_seed(&[1; 32]).public_key();
        let spki = [&SPKI_PREFIX[..], key.as_bytes()].concat();
        assert_eq!(presented(&CertificateDer::from(spki.clone())).unwrap(), key);
        let mut weak = SPKI_PREFIX.to_vec();
        weak.push(1);
        weak.extend([0; 31]);
        for bad in [weak, spki[1..].to_vec(), spki[..43].to_vec(), [&spki[..], &[0]].concat(), Vec::new()] {
            assert!(presented(&CertificateDer::from(bad)).is_err());
        }
    }
}
