//! The keys by which users recognize a server.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use russh::keys::{
    Algorithm, Certificate, EcdsaCurve, PrivateKey,
    ssh_key::{LineEnding, certificate::CertType, private::RsaKeypair},
};
use serde::Deserialize;

/// The longest certificate, as text.
const CERTIFICATE_BYTES_MAX: usize = 16 * 1024;

/// The bits of an RSA host key: what clients and scanners call enough today.
const RSA_BITS: usize = 3072;

/// A type of host key that a server may have beside its Ed25519 key.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum HostKeyType {
    /// ECDSA on NIST's curve P-256. `ssh-audit` calls that curve a failure.
    Ecdsa,
    /// RSA of 3072 bits, which signs with SHA-2 only.
    Rsa,
}

impl HostKeyType {
    /// How OpenSSH calls the file of such a key.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Ecdsa => "ssh_host_ecdsa_key",
            Self::Rsa => "ssh_host_rsa_key",
        }
    }

    fn is(self, algorithm: &Algorithm) -> bool {
        match self {
            Self::Ecdsa => matches!(algorithm, Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }),
            Self::Rsa => matches!(algorithm, Algorithm::Rsa { .. }),
        }
    }

    fn generate(self) -> Result<PrivateKey, HostKeyError> {
        // The generator below panics where this fails.
        getrandom::fill(&mut [0; 32]).map_err(|_| HostKeyError::NoRandomness)?;
        let mut rng = russh::keys::key::safe_rng();
        let made = match self {
            Self::Ecdsa => PrivateKey::random(&mut rng, Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }),
            Self::Rsa => RsaKeypair::random(&mut rng, RSA_BITS).map(PrivateKey::from),
        };
        made.map_err(|_| HostKeyError::NoRandomness)
    }
}

/// The host keys of one server, each kept in a file: an Ed25519 key, and what
/// was added to it.
#[derive(Clone)]
pub struct HostKeys {
    pub(crate) keys: Vec<PrivateKey>,
}

impl HostKeys {
    /// Reads the key from the OpenSSH file `path`, which only its owner may
    /// read, or makes it there.
    ///
    /// # Errors
    ///
    /// The file cannot be read or made, others may read it, or it holds
    /// something else than an unencrypted Ed25519 key. An existing file is
    /// never replaced: users have pinned that key.
    pub fn load_or_create(path: &Path) -> Result<Self, HostKeyError> {
        let ed25519 = |algorithm: &Algorithm| *algorithm == Algorithm::Ed25519;
        let key = load_or_create(path, ed25519, || Ok(Self::generate()?.keys.remove(0)))?;
        Ok(Self { keys: vec![key] })
    }

    /// Adds a key of another type, which is read from the OpenSSH file `path`, or
    /// made there: for clients that know no Ed25519. An RSA key takes a second
    /// or more to make.
    ///
    /// # Errors
    ///
    /// As of [`load_or_create`](Self::load_or_create).
    pub fn and_load_or_create(mut self, path: &Path, kind: HostKeyType) -> Result<Self, HostKeyError> {
        let key = load_or_create(path, |algorithm| kind.is(algorithm), || kind.generate())?;
        self.keys.retain(|one| !kind.is(&one.algorithm()));
        self.keys.push(key);
        Ok(self)
    }

    /// Makes a key that lives as long as this process.
    ///
    /// # Errors
    ///
    /// The system gives no randomness.
    pub fn generate() -> Result<Self, HostKeyError> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|_| HostKeyError::NoRandomness)?;
        let pair = russh::keys::ssh_key::private::Ed25519Keypair::from_seed(&seed);
        Ok(Self { keys: vec![PrivateKey::from(pair)] })
    }

    /// Reads a host certificate (OpenSSH text) of one of these keys.
    pub(crate) fn certificate(&self, text: &str) -> Result<Certificate, HostCertificateError> {
        if text.len() > CERTIFICATE_BYTES_MAX {
            return Err(HostCertificateError::Unreadable);
        }
        let certificate = Certificate::from_openssh(text).map_err(|_| HostCertificateError::Unreadable)?;
        let own = |key: &PrivateKey| key.public_key().key_data() == certificate.public_key();
        if certificate.cert_type() != CertType::Host || !self.keys.iter().any(own) {
            return Err(HostCertificateError::NotOurs);
        }
        Ok(certificate)
    }

    /// The public keys as `algorithm base64`, for the master to publish and
    /// for clients to pin.
    pub fn public(&self) -> Vec<String> {
        self.keys.iter().filter_map(|key| key_text(key.public_key())).collect()
    }
}

