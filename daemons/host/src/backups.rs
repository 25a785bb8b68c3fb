//! The repositories of this host's projects, as the master opens them: place,
//! credentials and key of one, for one job, sealed to this host.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth_sealed::{Opener, Purpose, Sealed};
use cocalc_backup::{Access, Repositories, Repository, Rustic};
use cocalc_core::{
    BoxError,
    backups::{Keeper, KeeperParts, Status, StatusStore},
    bus::{Bus, Payload},
    clock::SystemClock,
    connector::Peer,
    control::{BackupAccess, PeerReply, PeerRequest, api_subject},
    grant::Ledger,
    ids::{Epoch, HostId, ProjectId},
    snapshots,
    storage::Storage,
};
use cocalc_daemon::start::Error;
use cocalc_sqlite::HostBackups;
use tokio::sync::Notify;

use crate::{config::Config, drill::Drill};

/// How long the master may take to answer.
const LIMIT: Duration = Duration::from_secs(10);
/// How long to wait before telling the master again what it did not hear.
const AGAIN: Duration = Duration::from_secs(2);
/// What the master's secrets for backups are called.
const PURPOSE: &str = "backup repository";

/// Asks the master.
pub(crate) struct FromMaster {
    pub(crate) host: HostId,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) ledger: Ledger,
    pub(crate) opener: Opener,
}

impl fmt::Debug for FromMaster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FromMaster").field("host", &self.host).finish_non_exhaustive()
    }
}

impl FromMaster {
    /// Place, credentials and key of the repository of a project of this host.
    async fn open(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        let epoch = self.ledger.known(project)?.may_run();
        let epoch = epoch.ok_or_else(|| format!("project {project} is not this host's"))?;
        self.open_for(project, epoch, project, access).await
    }

    /// The same of the repository of `of`, for the sake of `project`, which is
    /// the same unless another's backups are restored into it.
    async fn open_for(
        &self,
        project: ProjectId,
        epoch: Epoch,
        of: ProjectId,
        access: Access,
    ) -> Result<Repository, BoxError> {
        let request = PeerRequest::BackupAccess(BackupAccess { project, epoch, repository: of, access });
        let subject = api_subject(Peer::Host(self.host));
        let answer = self.bus.request(&subject, Payload::json(&request)?, LIMIT).await;
        let answer = answer.map_err(|error| {
            format!("the master, which has the key, does not answer: {}", cocalc_core::chain(&error))
        })?;
        match answer.payload.parse::<PeerReply>()? {
            PeerReply::BackupAccess { sealed } => {
                let sealed: Sealed = serde_json::from_value(sealed.into())?;
                let purpose = Purpose { what: PURPOSE, host: self.host, project: of, epoch };
                let opened = self.opener.open(&purpose, &sealed)?;
                Ok(serde_json::from_slice(&opened)?)
            }
            PeerReply::Error { message } => Err(message.into()),
            _ => Err("the master answered something else".into()),
        }
    }
}

/// Reads the repositories of any project for the sake of one of this host's,
/// or of one that it expects.
struct Reading {
    master: Arc<FromMaster>,
    project: ProjectId,
    epoch: Epoch,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").field("project", &self.project).finish_non_exhaustive()
    }
}

#[async_trait]
impl Repositories for Reading {
    async fn repository(&self, of: ProjectId, _: Access) -> Result<Repository, BoxError> {
        self.master.open_for(self.project, self.epoch, of, Access::Read).await
    }

    async fn erased(&self, _: ProjectId) -> Result<(), BoxError> {
        Err("only the master erases".into())
    }
}

#[async_trait]
impl Repositories for FromMaster {
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        self.open(project, access).await
    }

    async fn erased(&self, _: ProjectId) -> Result<(), BoxError> {
        Err("only the master erases".into())
    }
}

/// What the master has not heard yet of how projects stand. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct News(Arc<Untold>);

#[derive(Debug, Default)]
struct Untold {
    statuses: Mutex<BTreeMap<ProjectId, Status>>,
    more: Notify,
}

impl News {
    pub(crate) fn hear(&self, status: &Status) {
        self.lock().insert(status.project, status.clone());
        self.0.more.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<ProjectId, Status>> {
        self.0.statuses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the master, each until it has heard it, until the future is
    /// dropped.
    pub(crate) async fn tell(self, host: HostId, bus: Arc<dyn Bus>) {
        let subject = api_subject(Peer::Host(host));
        loop {
            let next = self.lock().first_key_value().map(|(_, status)| status.clone());
            let Some(status) = next else {
                self.0.more.notified().await;
                continue;
            };
            let request = PeerRequest::BackupStatus(Box::new(status.clone()));
            let told = match Payload::json(&request) {
                Ok(payload) => bus.request(&subject, payload, LIMIT).await.is_ok(),
                Err(_) => true,
            };
            if !told {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            let mut statuses = self.lock();
            if statuses.get(&status.project) == Some(&status) {
                statuses.remove(&status.project);
            }
        }
    }
}

/// Opens the keeper of backups; `None`, with a warning, if this host cannot
/// make any.
#[expect(clippy::too_many_arguments, reason = "what a keeper of backups works with")]
pub(crate) async fn open(
    config: &Config,
    ledger: Ledger,
    storage: Arc<dyn Storage>,
    snapshots: snapshots::Keeper,
    from_master: Arc<FromMaster>,
    trial: Drill,
    news: &News,
    free_bytes: Arc<dyn Fn() -> u64 + Send + Sync>,
) -> Result<Option<Keeper>, Error> {
    let master = Arc::clone(&from_master);
    let mut rustic = Rustic::builder(from_master).bounds(config.backups.bounds());
    if let Some(worker) = &config.backups.worker {
        rustic = rustic.worker(worker);
    }
    let rustic = match rustic.build() {
        Ok(rustic) => rustic,
        Err(error) => {
            tracing::warn!(error = %cocalc_core::chain(&error), "this host makes no backups");
            return Ok(None);
        }
    };
    let store = HostBackups::open(&config.data_dir.join("backups.db"));
    let statuses: Arc<dyn StatusStore> =
        Arc::new(store.map_err(|error| Error::open("backup state")(error.into()))?);
    let told = news.clone();
    let reader = rustic.clone();
    let keeper = Keeper::open(KeeperParts {
        ledger,
        storage,
        backups: Arc::new(rustic),
        snapshots,
        clock: Arc::new(SystemClock),
        statuses,
        tell: Arc::new(move |status| told.hear(status)),
        reading: Arc::new(move |project, epoch| {
            let reading = Reading { master: Arc::clone(&master), project, epoch };
            Arc::new(reader.with_repositories(Arc::new(reading)))
        }),
        free_bytes,
        jobs_max: config.backups.jobs_max.into(),
        trial: Some(Arc::new(trial)),
    });
    let keeper = keeper.await.map_err(Error::open("backup state"))?;
    // What the master did not hear of the process before.
    for status in keeper.statuses() {
        news.hear(&status);
    }
    Ok(Some(keeper))
}
