//! Who has to hear of a change.

use std::sync::Arc;

use cocalc_auth::stream::Entry;
use cocalc_core::connector::Peer;
use cocalc_ids::{AccountId, HostId, ProjectId, ProxyId};
use cocalc_sqlite::master as store;

use super::streams::{About, Target, host_entry, project_entries, proxy_entry};
use crate::shared::Shared;

impl Shared {
    /// The members, keys or settings of a project changed: its owner hears.
    pub(crate) async fn announce_project(&self, project: ProjectId) -> store::Result<Vec<Target>> {
        let host = match self.db(move |store| store.project(project)).await {
            Ok(project) => project.host,
            Err(store::Error::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        Ok(vec![self.tell_of_project(host, project).await?])
    }

    /// Tells one host what it should know of a project now, which may be that
    /// it is not its own.
    pub(crate) async fn tell_of_project(&self, host: HostId, project: ProjectId) -> store::Result<Target> {
        let about = About { project: Some(project) };
        self.streams.send(Peer::Host(host), about, move |store| project_entries(store, host, project)).await
    }

    /// A project has another owner, or another epoch: both hosts hear, and all
    /// proxies.
    pub(crate) async fn announce_owner(&self, project: ProjectId, former: HostId) -> store::Result<()> {
        let Some((host, epoch, _)) = self.db(move |store| store.ownership(project)).await? else {
            return Ok(());
        };
        self.tell_of_project(host, project).await?;
        if former != host {
            self.tell_of_project(former, project).await?;
        }
        for proxy in self.db(|store| store.proxies()).await? {
            let route = vec![Entry::Route { project, host, epoch }];
            self.streams.send(Peer::Proxy(proxy.id), About::default(), move |_| Ok(route)).await?;
        }
        Ok(())
    }

    /// An account changed: every host with a project of it hears.
    pub(crate) async fn announce_account(&self, account: AccountId) -> store::Result<Vec<Target>> {
        let hosts = self.db(move |store| store.hosts_of_account(account)).await?;
        let mut targets = Vec::with_capacity(hosts.len());
        for host in hosts {
            let read = move |store: &store::Store| Ok(vec![Entry::Account(store.account_state(account)?)]);
            targets.push(self.streams.send(Peer::Host(host), About::default(), read).await?);
        }
        Ok(targets)
    }

    /// The keys changed: everybody hears.
    pub(crate) async fn announce_ring(&self) -> store::Result<Vec<Target>> {
        let mut targets = Vec::new();
        for peer in self.everybody().await? {
            // Read again for each, so that no stream ends with an older ring.
            let entry = Entry::KeyRing(self.signing.public());
            targets.push(self.streams.send(peer, About::default(), move |_| Ok(vec![entry])).await?);
        }
        Ok(targets)
    }

    /// The keys that sign SSH certificates changed: everybody hears.
    pub(crate) async fn announce_ssh_ca(&self) -> store::Result<Vec<Target>> {
        let mut targets = Vec::new();
        for peer in self.everybody().await? {
            let entry = Entry::SshAuthorities(self.ssh_ca.public());
            targets.push(self.streams.send(peer, About::default(), move |_| Ok(vec![entry])).await?);
        }
        Ok(targets)
    }

    /// A host is new, somewhere else, or withdrawn: everybody hears.
    pub(crate) async fn announce_host(&self, host: HostId) -> store::Result<Vec<Target>> {
        let mut targets = Vec::new();
        for peer in self.everybody().await? {
            let read = move |store: &store::Store| Ok(vec![host_entry(&store.host(host)?)?]);
            targets.push(self.streams.send(peer, About::default(), read).await?);
        }
        Ok(targets)
    }

    /// A proxy is new, or withdrawn: every host hears.
    pub(crate) async fn announce_proxy(&self, proxy: ProxyId) -> store::Result<Vec<Target>> {
        let mut targets = Vec::new();
        for host in self.db(|store| store.hosts()).await? {
            let read = move |store: &store::Store| Ok(vec![proxy_entry(store, proxy)?]);
            targets.push(self.streams.send(Peer::Host(host.id), About::default(), read).await?);
        }
        Ok(targets)
    }

    async fn everybody(&self) -> store::Result<Vec<Peer>> {
        let hosts = self.db(|store| store.hosts()).await?;
        let proxies = self.db(|store| store.proxies()).await?;
        let hosts = hosts.into_iter().map(|host| Peer::Host(host.id));
        Ok(hosts.chain(proxies.into_iter().map(|proxy| Peer::Proxy(proxy.id))).collect())
    }
}

/// Tends the keys: rotates them when it is time, and tells everybody.
pub(crate) async fn tend_keys(shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(std::time::Duration::from_secs(60));
    loop {
        tick.tick().await;
        let task = shared.clone();
        let tended = tokio::task::spawn_blocking(move || task.signing.tend(task.now())).await;
        match tended {
            Ok(Ok(true)) => {
                if let Err(error) = shared.announce_ring().await {
                    tracing::error!(error = %cocalc_core::chain(&error), "cannot announce the new keys");
                }
            }
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::error!(error = %cocalc_core::chain(&error), "cannot tend the keys");
            }
            Err(error) => tracing::error!(%error, "cannot tend the keys"),
        }
        let task = shared.clone();
        let tended = tokio::task::spawn_blocking(move || task.ssh_ca.tend(task.now())).await;
        match tended {
            Ok(Ok(true)) => {
                if let Err(error) = shared.announce_ssh_ca().await {
                    tracing::error!(error = %cocalc_core::chain(&error), "cannot announce the new SSH keys");
                }
            }
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::error!(error = %cocalc_core::chain(&error), "cannot tend the SSH keys");
            }
            Err(error) => tracing::error!(%error, "cannot tend the SSH keys"),
        }
    }
}
