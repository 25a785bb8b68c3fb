//! Tries out backups: restores the newest one of a project into a volume that
//! nobody serves, and compares it with the snapshot that it was made of.

mod compare;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    backups::{Backup, Backups, Status, Trial, Work, backup_error},
    control::{CommandError, DrillAgainst, DrillReport, ErrorCode},
    ids::{HostId, ProjectId, TreePath},
    moves::host::storage_error,
    storage::{Storage, VolumeOptions},
};
use sha2::{Digest as _, Sha256};
use tokio::{sync::Mutex, time::Instant};

/// What is kept free on the volume besides.
const RESERVE_BYTES: u64 = 256 << 20;
/// No disk restores faster.
const BYTES_PER_SEC_MAX: u64 = 20 << 30;
const ENTRIES_PER_SEC_MAX: u64 = 1_000_000;

/// Tries out backups on one host, one after the other.
pub(crate) struct Drill {
    storage: Arc<dyn Storage>,
    free_bytes: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// The volume into which it restores is that of a project which there is
    /// not, the same each time: what a crash left is found by its name.
    place: ProjectId,
    alone: Mutex<()>,
}

impl fmt::Debug for Drill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drill").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Drill {
    /// Tries out backups below `storage`, after deleting what an earlier
    /// process left there.
    pub(crate) async fn open(
        host: HostId,
        storage: Arc<dyn Storage>,
        free_bytes: Arc<dyn Fn() -> u64 + Send + Sync>,
    ) -> Self {
        let digest = Sha256::digest(format!("cocalc backup drill of host {host}"));
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        let place = ProjectId::from_random_bytes(bytes);
        if let Err(error) = storage.delete(place).await {
            tracing::warn!(error = %cocalc_core::chain(&error), "cannot delete what an earlier drill restored");
        }
        Self { storage, free_bytes, place, alone: Mutex::default() }
    }
}

#[async_trait]
impl Trial for Drill {
    #[tracing::instrument(name = "backup.drill", skip_all, fields(%project))]
    async fn drill(
        &self,
        project: ProjectId,
        backups: &dyn Backups,
        status: &Status,
        whole: bool,
        work: &Work,
    ) -> Result<DrillReport, CommandError> {
        let _alone = self.alone.lock().await;
        let all = backups.list(project).await.map_err(|error| backup_error(&error))?;
        let newest = all.into_iter().max_by(Backup::order);
        let backup = newest.ok_or_else(|| refused(ErrorCode::NotFound, "the project has no backup yet"))?;
        let (free, needed) = ((self.free_bytes)(), backup.bytes.saturating_add(RESERVE_BYTES));
        if free < needed {
            let message =
                format!("{needed} bytes are needed to try it out, and {free} are free on this host");
            return Err(refused(ErrorCode::NoSpace, &message));
        }
        self.storage.delete(self.place).await.map_err(storage_error)?;
        let options = VolumeOptions { limit_bytes: None };
        let volume = self.storage.create(self.place, &options).await.map_err(storage_error)?;
        // Also when this is dropped, which is when somebody cancels it.
        let _cleared = Cleared(Arc::clone(&self.storage), self.place);
        let none = || refused(ErrorCode::Invalid, "this host's storage has no files");
        let target = volume.path.ok_or_else(none)?.join("restored");
        tokio::fs::create_dir(&target).await.map_err(failed)?;

        let begun = Instant::now();
        let root = TreePath::root();
        let restored =
            backups.restore(project, &backup.id, &root, &target, &|state| work.progress(state)).await;
        let restored = restored.map_err(|error| backup_error(&error))?;
        let took = begun.elapsed();
        let mut wrong = implausible(&backup, restored.entries, restored.bytes, took);

        // The snapshot that it was made of, if this host made it and has it yet.
        let last = status.last.as_ref().filter(|last| last.backup.id == backup.id);
        let held = match last {
            Some(last) => match self.storage.hold(project, &last.snapshot).await {
                Ok(hold) => {
                    let path = self.storage.snapshot_path(project, &last.snapshot).await;
                    path.map_err(storage_error)?.map(|path| (path, hold))
                }
                Err(cocalc_core::storage::Error::NoSnapshot { .. }) => None,
                Err(error) => return Err(storage_error(error)),
            },
            None => None,
        };
        let against = match &held {
            Some((snapshot, _)) => {
                let (snapshot, target) = (snapshot.clone(), target.clone());
                let compared = tokio::task::spawn_blocking(move || compare::trees(&snapshot, &target));
                let found =
                    compared.await.map_err(|error| failed(std::io::Error::other(error)))?.map_err(failed)?;
                wrong.extend(found.wrong);
                if whole {
                    wrong.extend(found.missing);
                }
                DrillAgainst::Snapshot
            }
            None => DrillAgainst::Record,
        };
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        wrong.truncate(compare::WORDS_MAX);
        tracing::info!(
            backup = backup.id,
            ?against,
            entries = restored.entries,
            bytes = restored.bytes,
            millis,
            wrong = wrong.len(),
            "tried out a backup"
        );
        Ok(DrillReport { backup, against, entries: restored.entries, bytes: restored.bytes, millis, wrong })
    }
}

