use async_trait::async_trait;

use super::*;
use crate::grant::MemoryLedgerStore;

fn config() -> ProjectConfig {
    ProjectConfig::default()
}

#[tokio::test]
async fn slots_are_the_lowest_free_ones_and_come_back() {
    let store = Arc::new(MemoryLedgerStore::default());
    let ledger = Ledger::open(HostId::random(), store.clone()).await.unwrap();
    let projects: Vec<_> = (0..3).map(|_| ProjectId::random()).collect();
    for (slot, project) in (0..).zip(&projects) {
        assert_eq!(ledger.create(*project, Epoch::FIRST, config()).await.unwrap().slot, Some(slot));
    }
    ledger.free_slot(projects[1]).await.unwrap();
    assert_eq!(ledger.entry(projects[1]).unwrap().slot, Some(1), "it is still needed");
    ledger.delete(projects[1], Epoch::FIRST).await.unwrap();
    ledger.free_slot(projects[1]).await.unwrap();
    // After a restart too.
    let ledger = Ledger::open(ledger.host(), store).await.unwrap();
    let next = ledger.create(ProjectId::random(), Epoch::FIRST, config()).await.unwrap();
    assert_eq!(next.slot, Some(1));
    let next = ledger.create(ProjectId::random(), Epoch::FIRST, config()).await.unwrap();
    assert_eq!(next.slot, Some(3));
}

/// Saves when it is told to, or fails.
#[derive(Debug)]
struct Slow {
    inner: MemoryLedgerStore,
    go: tokio::sync::Semaphore,
}

#[async_trait]
impl LedgerStore for Slow {
    async fn load(&self) -> Result<Vec<Entry>, BoxError> {
        self.inner.load().await
    }

    async fn save(&self, entry: &Entry) -> Result<(), BoxError> {
        self.go.acquire().await?.forget();
        self.inner.save(entry).await
    }
}

#[tokio::test]
async fn nothing_is_seen_before_it_is_saved_and_a_caller_that_leaves_tears_nothing() {
    let store = Arc::new(Slow { inner: MemoryLedgerStore::default(), go: tokio::sync::Semaphore::new(0) });
    let ledger = Ledger::open(HostId::random(), store.clone()).await.unwrap();
    let project = ProjectId::random();
    let waiting = tokio::spawn({
        let ledger = ledger.clone();
        async move { ledger.create(project, Epoch::FIRST, config()).await }
    });
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!(ledger.entry(project).is_none(), "not saved yet");
    }
    waiting.abort();
    store.go.add_permits(1);
    let saved = async {
        while ledger.entry(project).is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), saved).await.expect("the change goes on to its end");
    assert_eq!(store.load().await.unwrap(), ledger.entries());
    // A store that fails changes nothing.
    store.go.close();
    let error = ledger.delete(project, Epoch::FIRST).await.unwrap_err();
    assert!(matches!(error, LedgerError::Store { .. }));
    assert!(ledger.permit(project, Epoch::FIRST).is_ok());
}

#[tokio::test]
async fn one_turn_at_a_time_per_project() {
    let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await.unwrap();
    let (one, two) = (ProjectId::random(), ProjectId::random());
    let turn = ledger.turn(one).await;
    let soon = Duration::from_millis(50);
    assert!(tokio::time::timeout(soon, ledger.turn(one)).await.is_err());
    assert!(tokio::time::timeout(soon, ledger.turn(two)).await.is_ok());
    drop(turn);
    assert!(tokio::time::timeout(Duration::from_secs(60), ledger.turn(one)).await.is_ok());
}
