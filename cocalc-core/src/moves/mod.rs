//! The move of a project from one host to another.
//!
//! | part | where | what it is |
//! |---|---|---|
//! | [`MoveState`] | pure | what the master keeps of a move: what to do next, and what follows from each event |
//! | [`drive`] | driver | does it, through [`MoveEffects`], which the master implements |
//! | [`host`] | both hosts | executes the steps over `Storage`, `Runner` and the ledger |
//!
//! The line of steps is `survey` → `reserve` → `carry` (the project's own
//! snapshots) → `seed` (full, or as a delta to the newest of these, then
//! deltas) → `park` → `freeze` → `catch up` → `stage` → **commit** →
//! `activate` → `retire` → `clean`. The fence stands before the first step: the master sets it in the
//! transaction that stores the first [`MoveState`]. Up to the commit every
//! failure leads to an abort, after it the move only goes forward. Commit and
//! abort are the same compare-and-set on the revision of the stored state, so
//! only one of them can happen.
//!
//! An abort grants the project to the source anew: under the next epoch if a
//! freeze may have reached the source, because a late or lost `Freeze` must
//! never end an epoch that runs; under the same epoch if no freeze was ever
//! sent, so that a full destination does not disturb who is at work.
//!
//! # Snapshots
//!
//! The project's own snapshots, all that are not of moves ([`is_internal`]),
//! go along under their names, oldest first, each as a delta to the one before.
//! What the destination has already, by its origin, is not sent again. The
//! destination takes only what was announced to it with `reserve`. The list
//! that counts is the one of the freeze: what was taken meanwhile is carried
//! before the final snapshot, what was deleted meanwhile does not come back.
//! An abort deletes at the destination what this move has brought and nothing
//! else; what lay there of an earlier stay, and the project has no more, goes
//! when it has moved. At the source they stay as long as the undo does.

pub mod driver;
pub mod host;
mod state;

pub use driver::{DriveError, MoveEffects, NoAnswer, Saved, drive};
pub use state::{
    Change, Event, Failure, MoveOutcome, MoveSpec, MoveState, Planned, Progress, Round, Step, Todo, Tuning,
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
const CONFLICT_PREFIX: &str = "conflict-";

/// How many snapshots of its own a project can take along. Their list travels
/// in one frame of the bus.
pub const CARRIED_MAX: usize = 1000;

/// The name under which the source keeps its files as undo: until the next
/// move from there, until the project is back, or until
/// [`host::MoveHost::expire_undo`] says that it is old enough.
pub fn undo_name(move_id: MoveId) -> SnapshotName {
    named(&format!("{UNDO_PREFIX}{move_id}"))
}

/// The name under which a host keeps files of an epoch that is not the
/// project's any more.
pub fn conflict_name(epoch: Option<cocalc_ids::Epoch>) -> SnapshotName {
    named(&format!("{CONFLICT_PREFIX}{}", epoch.map_or(0, cocalc_ids::Epoch::number)))
}

/// Whether moves and hosts made this snapshot for themselves: `move-<id>.…`,
/// `undo-<id>` or `conflict-<epoch>`. What people name nearly so is theirs.
pub fn is_internal(name: &SnapshotName) -> bool {
    let name = name.as_str();
    let of_move = |rest: &str| rest.split_once('.').is_some_and(|(id, _)| id.parse::<MoveId>().is_ok());
    name.strip_prefix("move-").is_some_and(of_move) || is_undo(name) || is_conflict(name)
}

pub(crate) fn is_undo(name: &str) -> bool {
    name.strip_prefix(UNDO_PREFIX).is_some_and(|id| id.parse::<MoveId>().is_ok())
}

pub(crate) fn is_conflict(name: &str) -> bool {
    name.strip_prefix(CONFLICT_PREFIX).is_some_and(|epoch| epoch.parse::<u64>().is_ok())
}

#[expect(clippy::expect_used, reason = "all parts are ids and words of ours, within the alphabet and length")]
fn named(text: &str) -> SnapshotName {
    text.parse().expect("a name made of ids")
}

#[cfg(test)]
mod tests;
