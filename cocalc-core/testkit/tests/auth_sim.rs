//! Simulated days of tokens, streams and revocations, each from its seed.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use cocalc_testkit::auth_sim::{Broken, Check, Report, Scenario, run, run_quietly};

/// A number from the environment.
fn asked(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Which seeds: `COCALC_AUTH_SEED` asks for one, `COCALC_AUTH_SEEDS` for more.
/// `share` is how many in a hundred a scenario gets of these.
///
/// What is printed names them; the same seed does the same again.
fn seeds(default: u64, share: u64) -> Range<u64> {
    match (asked("COCALC_AUTH_SEED"), asked("COCALC_AUTH_SEEDS")) {
        (Some(one), _) => one..one + 1,
        (None, Some(many)) => 0..(many * share / 100).max(1),
        (None, None) => 0..default,
    }
}

/// Runs all seeds, on all processors; panics with the first that fails.
fn all(name: &str, scenario: &Scenario, seeds: Range<u64>) -> Vec<Report> {
    println!("{name}: seeds {seeds:?}; COCALC_AUTH_SEED=n runs one of them again");
    let next = AtomicU64::new(seeds.start);
    let work = || {
        let mut reports = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return reports;
            }
            match run(seed, scenario) {
                Ok(report) => reports.push(report),
                Err(violation) => panic!("{name}: COCALC_AUTH_SEED={seed}\n{violation}"),
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// That all of it happened, or nothing was shown.
fn has_bite(reports: &[Report]) {
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    for (what, many) in [
        ("allowed", sum(|report| report.allowed)),
        ("refused", sum(|report| report.refused)),
        ("allowed in the grace", sum(|report| report.in_grace)),
        ("connections closed", sum(|report| report.closed)),
        ("receipts acknowledged", sum(|report| report.receipts.0)),
        ("receipts run out", sum(|report| report.receipts.1)),
        ("whole states", sum(|report| report.snapshots)),
    ] {
        println!("  {what}: {many}");
        assert!(many > 0 || reports.len() < 10, "{what}: never");
    }
    println!("  events: {}", sum(|report| report.events));
}

#[test]
fn in_a_region() {
    has_bite(&all("forty hosts, six hours", &Scenario::REGION, seeds(12, 24)));
}

#[test]
fn in_a_storm() {
    has_bite(&all("ten hosts, one bad hour", &Scenario::STORM, seeds(37, 74)));
}

#[test]
fn in_a_federation() {
    has_bite(&all("a thousand hosts, two hours", &Scenario::FEDERATION, seeds(1, 2)));
}

#[test]
fn the_same_seed_does_the_same_again() {
    for seed in 0..3 {
        let (once, again) = (run_quietly(seed, &Scenario::STORM), run_quietly(seed, &Scenario::STORM));
        assert_eq!(once.unwrap_or_else(|v| panic!("{v}")), again.unwrap_or_else(|v| panic!("{v}")));
    }
}

/// What is done wrong, and which checks notice it.
const BROKEN: &[(Broken, &[Check])] = &[
    (Broken::GapIgnored, &[Check::AfterAcknowledgement, Check::LostGrant]),
    (Broken::OutOfOrder, &[Check::AfterAcknowledgement, Check::LostGrant]),
    (Broken::LeaseOverReboot, &[Check::Reboot]),
    (Broken::LeaseFromAnswer, &[Check::LeaseAndGrace]),
    (Broken::LeaseBeforeFrames, &[Check::LeaseAndGrace]),
    (Broken::ConnectionsKept, &[Check::AfterAcknowledgement]),
    (Broken::GraceIgnored, &[Check::LeaseAndGrace]),
    (Broken::SessionEpochIgnored, &[Check::AfterAcknowledgement]),
    (Broken::LogInIgnored, &[Check::AfterAcknowledgement]),
    (Broken::EndedLogInsForgotten, &[Check::AfterAcknowledgement]),
    (Broken::OneLogInEndsAll, &[Check::LostGrant]),
    (Broken::RestoreUnnoticed, &[Check::AfterAcknowledgement]),
    (Broken::AcknowledgedBeforeApplied, &[Check::AfterAcknowledgement]),
    (Broken::AcknowledgedBeforeSaved, &[Check::AfterAcknowledgement]),
    (Broken::KeepaliveAcknowledges, &[Check::AfterAcknowledgement]),
    (Broken::NegativeForever, &[Check::Memory]),
    (Broken::SessionsOutliveKey, &[Check::AfterAcknowledgement]),
    (Broken::ConnectionsLeaked, &[Check::Memory]),
    (Broken::OlderAcknowledgementCounts, &[Check::Receipt]),
    (Broken::ReceiptWithoutGrace, &[Check::Receipt]),
    (Broken::ReceiptForMembersOnly, &[Check::Receipt]),
    (Broken::SessionEpochCounted, &[Check::AfterAcknowledgement]),
    (Broken::GapNotRepeated, &[Check::LostGrant]),
];

/// How many seeds each may take to be noticed.
const NOTICED_WITHIN: u64 = 20;

#[test]
fn whatever_is_broken_is_noticed() {
    let mut unnoticed = Vec::new();
    for (broken, by) in BROKEN {
        let scenario = Scenario::STORM.broken(*broken);
        let found = (0..NOTICED_WITHIN).find_map(|seed| Some((seed, run_quietly(seed, &scenario).err()?)));
        match found {
            Some((seed, violation)) => {
                println!("{broken:?}: seed {seed}, {violation}");
                if !by.contains(&violation.check) {
                    unnoticed.push(format!("{broken:?} was taken for {:?}", violation.check));
                }
            }
            None => unnoticed.push(format!("{broken:?} was not noticed")),
        }
    }
    assert!(unnoticed.is_empty(), "{unnoticed:#?}");
}
