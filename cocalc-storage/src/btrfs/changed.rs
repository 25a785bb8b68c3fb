//! Whether a live volume differs from a snapshot, by generations.

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::Error,
};

use super::{Store, layout::Subvolume, sys::SubvolInfo};
use crate::failure::Failure;

impl Store {
    pub(super) fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool, Failure> {
        let snapshot = self.layout.need(project, name)?;
        let live = self.need_live(project)?;
        if differs(&live.info, &snapshot.info) {
            // What is committed says so already.
            return Ok(true);
        }
        // What was written may be in memory only, and in no generation.
        self.layout.commit()?;
        // The volume may have been replaced meanwhile.
        let live = self.need_live(project)?;
        Ok(differs(&live.info, &snapshot.info))
    }

    fn need_live(&self, project: ProjectId) -> Result<Subvolume, Failure> {
        Ok(self.layout.live(project)?.ok_or(Error::NotFound { project })?)
    }
}

/// Whether what is committed of a live volume may differ from a snapshot.
///
/// The kernel counts a snapshot as a change of its source, in the transaction
/// that makes the snapshot, in which nothing can be written after it. So the
/// two are equal while the source has no later generation; and so are a
/// snapshot and a writable copy of it, while the copy has none later than the
/// transaction that made it. Of others, generations say nothing.
fn differs(live: &SubvolInfo, snapshot: &SubvolInfo) -> bool {
    if snapshot.parent_uuid == live.uuid {
        live.generation > snapshot.created_transid
    } else if live.parent_uuid == snapshot.uuid {
        live.generation > live.created_transid
    } else {
        true
    }
}
