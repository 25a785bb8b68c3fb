//! The move of a project from one host to another.
//!
//! | part | where | what it is |
//! |---|---|---|
//! | [`MoveState`] | pure | what the master keeps of a move: what to do next, and what follows from each event |
//! | [`drive`] | driver | does it, through [`MoveEffects`], which the master implements |
//! | [`host`] | both hosts | executes the steps over `Storage`, `Runner` and the ledger |
//!
//! The line of steps is `reserve` → `seed` (full, then deltas) → `park` →
//! `freeze` → `catch up` → `stage` → **commit** → `activate` → `retire` →
//! `clean`. The fence stands before the first step: the master sets it in the
//! transaction that stores the first [`MoveState`]. Up to the commit every
//! failure leads to an abort, after it the move only goes forward. Commit and
//! abort are the same compare-and-set on the revision of the stored state, so
//! only one of them can happen.
//!
//! An abort grants the project to the source anew: under the next epoch if a
//! freeze may have reached the source, because a late or lost `Freeze` must
//! never end an epoch that runs; under the same epoch if no freeze was ever
//! sent, so that a full destination does not disturb who is at work.

pub mod driver;
pub mod host;
mod state;

pub use driver::{DriveError, MoveEffects, NoAnswer, Saved, drive};
pub use state::{
    Change, Event, Failure, MoveOutcome, MoveSpec, MoveState, Progress, Round, Step, Todo, Tuning,
};

use cocalc_ids::{MoveId, SnapshotName};

/// The prefix of the names of the snapshots that serve `move_id` only.
pub fn snapshot_prefix(move_id: MoveId) -> String {
    format!("move-{move_id}.")
}

/// The name of a snapshot that serves `move_id`: `part` is a round's number,
/// or what the snapshot is for, in letters and digits.
pub(crate) fn snapshot_name(move_id: MoveId, part: &str) -> SnapshotName {
    named(&format!("{}{part}", snapshot_prefix(move_id)))
}

/// What the names of undo begin with.
pub(crate) const UNDO_PREFIX: &str = "undo-";

/// The name under which the source keeps its files as undo: until the next
/// move from there, or until the project is back. Nothing deletes it after a
/// time yet, 24 h being what is meant.
pub fn undo_name(move_id: MoveId) -> SnapshotName {
    named(&format!("{UNDO_PREFIX}{move_id}"))
}

/// The name under which a host keeps files of an epoch that is not the
/// project's any more.
pub fn conflict_name(epoch: Option<cocalc_ids::Epoch>) -> SnapshotName {
    named(&format!("conflict-{}", epoch.map_or(0, cocalc_ids::Epoch::number)))
}

#[expect(clippy::expect_used, reason = "all parts are ids and words of ours, within the alphabet and length")]
fn named(text: &str) -> SnapshotName {
    text.parse().expect("a name made of ids")
}

#[cfg(test)]
mod tests;
