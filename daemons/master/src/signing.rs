//! The ring of signing keys, kept in a file of mode 0600.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cocalc_auth::{
    key_file,
    mint::{KeyInfo, MintError, Minted, NewToken, RotateError, SigningRing},
    stream::PublicRing,
    token::Algorithm,
};
use cocalc_core::BoxError;
use cocalc_ids::Timestamp;

/// The ring, and where it is kept: what signs is on disk first.
#[derive(Debug)]
pub(crate) struct Signing {
    path: PathBuf,
    ring: Mutex<SigningRing>,
}

impl Signing {
    /// Reads the ring, or makes one. Keys made from now on have `algorithm`.
    pub(crate) fn open(path: PathBuf, algorithm: Algorithm, now: Timestamp) -> Result<Self, BoxError> {
        let mut ring = match key_file::load(&path)? {
            Some(bytes) => SigningRing::from_bytes(&bytes)?,
            None => {
                let ring = SigningRing::generate(algorithm, now)?;
                key_file::create(&path, &ring.to_bytes())?;
                ring
            }
        };
        ring.use_algorithm(algorithm);
        Ok(Self { path, ring: Mutex::new(ring) })
    }

    pub(crate) fn public(&self) -> PublicRing {
        self.lock().public()
    }

    /// The public ring, and what is known of each key.
    pub(crate) fn list(&self) -> (PublicRing, Vec<KeyInfo>) {
        let ring = self.lock();
        (ring.public(), ring.list())
    }

    pub(crate) fn current_kid(&self) -> String {
        self.lock().current_kid().to_owned()
    }

    pub(crate) fn mint(&self, new: &NewToken, now: Timestamp) -> Result<Minted, MintError> {
        self.lock().mint(new, now)
    }

    /// Lets the next key sign. With `force`, even if hosts may not know it yet.
    pub(crate) fn rotate(&self, force: bool, now: Timestamp) -> Result<(), ChangeError> {
        self.change(|ring| ring.rotate(force, now).map_err(ChangeError::from))
    }

    /// Withdraws a key; `false` if there is none of that name.
    pub(crate) fn withdraw(&self, kid: &str, now: Timestamp) -> Result<bool, ChangeError> {
        self.change(|ring| ring.withdraw(kid, now).map_err(|error| ChangeError::Failed(error.into())))
    }

    /// Rotates if it is time, and drops keys whose tokens have all expired.
    /// `true` if the ring changed.
    pub(crate) fn tend(&self, now: Timestamp) -> Result<bool, ChangeError> {
        let due = self.lock().rotation_due(now);
        self.change(|ring| {
            if due {
                ring.rotate(false, now)?;
            }
            Ok(ring.expire(now) || due)
        })
    }

    /// Changes a copy, saves it, and only then uses it.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut SigningRing) -> Result<T, ChangeError>,
    ) -> Result<T, ChangeError> {
        let mut ring = self.lock();
        let mut copy =
            SigningRing::from_bytes(&ring.to_bytes()).map_err(|error| ChangeError::Failed(error.into()))?;
        let value = change(&mut copy)?;
        if copy.version() != ring.version() {
            key_file::save(&self.path, &copy.to_bytes())
                .map_err(|error| ChangeError::Failed(error.into()))?;
            *ring = copy;
        }
        Ok(value)
    }

    fn lock(&self) -> MutexGuard<'_, SigningRing> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the ring was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("the keys cannot be changed yet")]
    TooEarly(#[source] BoxError),
    #[error("the keys could not be changed")]
    Failed(#[source] BoxError),
}

impl From<RotateError> for ChangeError {
    fn from(error: RotateError) -> Self {
        match error {
            RotateError::TooEarly { .. } | RotateError::TooOften { .. } => Self::TooEarly(error.into()),
            other => Self::Failed(other.into()),
        }
    }
}
