//! Thousands of simulated moves, each from its seed.

use cocalc_core::moves::MoveOutcome;
use cocalc_testkit::sim::{Fault, Faults, run, run_with_one};

/// How many seeds; `COCALC_SIM_SEEDS` asks for more.
fn seeds(default: u64) -> std::ops::Range<u64> {
    let asked = std::env::var("COCALC_SIM_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    0..asked.unwrap_or(default)
}

#[test]
fn without_faults_every_move_arrives() {
    for seed in seeds(50) {
        assert_eq!(run(seed, &Faults::NONE).outcome, MoveOutcome::Moved, "seed {seed}");
    }
}

#[test]
fn one_owner_and_one_live_copy_remain_after_some_faults() {
    let (mut moved, mut aborted) = (0, 0);
    for seed in seeds(300) {
        match run(seed, &Faults::SOME).outcome {
            MoveOutcome::Moved => moved += 1,
            MoveOutcome::Aborted => aborted += 1,
        }
    }
    // Both ways out are taken, or the faults prove nothing.
    assert!(moved > 0 && aborted > 0, "{moved} moved, {aborted} aborted");
}

#[test]
fn one_owner_and_one_live_copy_remain_after_many_faults() {
    let mut crashes = 0;
    for seed in seeds(300) {
        crashes += run(seed, &Faults::MANY).crashes;
    }
    assert!(crashes > 0);
}

#[test]
fn the_same_seed_does_the_same_again() {
    for seed in 0..10 {
        assert_eq!(run(seed, &Faults::MANY), run(seed, &Faults::MANY), "seed {seed}");
    }
}

/// Each fault, once, at every single place where it can happen.
#[test]
fn every_fault_at_every_place_leaves_one_owner_and_one_live_copy() {
    let faults = [
        Fault::Lost,
        Fault::Repeated,
        Fault::HostCrash,
        Fault::StreamCut,
        Fault::Backend,
        Fault::MasterStep,
        Fault::MasterCrash,
        Fault::Cancelled,
    ];
    for fault in faults {
        // A running and a stopped project, with and without deltas.
        for seed in 0..4 {
            let mut places = 0;
            while run_with_one(seed, fault, places).is_some() {
                places += 1;
            }
            assert!(places > 0, "{fault:?} can happen");
        }
    }
}
