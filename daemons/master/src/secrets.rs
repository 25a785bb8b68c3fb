//! The secrets of projects: wrapped at rest, sealed on their way to the host that
//! runs the project, and shown to nobody.

use std::{collections::BTreeMap, path::Path};

use cocalc_auth::identity::Identity;
use cocalc_auth_sealed::{Opener, Purpose, Sealed, SealingKey};
use cocalc_core::{
    BoxError,
    control::{PeerReply, SECRETS_PURPOSE},
};
use cocalc_ids::{Epoch, HostId, ProjectId};
use cocalc_sqlite::master as store;
use zeroize::Zeroizing;

use crate::shared::Shared;

/// What they are wrapped for at rest, before the name.
const AT_REST: &str = "project secret at rest: ";

/// The key that wraps them, in a file of mode 0600. Without it they are lost.
#[derive(Debug)]
pub(crate) struct SecretsKey {
    opener: Opener,
    key: SealingKey,
}

impl SecretsKey {
    /// Reads the key, or makes it.
    pub(crate) fn open(path: &Path) -> Result<Self, BoxError> {
        let identity = Identity::load_or_create(path)?;
        let opener = Opener::of(&identity);
        let key = opener.announce(&identity).verify(&identity.public_key())?;
        Ok(Self { opener, key })
    }

    /// Wraps the value of one secret of one project.
    pub(crate) fn wrap(&self, project: ProjectId, name: &str, value: &str) -> Result<String, BoxError> {
        let what = format!("{AT_REST}{name}");
        let sealed = self.key.seal(&at_rest(&what, project), value.as_bytes())?;
        match serde_json::to_value(sealed)? {
            serde_json::Value::String(text) => Ok(text),
            _ => Err("what was sealed is no text".into()),
        }
    }

    fn unwrap(&self, project: ProjectId, name: &str, wrapped: &str) -> Result<Zeroizing<String>, BoxError> {
        let sealed: Sealed = serde_json::from_value(wrapped.into())?;
        let what = format!("{AT_REST}{name}");
        let opened = self.opener.open(&at_rest(&what, project), &sealed)?;
        Ok(Zeroizing::new(std::str::from_utf8(&opened)?.to_owned()))
    }
}

/// At rest there is neither host nor grant.
fn at_rest(what: &str, project: ProjectId) -> Purpose<'_> {
    Purpose { what, host: HostId::from_bytes([0; 16]), project, epoch: Epoch::FIRST }
}

impl Shared {
    /// The secrets of a project for a host that owns it in that epoch.
    pub(crate) async fn secrets_for(
        &self,
        host: HostId,
        project: ProjectId,
        epoch: Epoch,
    ) -> store::Result<PeerReply> {
        let refused = |message: &str| Ok(PeerReply::Error { message: message.to_owned() });
        let (owned, stored) =
            self.db(move |store| Ok((store.ownership(project)?, store.secrets(project)?))).await?;
        if !matches!(owned, Some((owner, current, false)) if owner == host && current == epoch) {
            return refused("the project is not this host's in that epoch");
        }
        let Some(key) = self.sealing_key(host).await? else {
            return refused("this host announced no key to seal secrets to");
        };
        let mut opened: BTreeMap<String, Zeroizing<String>> = BTreeMap::new();
        for secret in stored {
            match self.secrets.unwrap(project, &secret.name, &secret.wrapped) {
                Ok(value) => drop(opened.insert(secret.name, value)),
                Err(error) => {
                    let error = cocalc_core::chain(&*error);
                    tracing::error!(%project, name = secret.name, error, "a secret cannot be opened");
                }
            }
        }
        let plain: BTreeMap<&str, &str> =
            opened.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let Ok(text) = serde_json::to_vec(&plain).map(Zeroizing::new) else {
            return refused("the secrets cannot be written");
        };
        let purpose = Purpose { what: SECRETS_PURPOSE, host, project, epoch };
        match key.seal(&purpose, &text).map(serde_json::to_value) {
            Ok(Ok(serde_json::Value::String(sealed))) => Ok(PeerReply::Secrets { sealed }),
            _ => refused("the secrets cannot be sealed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrapped_opens_for_its_project_and_name_alone_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets-key");
        let (project, key) = (ProjectId::random(), SecretsKey::open(&path).unwrap());
        let wrapped = key.wrap(project, "TOKEN", "hunter2").unwrap();
        assert!(!wrapped.contains("hunter2"));
        let key = SecretsKey::open(&path).unwrap();
        assert_eq!(&**key.unwrap(project, "TOKEN", &wrapped).unwrap(), "hunter2");
        assert!(key.unwrap(project, "OTHER", &wrapped).is_err());
        assert!(key.unwrap(ProjectId::random(), "TOKEN", &wrapped).is_err());
        let other = SecretsKey::open(&dir.path().join("other")).unwrap();
        assert!(other.unwrap(project, "TOKEN", &wrapped).is_err());
    }
}
