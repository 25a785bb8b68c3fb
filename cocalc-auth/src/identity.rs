//! The key of a host or proxy: made where it is used, never exported.

use std::{fmt, path::Path};

use ed25519_dalek::{Signer, SigningKey, pkcs8::EncodePrivateKey};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{
    PublicKey, RandomError, compact,
    key_file::{self, KeyFileError},
};

/// An Ed25519 identity key. It prints nothing of its secret, and wipes it from
/// memory when it is dropped.
pub struct Identity(SigningKey);

const PREFIX: &str = "cocalc-identity-1 ";

impl Identity {
    /// Makes a new key.
    ///
    /// # Errors
    ///
    /// The system has no randomness to give.
    pub fn generate() -> Result<Self, RandomError> {
        let mut seed = Zeroizing::new([0; 32]);
        crate::fill_random(&mut *seed)?;
        Ok(Self(SigningKey::from_bytes(&seed)))
    }

    /// The key that `seed` gives: for tests and simulations, which must repeat.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Reads the key from `path`, or makes one there (mode 0600, durable on
    /// return) if there is none.
    ///
    /// # Errors
    ///
    /// A file that others may read, that is not ours, or that holds something
    /// else is refused and left alone.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        if let Some(bytes) = key_file::load(path)? {
            return Self::parse(&bytes);
        }
        let identity = Self::generate()?;
        let seed = Zeroizing::new(compact::encode(identity.0.as_bytes()));
        let text = Zeroizing::new(format!("{PREFIX}{}\n", *seed));
        match key_file::create(path, text.as_bytes()) {
            Ok(()) => Ok(identity),
            // Somebody else made it meanwhile: theirs is the key.
            Err(KeyFileError::Exists { .. }) => match key_file::load(path)? {
                Some(bytes) => Self::parse(&bytes),
                None => Err(IdentityError::Format),
            },
            Err(error) => Err(error.into()),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self, IdentityError> {
        let text = std::str::from_utf8(bytes).map_err(|_| IdentityError::Format)?;
        let seed = text.strip_prefix(PREFIX).map(|rest| rest.strip_suffix('\n').unwrap_or(rest));
        let seed = seed.and_then(compact::decode_exact::<32>).ok_or(IdentityError::Format)?;
        Ok(Self(SigningKey::from_bytes(&Zeroizing::new(seed))))
    }

    /// The public key, which the master registers and peers pin.
    pub fn public_key(&self) -> PublicKey {
        self.0.verifying_key().into()
    }

    /// The private key as PKCS#8 DER (RFC 5958, with the public key), for TLS.
    ///
    /// # Errors
    ///
    /// The encoder failed, which its fixed input gives no reason for.
    pub fn pkcs8_der(&self) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
        let document = self.0.to_pkcs8_der().map_err(|_| IdentityError::Format)?;
        Ok(Zeroizing::new(document.as_bytes().to_vec()))
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }

    /// A secret for another use, which says nothing about this key or about
    /// secrets of other names. The same for the same name each time.
    pub fn derive(&self, name: &str) -> Zeroizing<[u8; 32]> {
        let mut hash = Sha256::new();
        // The length keeps names apart from what follows them.
        hash.update((name.len() as u64).to_be_bytes());
        hash.update(name.as_bytes());
        hash.update(self.0.as_bytes());
        Zeroizing::new(hash.finalize().into())
    }

    pub(crate) fn secret(&self) -> &SigningKey {
        &self.0
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("public", &self.public_key()).finish_non_exhaustive()
    }
}

/// Why there is no identity key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file cannot be used.
    #[error("the identity key cannot be loaded")]
    File(#[from] KeyFileError),
    /// The file holds something else.
    #[error("the identity key's file is damaged")]
    Format,
    /// No randomness for a new one.
    #[error("no identity key can be made")]
    Random(#[from] RandomError),
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.key");
        let made = Identity::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let loaded = Identity::load_or_create(&path).unwrap();
        assert_eq!(made.public_key(), loaded.public_key());
        let signature = loaded.sign(b"hello");
        assert!(made.public_key().verify(b"hello", &signature));
        assert!(!made.public_key().verify(b"hullo", &signature));
        // Nothing but the key is left in its folder.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_loose_or_damaged_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.key");
        Identity::load_or_create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let before = std::fs::read(&path).unwrap();
        assert!(matches!(
            Identity::load_or_create(&path),
            Err(IdentityError::File(KeyFileError::TooOpen { .. }))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), before);

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, &before[..before.len() - 5]).unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::Format)));
    }

    #[test]
    fn debug_shows_no_secret() {
        let identity = Identity::from_seed(&[7; 32]);
        let shown = format!("{identity:?}");
        assert!(shown.contains(&identity.public_key().to_string()));
        assert!(!shown.contains(&compact::encode(&[7; 32])) && !shown.contains("7, 7"));
    }
}
