//! The contract suite of `cocalc_core::router`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::router::{Error, Route, Router};
use cocalc_ids::{Epoch, HostId, ProjectId};
use tokio::{sync::broadcast::error::RecvError, time::timeout};

/// How long a change may take to show; only a broken router needs it.
const SOON: Duration = Duration::from_secs(10);

/// A router under test, with the power to change what it knows.
#[async_trait]
pub trait RouterFixture: Send + Sync {
    /// The router.
    fn router(&self) -> Arc<dyn Router>;

    /// The world changes: from now on `owner` has `project` under `epoch`.
    /// Called with rising epochs, and then again with old ones, which the
    /// router must ignore.
    async fn moved(&self, project: ProjectId, owner: HostId, epoch: Epoch);
}

/// Checks that a router keeps the contract.
///
/// # Panics
///
/// With the broken promise.
pub async fn router(fixture: &dyn RouterFixture) {
    let router = fixture.router();
    unknown_projects_have_no_route(&*router).await;
    routes_follow_changes_and_epochs_never_go_back(fixture).await;
    changes_carry_every_change(fixture).await;
    a_lagging_receiver_learns_so_and_asks_again(fixture).await;
    projects_do_not_mix(fixture).await;
}

async fn unknown_projects_have_no_route(router: &dyn Router) {
    let project = ProjectId::random();
    let answer = router.route(project).await;
    assert!(
        matches!(answer, Err(Error::NotFound { project: named }) if named == project),
        "an unknown project is NotFound, and named: {answer:?}"
    );
}

async fn routes_follow_changes_and_epochs_never_go_back(fixture: &dyn RouterFixture) {
    let router = fixture.router();
    let (project, hosts) = (ProjectId::random(), [HostId::random(), HostId::random()]);
    let mut epochs = vec![];
    let mut epoch = Epoch::FIRST;
    for host in hosts {
        fixture.moved(project, host, epoch).await;
        let route = found(&*router, project).await;
        assert_eq!((route.project, route.host, route.epoch), (project, host, epoch), "the new owner");
        assert_eq!(found(&*router, project).await, route, "asked again, the same answer");
        epochs.push((host, epoch));
        epoch = epoch.next();
    }
    let last = found(&*router, project).await;
    // News that come late.
    for (host, epoch) in epochs {
        fixture.moved(project, host, epoch).await;
        assert_eq!(found(&*router, project).await, last, "old news change nothing");
    }
}

async fn changes_carry_every_change(fixture: &dyn RouterFixture) {
    let router = fixture.router();
    let project = ProjectId::random();
    fixture.moved(project, HostId::random(), Epoch::FIRST).await;
    let mut changes = router.changes();
    let mut epoch = Epoch::FIRST;
    for _ in 0..3 {
        epoch = epoch.next();
        let host = HostId::random();
        fixture.moved(project, host, epoch).await;
        let change = loop {
            let change = timeout(SOON, changes.recv()).await.expect("a change is announced");
            match change.expect("nobody lags behind three changes") {
                change if change.epoch == epoch => break change,
                earlier => assert!(earlier.epoch < epoch, "announced before it happened: {earlier:?}"),
            }
        };
        assert_eq!((change.project, change.host), (project, host), "the change names the new owner");
        let route = found(&*router, project).await;
        assert!(route.epoch >= change.epoch, "an answer after a change is not older than it");
    }
}

async fn a_lagging_receiver_learns_so_and_asks_again(fixture: &dyn RouterFixture) {
    let router = fixture.router();
    let (project, mut changes) = (ProjectId::random(), router.changes());
    let (mut epoch, mut lagged) = (Epoch::FIRST, false);
    for _ in 0..3000 {
        fixture.moved(project, HostId::random(), epoch).await;
        epoch = epoch.next();
    }
    let mut last = None;
    while last.is_none_or(|seen: Epoch| seen.next() != epoch) {
        match timeout(SOON, changes.recv()).await.expect("the changes do not end before the last") {
            Ok(change) => last = Some(change.epoch),
            Err(RecvError::Lagged(_)) => lagged = true,
            Err(RecvError::Closed) => panic!("the changes ended"),
        }
    }
    assert!(lagged, "three thousand unread changes are not kept for ever");
    assert_eq!(found(&*router, project).await.epoch.next(), epoch, "route tells what the changes did not");
}

async fn projects_do_not_mix(fixture: &dyn RouterFixture) {
    let router = fixture.router();
    let (one, two) = (ProjectId::random(), ProjectId::random());
    fixture.moved(one, HostId::random(), Epoch::FIRST).await;
    let before = found(&*router, one).await;
    fixture.moved(two, HostId::random(), Epoch::FIRST.next()).await;
    assert_eq!(found(&*router, one).await, before, "the move of one project leaves the other");
}

async fn found(router: &dyn Router, project: ProjectId) -> Route {
    router.route(project).await.expect("a known project has a route")
}
