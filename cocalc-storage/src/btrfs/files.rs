//! What is done with the files inside volumes and snapshots: comparing and
//! copying. Everything here blocks.

use std::os::fd::OwnedFd;

use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{Changes, Copied, CopyOptions, Error, Place},
};

use super::{Store, recover::Intent};
use crate::{
    fail,
    failure::{Doing as _, Failure},
    tree::{self, Lineage},
};

impl Store {
    /// The open root of a snapshot, or of the live volume.
    fn root_of(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<OwnedFd, Failure> {
        let found = match snapshot {
            Some(name) => self.layout.need(project, name)?,
            None => self.layout.live(project)?.ok_or(Error::NotFound { project })?,
        };
        Ok(found.fd.into())
    }

    pub(super) fn diff(
        &self,
        project: ProjectId,
        from: &SnapshotName,
        to: Option<&SnapshotName>,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes, Failure> {
        let (old, new) = (self.root_of(project, Some(from))?, self.root_of(project, to)?);
        tree::diff(&old, &new, Lineage::Shared, after, max).map_err(|error| tree::beyond(project, error))
    }

    pub(super) fn copy_files(
        &self,
        from: &Place,
        to: &Place,
        options: CopyOptions,
    ) -> Result<Copied, Failure> {
        let source = self.root_of(from.project, from.snapshot.as_ref())?;
        let target = self.root_of(to.project, None)?;
        let plan = tree::Plan::new(source, from, &target, to, options)?;
        let intent = Intent::Copy { project: to.project, path: plan.temporary()? };
        self.intending(&intent, || {
            fail::point("copy.intended");
            let copied = plan.build()?;
            fail::point("copy.built");
            // Whole when it appears, even after a loss of power.
            self.layout.commit()?;
            fail::point("copy.synced");
            plan.put()?;
            fail::point("copy.in-place");
            self.layout.commit()?;
            fail::point("copy.committed");
            if let Err(failure) = plan.clean() {
                let error = cocalc_core::chain(&failure);
                tracing::warn!(project = %to.project, error, "what a copy has replaced is left beside it");
            }
            Ok(copied)
        })
    }

    /// Removes what a copy into `project` has left at `path`.
    pub(super) fn remove_copy(&self, project: ProjectId, path: &TreePath) -> Result<(), Failure> {
        match self.layout.live(project)? {
            Some(live) => {
                let root = OwnedFd::from(live.fd.try_clone().doing("duplicate a descriptor")?);
                tree::remove_left(&root, path)
            }
            None => Ok(()),
        }
    }
}
