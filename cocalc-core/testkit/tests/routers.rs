//! The routers that come with the core keep the contract.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use cocalc_core::{
    control::ProjectConfig,
    grant::{Ledger, MemoryLedgerStore},
    memory::router::{LocalRouter, TableRouter},
    router::{Error, HostAddress, Reach, Route, Router},
};
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId};
use cocalc_testkit::router::{RouterFixture, router};

fn address(name: &str) -> HostAddress {
    HostAddress { url: format!("http://{name}"), ..HostAddress::default() }
}

/// A host's ledger. Its own epoch is the first, so every epoch of the suite is
/// one higher there; the fixture shows it one lower again.
#[derive(Clone, Debug)]
struct Local {
    ledger: Ledger,
    inner: LocalRouter,
    changes: tokio::sync::broadcast::Sender<Route>,
}

fn lower(route: Route) -> Route {
    Route { epoch: Epoch::new(route.epoch.number() - 1).unwrap(), ..route }
}

#[async_trait]
impl Router for Local {
    async fn route(&self, project: ProjectId) -> Result<Route, Error> {
        self.inner.route(project).await.map(lower)
    }

    fn changes(&self) -> tokio::sync::broadcast::Receiver<Route> {
        self.changes.subscribe()
    }
}

#[async_trait]
impl RouterFixture for Local {
    fn router(&self) -> Arc<dyn Router> {
        Arc::new(self.clone())
    }

    async fn moved(&self, project: ProjectId, owner: HostId, epoch: Epoch) {
        // A host only knows of projects that it once had.
        if self.ledger.entry(project).is_none() {
            self.ledger.create(project, Epoch::FIRST, ProjectConfig::default()).await.unwrap();
        }
        let mut changes = self.inner.changes();
        let address = Some(address(&owner.to_string()));
        self.ledger.observe(project, owner, epoch.next(), address).await.unwrap();
        while let Ok(change) = changes.try_recv() {
            let _ = self.changes.send(lower(change));
        }
    }
}

#[tokio::test]
async fn the_local_router_keeps_the_contract() {
    let store = Arc::new(MemoryLedgerStore::default());
    let ledger = Ledger::open(HostId::random(), store).await.unwrap();
    let (changes, _) = tokio::sync::broadcast::channel(1024);
    router(&Local { inner: LocalRouter::new(ledger.clone()), ledger, changes }).await;
}

struct Table(TableRouter);

#[async_trait]
impl RouterFixture for Table {
    fn router(&self) -> Arc<dyn Router> {
        Arc::new(self.0.clone())
    }

    async fn moved(&self, project: ProjectId, owner: HostId, epoch: Epoch) {
        self.0.set_host(owner, address(&owner.to_string()));
        self.0.set_owner(project, owner, epoch);
    }
}

#[tokio::test]
async fn the_table_router_keeps_the_contract() {
    router(&Table(TableRouter::default())).await;
}

#[tokio::test]
async fn a_host_serves_parks_and_sends_on() {
    let host = HostId::random();
    let ledger = Ledger::open(host, Arc::new(MemoryLedgerStore::default())).await.unwrap();
    let local = LocalRouter::new(ledger.clone());
    let (project, move_id) = (ProjectId::random(), MoveId::random());
    ledger.create(project, Epoch::FIRST, ProjectConfig::default()).await.unwrap();
    let mut changes = local.changes();
    let how = async || local.route(project).await.unwrap().how;
    assert_eq!(how().await, Reach::Local);
    let until = std::time::Duration::from_secs(100);
    ledger.park(project, move_id, Epoch::FIRST, until).unwrap();
    assert_eq!(how().await, Reach::Parked);
    // Nobody froze it: requests go on after a while.
    ledger.unpark_lapsed(until - std::time::Duration::from_millis(1));
    assert_eq!(how().await, Reach::Parked);
    ledger.unpark_lapsed(until);
    assert_eq!(how().await, Reach::Local);
    let (owner, address) = (HostId::random(), address("beta"));
    ledger.observe(project, owner, Epoch::FIRST.next(), Some(address.clone())).await.unwrap();
    let route = local.route(project).await.unwrap();
    assert_eq!((route.host, route.how), (owner, Reach::Remote(address)));
    let announced: Vec<_> = std::iter::from_fn(|| changes.try_recv().ok()).map(|route| route.host).collect();
    assert_eq!(announced, [host, host, owner]);
}

#[tokio::test]
async fn the_table_asks_once_for_what_it_does_not_have() {
    let (project, owner) = (ProjectId::random(), HostId::random());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let table = TableRouter::new(Arc::new(move |wanted| {
        count.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            tokio::task::yield_now().await;
            let how = Reach::Remote(address("alpha"));
            let route = Route { project: wanted, host: owner, epoch: Epoch::FIRST, how };
            if wanted == project { Ok(Some(route)) } else { Err("the master is away".into()) }
        })
    }));
    let routes = futures_util::future::join_all((0..50).map(|_| table.route(project))).await;
    assert!(routes.into_iter().all(|route| route.unwrap().host == owner));
    assert_eq!(asked.load(Ordering::SeqCst), 1, "one question, coalesced and remembered");
    let failed = table.route(ProjectId::random()).await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
    table.forget(project);
    table.route(project).await.unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_knows_is_asked_for_once_in_a_while_and_has_a_decoy() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let table = TableRouter::new(Arc::new(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(None) })
    }));
    let project = ProjectId::random();
    for _ in 0..3 {
        assert!(matches!(table.route(project).await, Err(Error::NotFound { .. })));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    tokio::time::advance(std::time::Duration::from_secs(10)).await;
    assert!(table.route(project).await.is_err());
    assert_eq!(asked.load(Ordering::SeqCst), 2);

    assert_eq!(table.decoy(project), None, "no host to ask");
    let hosts: Vec<HostId> = [0x20, 0x80, 0xd0].map(|first| HostId::from_bytes([first; 16])).into();
    for host in &hosts {
        table.set_host(*host, HostAddress { peer: "127.0.0.1:1".into(), ..address("there") });
    }
    for (first, expected) in [(0x10, 0), (0x20, 0), (0x21, 1), (0xcf, 2), (0xd1, 0), (0xff, 0)] {
        let project = ProjectId::from_bytes([first; 16]);
        assert_eq!(table.decoy(project), Some(hosts[expected]), "{first:x}");
    }
    table.set_host(hosts[1], HostAddress::default());
    assert_eq!(table.decoy(ProjectId::from_bytes([0x21; 16])), Some(hosts[2]), "a host that was withdrawn");
    // News of an owner are heard at once.
    table.set_owner(project, hosts[0], Epoch::FIRST);
    assert_eq!(table.route(project).await.unwrap().host, hosts[0]);
}
