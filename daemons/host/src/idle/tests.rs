use super::*;

#[test]
fn durations_are_told_in_units_for_people() {
    let secs = Duration::from_secs;
    assert_eq!(words(secs(45)), "45 s");
    assert_eq!(words(secs(600)), "10 min");
    assert_eq!(words(secs(5400)), "90 min");
    assert_eq!(words(secs(4 * 3600)), "4.0 h");
}

#[test]
fn a_reason_names_the_last_use_and_the_times() {
    let mut record = Record::default();
    let now = Duration::from_secs(10_000);
    record.started(Duration::from_secs(1000));
    let limits = IdleLimits {
        timeout: Some(Duration::from_secs(1800)),
        presence: Duration::from_secs(3600),
        warning: Duration::from_secs(600),
    };
    let wall = Timestamp::from_secs(1_800_000_000);
    let said = |record: &Record| reason(record, Duration::from_secs(1800), now, wall, &limits);
    assert!(said(&record).contains("it was not used since its start"));
    record.worked(Source::Ssh, Duration::from_secs(8200));
    assert_eq!(
        said(&record),
        "stopped at 2027-01-15T08:00:00Z after 30 min without use (idle time: 30 min): it was last used at \
         2027-01-15T07:30:00Z by SSH or a terminal; its users were warned"
    );
}

#[tokio::test]
async fn what_cannot_be_measured_is_not_taken_for_idle() {
    use cocalc_core::{
        grant::MemoryLedgerStore,
        ids::HostId,
        memory::{clock::ManualClock, runner::MemoryRunner, storage::MemoryStorage},
    };
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::new(Timestamp::from_secs(1_800_000_000)));
    let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await.unwrap();
    let project = ProjectId::random();
    ledger.create(project, Epoch::FIRST, Default::default()).await.unwrap();
    let idle = Idle::new(Parts {
        policy: IdlePolicy::default(),
        clock: clock.clone(),
        meters: Meters::new(clock.clone()),
        ledger: ledger.clone(),
        // It does not know the project, so it cannot measure it.
        runner: Arc::new(MemoryRunner::new(clock.clone())),
        storage: Arc::new(MemoryStorage::new()),
        occupied: Box::new(|_| None),
        directory: directory.path().to_owned(),
    });
    let one = Watched {
        record: Record::default(),
        started: None,
        limits: IdleLimits::new(&IdlePolicy::default(), &Default::default()),
        sample: None,
        oom: None,
        saved: Duration::ZERO,
        asked: None,
        reason: None,
        unseen: false,
    };
    idle.watched().insert(project, one);
    let entry = ledger.entry(project).unwrap();
    assert_eq!(idle.occupation(Some(&entry), project), None);
    idle.sample(project, &entry).await;
    assert_eq!(idle.occupation(Some(&entry), project), Some(UNSEEN));
}
