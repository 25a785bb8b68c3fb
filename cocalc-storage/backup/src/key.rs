//! Keys: of a repository, of the master that wraps it, and the escrow file.

use std::{collections::BTreeMap, fmt, fmt::Write as _};

use aes_gcm::{
    Aes256Gcm, KeyInit as _,
    aead::{Aead as _, Payload},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    location::{Location, Secret},
    name::RepositoryName,
};

/// What opens a repository: the key that encrypts its data, and a password
/// that opens it with the stock programs.
///
/// The data key spares each call the key derivation of the password, which
/// costs half a second; the password can change while the data key stays.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RepositoryKey {
    /// 256 random bits, as text.
    pub password: Secret,
    /// The data key, as rustic writes it.
    pub data: Secret,
}

impl RepositoryKey {
    /// Makes a new one.
    ///
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        let password = hex(&*random::<32>()?);
        // The key of AES-256 and the two halves of Poly1305-AES.
        let data = format!(
            r#"{{"mac":{{"k":"{}","r":"{}"}},"encrypt":"{}"}}"#,
            STANDARD.encode(random::<16>()?.as_slice()),
            STANDARD.encode(random::<16>()?.as_slice()),
            STANDARD.encode(random::<32>()?.as_slice()),
        );
        Ok(Self { password: Secret::new(password), data: Secret::new(data) })
    }

    /// The same data key under a new password: what was stored stays readable,
    /// and stock programs need the new password once
    /// [`Rustic::keep_password`](crate::Rustic::keep_password) was called.
    ///
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn with_new_password(&self) -> Result<Self, KeyError> {
        Ok(Self { password: Secret::new(hex(&*random::<32>()?)), data: self.data.clone() })
    }

    /// The escrow file of the repository called `name`: with it, and access to
    /// where the repository is, stock restic or rustic restores everything. A
    /// shell reads it: `set -a; . FILE; restic restore latest --target DIR`.
    pub fn escrow(&self, name: impl Into<RepositoryName>, location: &Location) -> Secret {
        let of = match name.into() {
            RepositoryName::Project(project) => format!("of project {project}"),
            name @ RepositoryName::Shard(_) => format!("in {name}, of many projects,"),
        };
        let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
        let mut text = format!(
            "# Restores the backups {of} without CoCalc. Keep it secret.\n\
             # set -a; . THIS_FILE; restic snapshots; restic restore latest --target DIR\n\
             # rustic reads the same variables, named RUSTIC_.\n\
             # Never run `restic prune` here: it does not see what CoCalc has marked.\n"
        );
        let repository = quoted(&location.restic());
        let password = quoted(self.password.expose());
        for program in ["RESTIC", "RUSTIC"] {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{program}_REPOSITORY={repository}\n{program}_PASSWORD={password}");
        }
        Secret::new(text)
    }
}

/// A key of the master that wraps the keys of repositories.
#[derive(Clone)]
pub struct WrappingKey {
    id: String,
    key: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for WrappingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrappingKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl WrappingKey {
    /// Takes 256 bits of a key that `id` names.
    pub fn new(id: impl Into<String>, key: [u8; 32]) -> Self {
        Self { id: id.into(), key: Zeroizing::new(key) }
    }

    /// Makes a new one.
    ///
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn generate(id: impl Into<String>) -> Result<Self, KeyError> {
        Ok(Self { id: id.into(), key: random()? })
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new((&*self.key).into())
    }
}

/// The key of a repository as it is stored: encrypted and bound to its name.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WrappedKey {
    /// Which wrapping key opens it.
    pub wrapped_by: String,
    /// 96 random bits, in base64.
    nonce: String,
    /// AES-256-GCM, in base64.
    sealed: String,
}

/// The wrapping keys of a master: the current one wraps, and former ones still
/// open.
#[derive(Clone, Debug)]
pub struct WrappingKeys {
    current: String,
    keys: BTreeMap<String, WrappingKey>,
}

impl WrappingKeys {
    /// Begins with one key.
    pub fn new(current: WrappingKey) -> Self {
        Self { current: current.id.clone(), keys: BTreeMap::from([(current.id.clone(), current)]) }
    }

    /// Makes `next` the current key. What the former ones wrapped still opens.
    pub fn rotate(&mut self, next: WrappingKey) {
        self.current.clone_from(&next.id);
        self.keys.insert(next.id.clone(), next);
    }

    /// Drops a former key. What only it wrapped opens no more.
    pub fn retire(&mut self, id: &str) {
        if id != self.current {
            self.keys.remove(id);
        }
    }

    /// The key that wraps now, by its id.
    pub fn current(&self) -> &str {
        &self.current
    }

