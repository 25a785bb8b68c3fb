//! A deterministic simulator of moves: the real machine, driver, ledger and
//! host side, in a world that loses, repeats and reorders messages and crashes
//! the master and both hosts at every point where they wait.
//!
//! Time is virtual and everything random follows from the seed, so that
//! [`run`] with the same arguments does the same again. What must always hold
//! is checked at each event:
//!
//! - the project runs on one host at most, and only under a grant that host
//!   durably holds;
//! - whatever was written while it ran is there when it starts again;
//! - a commit happens once, and only after the source has durably frozen.
//!
//! At the end, when the faults have stopped: the move has ended, the fence is
//! lifted, exactly one host owns the project and can start it, and the other
//! one holds no live copy, no reservation and no snapshot of the move. The
//! owner has the project's own snapshots, each with its content: those taken
//! and not deleted meanwhile, and none that was deleted. Where nothing has
//! moved, the destination has of them what it had before.

mod check;
mod host;
mod master;
mod world;

use std::time::Duration;

use cocalc_core::moves::MoveOutcome;

use self::world::Shared;
pub use self::world::{Fault, Faults};

/// What a simulated move came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Report {
    /// How it ended.
    pub outcome: MoveOutcome,
    /// Hash of everything that happened, in order.
    pub trace: u64,
    /// How many events that were.
    pub events: u64,
    /// How many crashes of hosts.
    pub crashes: u64,
}

/// Simulates one move.
///
/// # Panics
///
/// With the seed and the broken promise, if one was broken.
pub fn run(seed: u64, faults: &Faults) -> Report {
    start(seed, faults, None).0
}

/// Simulates one move in which one thing goes wrong: the `nth` time that
/// `fault` can happen, from 0, it does. `None` if it could not happen so often,
/// which ends an exhaustive run over all places.
///
/// # Panics
///
/// With the seed and the broken promise, if one was broken.
pub fn run_with_one(seed: u64, fault: Fault, nth: u64) -> Option<Report> {
    let (report, reached) = start(seed, &Faults::NONE, Some((fault, nth)));
    reached.then_some(report)
}

fn start(seed: u64, faults: &Faults, single: Option<(Fault, u64)>) -> (Report, bool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime of one thread");
    runtime.block_on(simulate(seed, faults, single))
}

async fn simulate(seed: u64, faults: &Faults, single: Option<(Fault, u64)>) -> (Report, bool) {
    let world = Shared::new(seed, faults, single);
    for host in 0..2 {
        host::boot(world.clone(), host).await;
    }
    host::place(&world).await;
    let writer = tokio::spawn(host::write_while_running(world.clone()));
    let house = tokio::spawn(host::keep_house(world.clone()));
    let meddler = tokio::spawn(host::meddle(world.clone()));
    let master = tokio::spawn(master::run(world.clone()));
    // Long enough for every back-off after the faults have stopped.
    let ended = tokio::time::timeout(Duration::from_secs(7200), master).await;
    if !matches!(ended, Ok(Ok(()))) {
        world.violate("the move did not end");
    }
    // Hosts crash on after the move has ended, and commands that were repeated
    // late are still under way.
    let calm = world.lock().calm();
    tokio::time::sleep_until(calm).await;
    tokio::time::sleep(Duration::from_secs(70)).await;
    meddler.abort();
    house.abort();
    writer.abort();
    check::at_the_end(&world).await;
    if let Some(violation) = world.violation() {
        panic!("seed {seed}, {single:?}: {violation}\n{}", world.log());
    }
    (world.report(), world.reached())
}
