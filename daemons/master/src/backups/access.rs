//! What hosts get of the keys: of a project that they own, for one job, sealed
//! to them.

use cocalc_auth::audit::{Event, shortened};
use cocalc_auth_sealed::{Announced, Purpose, SealingKey};
use cocalc_backup::{Access, Repositories as _};
use cocalc_core::control::{BackupAccess, PeerReply};
use cocalc_ids::{HostId, ProjectId};
use cocalc_sqlite::master as store;
use zeroize::Zeroizing;

use crate::{operations, shared::Shared};

/// What the secrets are called.
const PURPOSE: &str = "backup repository";

impl Shared {
    /// The key to which secrets for a host are sealed, if it announced one with
    /// the signature of its identity key.
    pub(crate) async fn sealing_key(&self, host: HostId) -> store::Result<Option<SealingKey>> {
        let found = self.db(move |store| store.host(host)).await?;
        let out = found.is_out();
        let announced = found.capabilities.and_then(|can| can.sealing_key).filter(|_| !out);
        let Some(announced) = announced else { return Ok(None) };
        let identity = found.address.identity.parse().ok();
        let key = identity.and_then(|identity| Announced::from(announced).verify(&identity).ok());
        if key.is_none() {
            tracing::warn!(%host, "its sealing key is not signed with its identity key");
        }
        Ok(key)
    }

    /// Opens a repository for a host, if its project is that host's in that
    /// epoch.
    pub(crate) async fn open_repository(
        &self,
        host: HostId,
        request: BackupAccess,
    ) -> store::Result<PeerReply> {
        let refused = |message: String| {
            self.audit.record(self.of_key(host, &request, "deny", &message));
            tracing::warn!(%host, project = %request.project, repository = %request.repository, message,
                "no key for a repository");
            Ok(PeerReply::Error { message })
        };
        let Some(backups) = &self.backups else {
            return refused("this federation has no backups".to_owned());
        };
        let BackupAccess { project, epoch, repository, access } = request.clone();
        let owned = self.db(move |store| store.ownership(project)).await?;
        let comes = access == Access::Read && repository == project && self.comes_to(host, project).await?;
        match owned {
            Some((owner, current, false)) if (owner == host || comes) && current == epoch => {}
            _ => return refused(format!("project {project} is not this host's in epoch {epoch}")),
        }
        if access == Access::Delete {
            return refused("hosts do not delete backups".to_owned());
        }
        if repository != project && !(access == Access::Read && self.restores(project, repository).await?) {
            return refused(format!("nothing of project {repository} is being restored into {project}"));
        }
        if self.db(move |store| store.erases_backups(repository)).await? {
            return refused("its backups are being erased".to_owned());
        }
        let Some(key) = self.sealing_key(host).await? else {
            return refused("this host announced no key to seal secrets to".to_owned());
        };
        let opened = match backups.repositories.repository(repository, access).await {
            Ok(opened) => opened,
            Err(error) => {
                tracing::error!(%repository, error = %cocalc_core::chain(&*error), "cannot open a repository");
                return refused("the master cannot open the repository now; its log says why".to_owned());
            }
        };
        if access == Access::Append {
            self.db(move |store| store.use_backup_repository(repository)).await?;
        }
        let Ok(text) = serde_json::to_vec(&opened).map(Zeroizing::new) else {
            return refused("the repository cannot be written".to_owned());
        };
        let purpose = Purpose { what: PURPOSE, host, project: repository, epoch };
        let sealed = key.seal(&purpose, &text).ok().and_then(|sealed| match serde_json::to_value(sealed) {
            Ok(serde_json::Value::String(sealed)) => Some(sealed),
            _ => None,
        });
        let Some(sealed) = sealed else { return refused("the key cannot be sealed".to_owned()) };
        self.audit.record(self.of_key(host, &request, "key", "given"));
        Ok(PeerReply::BackupAccess { sealed })
    }

    /// Whether a project of a dead host is being brought up on `host`.
    async fn comes_to(&self, host: HostId, project: ProjectId) -> store::Result<bool> {
        let running = self.db(move |store| match store.project(project) {
            Ok(found) => found.fence.map(|id| store.operation(id)).transpose(),
            Err(store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        });
        Ok(running
            .await?
            .is_some_and(|operation| matches!(operation.job, store::Job::Recover { to, .. } if to == host)))
    }

    /// Whether backups of `source` are being restored into `project`.
    async fn restores(&self, project: ProjectId, source: ProjectId) -> store::Result<bool> {
        let running = self.db(move |store| {
            let Some(id) = store.project(project)?.fence else { return Ok(None) };
            Ok(Some(store.operation(id)?.job))
        });
        let restores = |job| operations::restores_from(&job, source, project);
        Ok(running.await?.is_some_and(restores))
    }

    fn of_key(&self, host: HostId, request: &BackupAccess, kind: &str, reason: &str) -> Event {
        let mut event = Event::new(kind, shortened(reason.to_owned()), self.now());
        event.project = Some(request.repository);
        event.epoch = Some(request.epoch);
        let access = match request.access {
            Access::Read => "read",
            Access::Append => "append",
            Access::Delete => "delete",
        };
        event.action = Some(format!("backup.{access}"));
        event.subject = Some(format!("host {host} for {}", request.project));
        event
    }
}
