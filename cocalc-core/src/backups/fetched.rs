//! The names of snapshots that came from a backup and are there for as long as
//! a restore goes on.

use cocalc_ids::{OperationId, SnapshotName};

const PREFIX: &str = "restored-";

/// What the snapshot is called that the restore of an operation brings.
pub fn fetched_name(operation: OperationId) -> SnapshotName {
    #[expect(clippy::expect_used, reason = "letters, digits and dashes, and far below 100 of them")]
    format!("{PREFIX}{operation}").parse().expect("the name of an operation")
}

/// Whether a snapshot has such a name.
pub fn is_fetched(name: &SnapshotName) -> bool {
    name.as_str().strip_prefix(PREFIX).is_some_and(|id| id.parse::<OperationId>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_operations_are_fetched_ones() {
        assert!(is_fetched(&fetched_name(OperationId::random())));
        for own in ["restored-", "restored-by-hand", "auto-2026-11-26T23-51-28Z"] {
            assert!(!is_fetched(&own.parse().unwrap()), "{own}");
        }
    }
}