/// Reads the key in `path`, which must be what `is` says, or puts there what
/// `make` makes.
fn load_or_create(
    path: &Path,
    is: impl Fn(&Algorithm) -> bool,
    make: impl FnOnce() -> Result<PrivateKey, HostKeyError>,
) -> Result<PrivateKey, HostKeyError> {
    let failed = |source| HostKeyError::File { path: path.to_owned(), source };
    match File::open(path) {
        Ok(file) => load(path, file, is),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = make()?;
            let text = key.to_openssh(LineEnding::LF).map_err(|_| HostKeyError::Unusable(path.to_owned()))?;
            // Written aside and linked: a crash leaves no half key, and of
            // two processes that start at once one wins.
            let aside = path.with_extension(format!("new-{}", std::process::id()));
            let _ = std::fs::remove_file(&aside);
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside).map_err(failed)?;
            let linked = file
                .write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| std::fs::hard_link(&aside, path));
            let _ = std::fs::remove_file(&aside);
            match linked {
                Ok(()) => {
                    if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
                        File::open(directory).and_then(|d| d.sync_all()).map_err(failed)?;
                    }
                    Ok(key)
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    load(path, File::open(path).map_err(failed)?, is)
                }
                Err(error) => Err(failed(error)),
            }
        }
        Err(error) => Err(failed(error)),
    }
}

fn load(path: &Path, file: File, is: impl Fn(&Algorithm) -> bool) -> Result<PrivateKey, HostKeyError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |source| HostKeyError::File { path: path.to_owned(), source };
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(HostKeyError::Readable(path.to_owned()));
    }
    let mut text = String::new();
    file.take(16 * 1024).read_to_string(&mut text).map_err(failed)?;
    match PrivateKey::from_openssh(&text) {
        Ok(key) if is(&key.algorithm()) && !key.is_encrypted() => Ok(key),
        _ => Err(HostKeyError::Unusable(path.to_owned())),
    }
}

impl fmt::Debug for HostKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostKeys").field(&self.public()).finish()
    }
}

/// A public key as OpenSSH text without its comment.
pub(crate) fn key_text(key: &russh::keys::PublicKey) -> Option<String> {
    let text = key.to_openssh().ok()?;
    let mut words = text.split_ascii_whitespace();
    let (algorithm, base64) = (words.next()?, words.next()?);
    Some(format!("{algorithm} {base64}"))
}

/// Why a host certificate is not offered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostCertificateError {
    /// It is no certificate.
    #[error("not a certificate in OpenSSH's format")]
    Unreadable,
    /// It is of another key, or a user's.
    #[error("not a host certificate of this server's key")]
    NotOurs,
}

/// Why there is no host key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostKeyError {
    /// The file cannot be read or made.
    #[error("cannot use the SSH host key {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than the owner can read it.
    #[error("the SSH host key {} can be read by others: chmod 600 it, or remove it if it may be known", .0.display())]
    Readable(PathBuf),
    /// It is no private key of the type that belongs there.
    #[error("{} is not an unencrypted key of its type in OpenSSH's format", .0.display())]
    Unusable(PathBuf),
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    NoRandomness,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ssh_host_ed25519_key");
        let first = HostKeys::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = HostKeys::load_or_create(&path).unwrap();
        assert_eq!(first.public(), second.public());
        assert!(first.public()[0].starts_with("ssh-ed25519 AAAA"));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(!format!("{first:?}").contains("PRIVATE"));
    }

    #[test]
    fn keys_of_other_types_are_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let load = || {
            HostKeys::load_or_create(&at("ed25519"))
                .unwrap()
                .and_load_or_create(&at("ecdsa"), HostKeyType::Ecdsa)
                .unwrap()
                .and_load_or_create(&at("rsa"), HostKeyType::Rsa)
                .unwrap()
        };
        let first = load().public();
        let types: Vec<_> = first.iter().filter_map(|key| key.split(' ').next()).collect();
        assert_eq!(types, ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"]);
        assert_eq!(load().public(), first);
        // A key of another type in its place is refused, and stays.
        let keys = HostKeys::load_or_create(&at("ed25519")).unwrap();
        let swapped = keys.and_load_or_create(&at("ed25519"), HostKeyType::Ecdsa);
        assert!(matches!(swapped, Err(HostKeyError::Unusable(_))));
    }

    #[test]
    fn what_is_no_key_is_never_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "precious").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(HostKeys::load_or_create(&path), Err(HostKeyError::Unusable(_))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(HostKeys::load_or_create(&path), Err(HostKeyError::Readable(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