    /// Wraps the key of the repository called `name`, a project's id or a shard's.
    ///
    /// # Errors
    ///
    /// If the system has no randomness.
    pub fn wrap(&self, name: impl Into<RepositoryName>, key: &RepositoryKey) -> Result<WrappedKey, KeyError> {
        let wrapping = self.keys.get(&self.current).ok_or_else(|| KeyError::Unknown(self.current.clone()))?;
        let nonce = random::<12>()?;
        let text = Zeroizing::new(serde_json::to_vec(key).map_err(|_| KeyError::Malformed)?);
        let bound = bound_to(name.into(), &wrapping.id);
        let sealed = wrapping
            .cipher()
            .encrypt((&*nonce).into(), Payload { msg: &text, aad: &bound })
            .map_err(|_| KeyError::Malformed)?;
        Ok(WrappedKey {
            wrapped_by: wrapping.id.clone(),
            nonce: STANDARD.encode(nonce.as_slice()),
            sealed: STANDARD.encode(sealed),
        })
    }

    /// Opens what [`wrap`](Self::wrap) made for the same name.
    ///
    /// # Errors
    ///
    /// If the wrapping key is unknown, or it was made for another repository or
    /// changed since.
    pub fn unwrap(
        &self,
        name: impl Into<RepositoryName>,
        wrapped: &WrappedKey,
    ) -> Result<RepositoryKey, KeyError> {
        let wrapping = self
            .keys
            .get(&wrapped.wrapped_by)
            .ok_or_else(|| KeyError::Unknown(wrapped.wrapped_by.clone()))?;
        let nonce: [u8; 12] = STANDARD
            .decode(&wrapped.nonce)
            .ok()
            .and_then(|nonce| nonce.try_into().ok())
            .ok_or(KeyError::Malformed)?;
        let sealed = STANDARD.decode(&wrapped.sealed).map_err(|_| KeyError::Malformed)?;
        let bound = bound_to(name.into(), &wrapping.id);
        let text = wrapping
            .cipher()
            .decrypt((&nonce).into(), Payload { msg: &sealed, aad: &bound })
            .map_err(|_| KeyError::NotAuthentic)?;
        serde_json::from_slice(&Zeroizing::new(text)).map_err(|_| KeyError::Malformed)
    }
}

/// A key cannot be wrapped or opened.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The wrapping key is not here.
    #[error("wrapping key {0} is not known here")]
    Unknown(String),
    /// It was made for another repository, or changed.
    #[error("the wrapped key is not authentic: it belongs to another repository or was changed")]
    NotAuthentic,
    /// It is not a wrapped key at all.
    #[error("not a wrapped key")]
    Malformed,
    /// The system has no randomness.
    #[error("the system has no randomness")]
    Random,
}

/// A wrapped key opens only for the repository it was made for.
fn bound_to(name: RepositoryName, id: &str) -> Vec<u8> {
    format!("cocalc repository key v1\n{name}\n{id}").into_bytes()
}

fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>, KeyError> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut *bytes).map_err(|_| KeyError::Random)?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use cocalc_core::ids::ProjectId;

    use super::*;
    use crate::name::ShardId;

    #[test]
    fn a_wrapped_key_opens_for_its_project_only_and_outlives_a_rotation() {
        let mut keys = WrappingKeys::new(WrappingKey::generate("one").unwrap());
        let (project, other) = (ProjectId::random(), ProjectId::random());
        let key = RepositoryKey::generate().unwrap();
        let wrapped = keys.wrap(project, &key).unwrap();
        assert!(!serde_json::to_string(&wrapped).unwrap().contains(key.password.expose()));
        assert_eq!(keys.unwrap(other, &wrapped), Err(KeyError::NotAuthentic));
        assert_eq!(keys.unwrap(ShardId(0), &wrapped), Err(KeyError::NotAuthentic));
        keys.rotate(WrappingKey::generate("two").unwrap());
        assert_eq!(keys.unwrap(project, &wrapped).unwrap(), key);
        let again = keys.wrap(project, &key).unwrap();
        assert_eq!(again.wrapped_by, "two");
        keys.retire("one");
        assert_eq!(keys.unwrap(project, &wrapped), Err(KeyError::Unknown("one".into())));
        assert_eq!(keys.unwrap(project, &again).unwrap(), key);
        let relabelled = WrappedKey { wrapped_by: "two".into(), ..wrapped };
        assert_eq!(keys.unwrap(project, &relabelled), Err(KeyError::NotAuthentic));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let key = RepositoryKey::generate().unwrap();
        let shown = format!("{key:?} {:?}", WrappingKeys::new(WrappingKey::generate("one").unwrap()));
        assert!(!shown.contains(key.password.expose()) && !shown.contains(key.data.expose()), "{shown}");
        assert_ne!(RepositoryKey::generate().unwrap(), key);
        let next = key.with_new_password().unwrap();
        assert!(next.data == key.data && next.password != key.password);
    }
}
