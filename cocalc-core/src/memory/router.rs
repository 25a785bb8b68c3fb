//! Routers over what is in memory: a host's own, and one that is fed a table.

use std::{
    collections::BTreeMap,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, ProjectId};
use tokio::{sync::broadcast, time::Instant};

use crate::{
    BoxError,
    grant::Ledger,
    router::{Error, HostAddress, Reach, Route, Router},
};

/// How many changes a slow receiver may lag behind.
const CHANGES_MAX: usize = 1024;
/// How long it is remembered that nobody knows a project: who asks again and
/// again for one gets an answer as fast as for a project that is known.
const UNKNOWN_FOR: Duration = Duration::from_secs(10);
/// How many of them are remembered.
const UNKNOWN_MAX: usize = 65_536;

/// A host's router: what its ledger says, and nothing else.
#[derive(Clone, Debug)]
pub struct LocalRouter(Ledger);

impl LocalRouter {
    /// Routes by `ledger`.
    pub fn new(ledger: Ledger) -> Self {
        Self(ledger)
    }
}

#[async_trait]
impl Router for LocalRouter {
    async fn route(&self, project: ProjectId) -> Result<Route, Error> {
        self.0.route(project).ok_or(Error::NotFound { project })
    }

    fn changes(&self) -> broadcast::Receiver<Route> {
        self.0.routes()
    }
}

/// The answer of whoever knows about a project that the table does not have:
/// its owner and epoch, and where the owner listens.
pub type Lookup = Arc<
    dyn Fn(ProjectId) -> Pin<Box<dyn Future<Output = Result<Option<Route>, BoxError>> + Send>> + Send + Sync,
>;

/// A proxy's router: a table of owners and addresses, fed from the ordered
/// stream, with a question to the master for what is not in it. Clones share
/// the table.
#[derive(Clone)]
pub struct TableRouter(Arc<TableInner>);

struct TableInner {
    table: Mutex<Table>,
    lookup: Option<Lookup>,
    changes: broadcast::Sender<Route>,
}

#[derive(Default)]
struct Table {
    owners: BTreeMap<ProjectId, (HostId, Epoch)>,
    hosts: BTreeMap<HostId, HostAddress>,
    /// One question per project at a time; who comes later waits for it.
    asking: BTreeMap<ProjectId, Arc<tokio::sync::Mutex<()>>>,
    /// Until when what was asked for is nobody's.
    unknown: BTreeMap<ProjectId, Instant>,
}

impl Default for TableRouter {
    fn default() -> Self {
        Self::with(None)
    }
}

impl fmt::Debug for TableRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TableRouter").field("projects", &self.table().owners.len()).finish_non_exhaustive()
    }
}

impl TableRouter {
    /// A table that asks `lookup` for what it does not have. The lookup bounds
    /// its own time.
    pub fn new(lookup: Lookup) -> Self {
        Self::with(Some(lookup))
    }

    fn with(lookup: Option<Lookup>) -> Self {
        let (changes, _) = broadcast::channel(CHANGES_MAX);
        Self(Arc::new(TableInner { table: Mutex::default(), lookup, changes }))
    }

    /// Learns where a host listens.
    pub fn set_host(&self, host: HostId, address: HostAddress) {
        let routes: Vec<_> = {
            let mut table = self.table();
            if table.hosts.get(&host) == Some(&address) {
                return;
            }
            table.hosts.insert(host, address);
            let here = table.owners.iter().filter(|(_, (owner, _))| *owner == host);
            here.filter_map(|(project, _)| table.route(*project)).collect()
        };
        self.announce(routes);
    }

    /// Where a host listens, as far as is known.
    pub fn host(&self, host: HostId) -> Option<HostAddress> {
        self.table().hosts.get(&host).cloned()
    }

    /// The host that is asked about a project that nobody knows: always the same
    /// for one project, any for another. `None` if there is no host.
    pub fn decoy(&self, project: ProjectId) -> Option<HostId> {
        let table = self.table();
        let from = HostId::from_bytes(*project.as_bytes());
        // Ids of hosts are as random as those of projects. Hosts that were
        // withdrawn are nowhere.
        let around = table.hosts.range(from..).chain(table.hosts.range(..from));
        let mut there = around.filter(|(_, address)| !address.peer.is_empty());
        there.next().map(|(host, _)| *host)
    }

    /// Learns who owns a project. What is older than what is known is passed
    /// over.
    pub fn set_owner(&self, project: ProjectId, host: HostId, epoch: Epoch) {
        let route = {
            let mut table = self.table();
            if table.owners.get(&project).is_some_and(|(_, known)| *known >= epoch) {
                return;
            }
            table.owners.insert(project, (host, epoch));
            table.unknown.remove(&project);
            table.route(project)
        };
        self.announce(route);
    }

    /// Learns a whole route, for instance from the master's answer.
    pub fn learn(&self, route: &Route) {
        if let Reach::Remote(address) = &route.how {
            self.set_host(route.host, address.clone());
        }
        self.set_owner(route.project, route.host, route.epoch);
    }

    /// Forgets who owns a project, so that the next question goes to whoever
    /// knows.
    pub fn forget(&self, project: ProjectId) {
        self.table().owners.remove(&project);
    }

    fn announce(&self, routes: impl IntoIterator<Item = Route>) {
        for route in routes {
            // Nobody may be listening.
            let _ = self.0.changes.send(route);
        }
    }

    fn asking(&self, project: ProjectId) -> Arc<tokio::sync::Mutex<()>> {
        let mut table = self.table();
        table.asking.retain(|_, turn| Arc::strong_count(turn) > 1);
        table.asking.entry(project).or_default().clone()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn route(&self, project: ProjectId) -> Option<Route> {
        let (host, epoch) = *self.owners.get(&project)?;
        let how = Reach::Remote(self.hosts.get(&host)?.clone());
        Some(Route { project, host, epoch, how })
    }
}

#[async_trait]
impl Router for TableRouter {
    async fn route(&self, project: ProjectId) -> Result<Route, Error> {
        let known = self.table().route(project);
        if let Some(route) = known {
            return Ok(route);
        }
        let Some(lookup) = &self.0.lookup else { return Err(Error::NotFound { project }) };
        if self.table().unknown.get(&project).is_some_and(|until| Instant::now() < *until) {
            return Err(Error::NotFound { project });
        }
        let turn = self.asking(project);
        let _turn = turn.lock().await;
        // Whoever had the turn before has asked already.
        let known = self.table().route(project);
        if let Some(route) = known {
            return Ok(route);
        }
        match lookup(project).await {
            Ok(Some(route)) => {
                self.learn(&route);
                let known = self.table().route(project);
                known.ok_or(Error::NotFound { project })
            }
            Ok(None) => {
                let mut table = self.table();
                if table.unknown.len() >= UNKNOWN_MAX {
                    table.unknown.clear();
                }
                table.unknown.insert(project, Instant::now() + UNKNOWN_FOR);
                Err(Error::NotFound { project })
            }
            Err(source) => Err(Error::Unavailable { project, source }),
        }
    }

    fn changes(&self) -> broadcast::Receiver<Route> {
        self.0.changes.subscribe()
    }
}
