//! What is different now from a backup, and backends that get it wrong, each of
//! which the contract suite must catch. Runs as root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{panic::AssertUnwindSafe, path::Path};

use async_trait::async_trait;
use cocalc_backup::{Bounds, Rustic};
use cocalc_core::{
    backups::{
        Backup, BackupSource, Backups, CheckOptions, Checked, Entries, Erased, ProgressSink, PruneOptions,
        Pruned, Restored, Result,
    },
    ids::{ProjectId, TreePath},
    storage::{ChangeKind, Changes},
};
use cocalc_testkit::backups::comparing;
use common::{on_disk, over};
use futures_util::FutureExt as _;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wrong {
    /// The last change is missing.
    Short,
    /// Those of a directory come before it, or somewhere else.
    Unordered,
    /// A page begins at the beginning.
    Repeats,
    /// It never says that there is more.
    Ends,
    /// Every change is one of content.
    Coarse,
    /// It compares everything, wherever it was asked about.
    Everywhere,
    /// What is not in the backup is never told.
    BlindToNew,
}

#[derive(Debug)]
struct Mutant(Rustic, Wrong);

#[async_trait]
impl Backups for Mutant {
    async fn back_up(&self, source: &BackupSource, progress: ProgressSink<'_>) -> Result<Backup> {
        self.0.back_up(source, progress).await
    }

    async fn list(&self, project: ProjectId) -> Result<Vec<Backup>> {
        self.0.list(project).await
    }

    async fn ls(
        &self,
        project: ProjectId,
        backup: &str,
        directory: &TreePath,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Entries> {
        self.0.ls(project, backup, directory, after, max).await
    }

    async fn find(&self, project: ProjectId, backup: &str, text: &str, max: usize) -> Result<Entries> {
        self.0.find(project, backup, text, max).await
    }

    async fn diff(
        &self,
        project: ProjectId,
        backup: &str,
        now: &Path,
        directory: &TreePath,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes> {
        let root = TreePath::root();
        let directory = if self.1 == Wrong::Everywhere { &root } else { directory };
        let after = after.filter(|_| self.1 != Wrong::Repeats);
        let mut told = self.0.diff(project, backup, now, directory, after, max).await?;
        match self.1 {
            Wrong::Short => drop(told.changes.pop()),
            Wrong::Unordered => told.changes.reverse(),
            Wrong::Ends => told.more = false,
            Wrong::Coarse => told.changes.iter_mut().for_each(|change| {
                if change.kind == ChangeKind::Metadata {
                    change.kind = ChangeKind::Modified;
                }
            }),
            Wrong::BlindToNew => told.changes.retain(|change| change.kind != ChangeKind::Added),
            Wrong::Repeats | Wrong::Everywhere => {}
        }
        Ok(told)
    }

    async fn restore(
        &self,
        project: ProjectId,
        backup: &str,
        path: &TreePath,
        target: &Path,
        progress: ProgressSink<'_>,
    ) -> Result<Restored> {
        self.0.restore(project, backup, path, target, progress).await
    }

    async fn forget(&self, project: ProjectId, backups: &[String]) -> Result<()> {
        self.0.forget(project, backups).await
    }

    async fn prune(&self, project: ProjectId, options: &PruneOptions) -> Result<Pruned> {
        self.0.prune(project, options).await
    }

    async fn check(&self, project: ProjectId, options: &CheckOptions) -> Result<Checked> {
        self.0.check(project, options).await
    }

    async fn erase(&self, project: ProjectId) -> Result<Erased> {
        self.0.erase(project).await
    }
}

#[tokio::test]
async fn what_is_different_is_told_and_wrong_answers_are_caught() {
    let root = tempfile::tempdir().unwrap();
    let rustic = over(on_disk(root.path()), Bounds::default());
    comparing(&rustic, root.path()).await;
    for wrong in [
        Wrong::Short,
        Wrong::Unordered,
        Wrong::Repeats,
        Wrong::Ends,
        Wrong::Coarse,
        Wrong::Everywhere,
        Wrong::BlindToNew,
    ] {
        let mutant = Mutant(rustic.clone(), wrong);
        let checked = AssertUnwindSafe(comparing(&mutant, root.path())).catch_unwind();
        // One that repeats itself would page for ever.
        let checked = tokio::time::timeout(std::time::Duration::from_secs(20), checked).await;
        assert!(!matches!(checked, Ok(Ok(()))), "{wrong:?} was not caught");
    }
}
