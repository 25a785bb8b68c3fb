//! The keys that wrap the keys of repositories, kept in a file of mode 0600.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use cocalc_auth::key_file;
use cocalc_backup::{KeyError, RepositoryKey, RepositoryName, WrappedKey, WrappingKey, WrappingKeys};
use cocalc_core::BoxError;
use cocalc_ids::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// The keys as they are in the file.
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// The one that wraps.
    current: String,
    /// All of them, in base64, by their names.
    keys: BTreeMap<String, String>,
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.keys.values_mut().for_each(zeroize::Zeroize::zeroize);
    }
}

/// The keys, and where they are kept. Without this file no backup opens any
/// more, but with the escrow files.
#[derive(Debug)]
pub(crate) struct Wrapping {
    path: PathBuf,
    keys: Mutex<WrappingKeys>,
}

impl Wrapping {
    /// Reads the keys, or makes the first.
    pub(super) fn open(path: PathBuf, now: Timestamp) -> Result<Self, BoxError> {
        let stored = match key_file::load(&path)? {
            Some(bytes) => serde_json::from_slice(&bytes)?,
            None => {
                let mut stored = Stored { current: String::new(), keys: BTreeMap::new() };
                add(&mut stored, now)?;
                key_file::create(&path, &Zeroizing::new(serde_json::to_vec(&stored)?))?;
                stored
            }
        };
        let keys = opened(&stored)?;
        Ok(Self { path, keys: Mutex::new(keys) })
    }

    pub(super) fn wrap(&self, name: RepositoryName, key: &RepositoryKey) -> Result<String, BoxError> {
        let wrapped = self.lock().wrap(name, key)?;
        Ok(serde_json::to_string(&wrapped)?)
    }

    pub(super) fn unwrap(&self, name: RepositoryName, wrapped: &str) -> Result<RepositoryKey, BoxError> {
        let wrapped: WrappedKey = serde_json::from_str(wrapped).map_err(|_| KeyError::Malformed)?;
        Ok(self.lock().unwrap(name, &wrapped)?)
    }

    /// Makes another key the one that wraps; those before still open. It is on
    /// disk before it wraps anything.
    pub(super) fn rotate(&self, now: Timestamp) -> Result<String, BoxError> {
        let mut keys = self.lock();
        let mut stored = self.stored()?;
        add(&mut stored, now)?;
        key_file::save(&self.path, &Zeroizing::new(serde_json::to_vec(&stored)?))?;
        *keys = opened(&stored)?;
        Ok(stored.current.clone())
    }

    /// Drops all keys but the one that wraps, once nothing is wrapped by them
    /// any more. How many went.
    pub(super) fn retire(&self) -> Result<usize, BoxError> {
        let mut keys = self.lock();
        let mut stored = self.stored()?;
        let before = stored.keys.len();
        let current = stored.current.clone();
        stored.keys.retain(|id, _| *id == current);
        let gone = before - stored.keys.len();
        if gone > 0 {
            key_file::save(&self.path, &Zeroizing::new(serde_json::to_vec(&stored)?))?;
            *keys = opened(&stored)?;
        }
        Ok(gone)
    }

    /// The name of the key that wraps a key, as it is stored.
    pub(super) fn wrapped_by(wrapped: &str) -> Option<String> {
        serde_json::from_str::<WrappedKey>(wrapped).ok().map(|wrapped| wrapped.wrapped_by)
    }

    fn stored(&self) -> Result<Stored, BoxError> {
        let bytes = key_file::load(&self.path)?.ok_or("the file with the wrapping keys is gone")?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    fn lock(&self) -> MutexGuard<'_, WrappingKeys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds a key that wraps from now on.
fn add(stored: &mut Stored, now: Timestamp) -> Result<(), BoxError> {
    let mut key = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *key)?;
    // Two in one second have two names.
    let mut id = format!("w{}", now.secs());
    while stored.keys.contains_key(&id) {
        id.push('+');
    }
    stored.keys.insert(id.clone(), STANDARD.encode(*key));
    stored.current = id;
    Ok(())
}

fn opened(stored: &Stored) -> Result<WrappingKeys, BoxError> {
    let key = |id: &String| -> Result<WrappingKey, BoxError> {
        let text = stored.keys.get(id).ok_or("the current wrapping key is not in the file")?;
        let bytes: [u8; 32] = Zeroizing::new(STANDARD.decode(text)?).as_slice().try_into()?;
        Ok(WrappingKey::new(id.clone(), bytes))
    };
    let mut keys = WrappingKeys::new(key(&stored.current)?);
    for id in stored.keys.keys().filter(|id| **id != stored.current) {
        keys.rotate(key(id)?);
    }
    keys.rotate(key(&stored.current)?);
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_wrapped_opens_after_restarts_and_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup-keys");
        let project = || RepositoryName::Project(cocalc_ids::ProjectId::from_bytes([7; 16]));
        let now = Timestamp::from_secs(7);
        let key = RepositoryKey::generate().unwrap();
        let wrapping = Wrapping::open(path.clone(), now).unwrap();
        let first = wrapping.wrap(project(), &key).unwrap();
        drop(wrapping);
        let wrapping = Wrapping::open(path.clone(), now).unwrap();
        assert_eq!(wrapping.unwrap(project(), &first).unwrap(), key);
        assert!(wrapping.unwrap(cocalc_ids::ProjectId::random().into(), &first).is_err());
        let current = wrapping.rotate(now).unwrap();
        assert_ne!(Wrapping::wrapped_by(&first), Some(current.clone()));
        drop(wrapping);
        let wrapping = Wrapping::open(path.clone(), now).unwrap();
        assert_eq!(wrapping.unwrap(project(), &first).unwrap(), key);
        let second = wrapping.wrap(project(), &key).unwrap();
        assert_eq!(Wrapping::wrapped_by(&second), Some(current));
        assert_eq!((wrapping.retire().unwrap(), wrapping.retire().unwrap()), (1, 0));
        let wrapping = Wrapping::open(path, now).unwrap();
        assert!(wrapping.unwrap(project(), &first).is_err());
        assert_eq!(wrapping.unwrap(project(), &second).unwrap(), key);
    }
}