/// What cannot be, if the backup was restored: less than is in it, or faster
/// than any disk.
fn implausible(backup: &Backup, entries: u64, bytes: u64, took: Duration) -> Vec<String> {
    let mut wrong = Vec::new();
    if entries < backup.files {
        wrong.push(format!("{entries} names were restored, and {} are in the backup", backup.files));
    }
    // Of a backup the words of its links count, too, which are not restored as
    // bytes of files: at most a page each.
    if bytes.saturating_add(backup.files.saturating_mul(4096)) < backup.bytes {
        wrong.push(format!("{bytes} bytes were restored, and {} are in the backup", backup.bytes));
    }
    let least = Duration::from_millis(bytes.saturating_mul(1_000) / BYTES_PER_SEC_MAX)
        .max(Duration::from_millis(entries.saturating_mul(1_000) / ENTRIES_PER_SEC_MAX));
    if took < least {
        wrong.push(format!(
            "{entries} names with {bytes} bytes in {} ms: nothing was restored so fast",
            took.as_millis()
        ));
    }
    wrong
}

fn refused(code: ErrorCode, message: &str) -> CommandError {
    CommandError { code, message: message.to_owned() }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what `map_err` gives")]
fn failed(error: std::io::Error) -> CommandError {
    CommandError { code: ErrorCode::Failed, message: format!("cannot try out the backup: {error}") }
}

/// Deletes the volume when it is dropped.
struct Cleared(Arc<dyn Storage>, ProjectId);

impl Drop for Cleared {
    fn drop(&mut self) {
        let (storage, place) = (Arc::clone(&self.0), self.1);
        // What this does not get to do, the next drill does first.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = storage.delete(place).await {
                    tracing::warn!(error = %cocalc_core::chain(&error), "cannot delete what a drill restored");
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::{
        backups::BackupKind,
        ids::{Epoch, Timestamp},
    };

    use super::*;

    #[test]
    fn a_restore_that_did_nothing_is_found_out() {
        let backup = Backup {
            id: "x".into(),
            project: ProjectId::random(),
            host: HostId::random(),
            epoch: Epoch::FIRST,
            kind: BackupKind::Manual,
            taken: Timestamp::UNIX_EPOCH,
            bytes: 100 << 30,
            added_bytes: 0,
            files: 5_000_000,
            files_read: 0,
        };
        let look = |entries, bytes, millis| {
            implausible(&backup, entries, bytes, Duration::from_millis(millis)).len()
        };
        assert_eq!(look(5_000_100, 100 << 30, 600_000), 0);
        assert_eq!(look(0, 0, 33), 2, "less than is in it");
        assert_eq!(look(5_000_100, 100 << 30, 33), 1, "too fast");
        let empty = Backup { bytes: 0, files: 0, ..backup.clone() };
        assert_eq!(implausible(&empty, 3, 0, Duration::from_millis(1)), [] as [String; 0]);
    }
}
