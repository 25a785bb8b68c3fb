//! The keys by which users recognize a server.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use russh::keys::{
    Algorithm, Certificate, PrivateKey,
    ssh_key::{LineEnding, certificate::CertType},
};

/// The longest certificate, as text.
const CERTIFICATE_BYTES_MAX: usize = 16 * 1024;

/// The host keys of one server: one Ed25519 key, kept in a file.
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
        let failed = |source| HostKeyError::File { path: path.to_owned(), source };
        match File::open(path) {
            Ok(file) => Self::load(path, file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = Self::generate()?;
                let text = key.keys[0]
                    .to_openssh(LineEnding::LF)
                    .map_err(|_| HostKeyError::Unusable(path.to_owned()))?;
                // Written aside and linked: a crash leaves no half key, and of
                // two processes that start at once one wins.
                let aside = path.with_extension(format!("new-{}", std::process::id()));
                let _ = std::fs::remove_file(&aside);
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&aside)
                    .map_err(failed)?;
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
                        Self::load(path, File::open(path).map_err(failed)?)
                    }
                    Err(error) => Err(failed(error)),
                }
            }
            Err(error) => Err(failed(error)),
        }
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

    fn load(path: &Path, file: File) -> Result<Self, HostKeyError> {
        use std::os::unix::fs::PermissionsExt;
        let failed = |source| HostKeyError::File { path: path.to_owned(), source };
        let mode = file.metadata().map_err(failed)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(HostKeyError::Readable(path.to_owned()));
        }
        let mut text = String::new();
        file.take(16 * 1024).read_to_string(&mut text).map_err(failed)?;
        match PrivateKey::from_openssh(&text) {
            Ok(key) if key.algorithm() == Algorithm::Ed25519 && !key.is_encrypted() => {
                Ok(Self { keys: vec![key] })
            }
            _ => Err(HostKeyError::Unusable(path.to_owned())),
        }
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
    /// It is no Ed25519 private key.
    #[error("{} is not an unencrypted Ed25519 key in OpenSSH's format", .0.display())]
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
