//! The keys that sign SSH certificates, kept in a file of mode 0600.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cocalc_auth::{key_file, stream::SshAuthorities};
use cocalc_auth_ssh::{
    Authority, AuthorityError, HostRequest, KeyInfo, Kind, SignedCertificate, UserRequest,
};
use cocalc_core::BoxError;
use cocalc_ids::Timestamp;

use crate::signing::ChangeError;

/// The authority, and where it is kept: what signs is on disk first.
#[derive(Debug)]
pub(crate) struct SshCa {
    path: PathBuf,
    authority: Mutex<Authority>,
}

impl SshCa {
    /// Reads the keys, or makes them.
    pub(crate) fn open(path: PathBuf, now: Timestamp) -> Result<Self, BoxError> {
        let authority = match key_file::load(&path)? {
            Some(bytes) => Authority::from_bytes(&bytes)?,
            None => {
                let authority = Authority::generate(now)?;
                key_file::create(&path, &authority.to_bytes())?;
                authority
            }
        };
        Ok(Self { path, authority: Mutex::new(authority) })
    }

    pub(crate) fn public(&self) -> SshAuthorities {
        self.lock().public()
    }

    /// The public keys, and what is known of each.
    pub(crate) fn list(&self) -> (SshAuthorities, Vec<KeyInfo>) {
        let authority = self.lock();
        (authority.public(), authority.list())
    }

    pub(crate) fn sign_user(
        &self,
        request: &UserRequest,
        now: Timestamp,
    ) -> Result<SignedCertificate, AuthorityError> {
        self.lock().sign_user(request, now)
    }

    /// Certifies host keys, and says by which version of the authority.
    pub(crate) fn sign_hosts(
        &self,
        requests: &[HostRequest],
        now: Timestamp,
    ) -> Result<(Vec<SignedCertificate>, u64), AuthorityError> {
        let authority = self.lock();
        let signed: Result<_, _> = requests.iter().map(|request| authority.sign_host(request, now)).collect();
        Ok((signed?, authority.version()))
    }

    /// Lets the next key of a kind sign. With `force`, even if hosts and users
    /// may not know it yet.
    pub(crate) fn rotate(&self, kind: Kind, force: bool, now: Timestamp) -> Result<(), ChangeError> {
        self.change(|authority| authority.rotate(kind, force, now))
    }

    /// Withdraws a key; `false` if there is none of that fingerprint.
    pub(crate) fn withdraw(&self, fingerprint: &str, now: Timestamp) -> Result<bool, ChangeError> {
        self.change(|authority| authority.withdraw(fingerprint, now))
    }

    /// Rotates what is due, and drops what nothing valid was signed with.
    /// `true` if something changed.
    pub(crate) fn tend(&self, now: Timestamp) -> Result<bool, ChangeError> {
        self.change(|authority| authority.tend(now))
    }

    /// Changes a copy, saves it, and only then uses it.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Authority) -> Result<T, AuthorityError>,
    ) -> Result<T, ChangeError> {
        let mut authority = self.lock();
        let mut copy = Authority::from_bytes(&authority.to_bytes())?;
        let value = change(&mut copy)?;
        if copy.version() != authority.version() {
            key_file::save(&self.path, &copy.to_bytes())
                .map_err(|error| ChangeError::Failed(error.into()))?;
            *authority = copy;
        }
        Ok(value)
    }

    fn lock(&self) -> MutexGuard<'_, Authority> {
        self.authority.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<AuthorityError> for ChangeError {
    fn from(error: AuthorityError) -> Self {
        match error {
            AuthorityError::TooEarly => Self::TooEarly(error.into()),
            other => Self::Failed(other.into()),
        }
    }
}
