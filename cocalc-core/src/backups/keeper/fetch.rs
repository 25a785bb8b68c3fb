//! Brings backups to this host: each becomes a snapshot of the project that it
//! is restored into, and what happens with that is up to whoever asked.

use std::sync::Arc;

use cocalc_ids::{Epoch, MoveId, ProjectId, SnapshotName, TreePath};

use super::{Keeper, Restoring, cancelled};
use crate::{
    backups::{Backup, Backups, Restored, Work, backup_error},
    control::{BackupsOutcome, CommandError, ErrorCode},
    moves::host::storage_error,
    snapshots::RaisedRoom,
    storage::Snapshot,
};

/// What is kept free on the volume beside what comes.
const RESERVE_BYTES: u64 = 256 << 20;
/// What an entry of a directory may take beside its bytes.
const ENTRY_BYTES: u64 = 4096;

/// What is to be fetched.
pub(super) struct Fetch {
    /// Whose backup.
    pub(super) source: ProjectId,
    /// Which.
    pub(super) backup: String,
    /// What of it.
    pub(super) path: TreePath,
    /// What the snapshot is called.
    pub(super) name: SnapshotName,
    /// The move under which this host expects the project, if it has not got
    /// it yet.
    pub(super) move_id: Option<MoveId>,
}

impl Keeper {
    pub(super) async fn fetch(
        &self,
        project: ProjectId,
        epoch: Epoch,
        what: Fetch,
        work: &Work,
    ) -> Result<BackupsOutcome, CommandError> {
        self.may_fetch(project, epoch, what.move_id)?;
        let _going_on = Restoring::begin(self, project);
        let storage = &self.0.parts.storage;
        let backups = (self.0.parts.reading)(project, epoch);
        let found = find(&*backups, what.source, &what.backup).await?;
        let here = storage.snapshots(project).await.map_err(storage_error)?;
        if let Some(snapshot) = here.into_iter().find(|snapshot| snapshot.name == what.name) {
            // An earlier try of the same operation brought it.
            return Ok(BackupsOutcome::Fetched { snapshot, restored: Restored::default(), backup: found });
        }
        let fetched = tokio::select! {
            fetched = self.fetch_in_place(project, epoch, &what, &found, &*backups, work) => fetched,
            () = work.cancelled() => Err(cancelled("the restore")),
        };
        let (snapshot, restored) = fetched?;
        // Its change times are new, so the next backup goes by sizes and times.
        self.rewritten(project).await;
        Ok(BackupsOutcome::Fetched { snapshot, restored, backup: found })
    }

    /// The project is this host's, or is to be.
    pub(super) fn may_fetch(
        &self,
        project: ProjectId,
        epoch: Epoch,
        move_id: Option<MoveId>,
    ) -> Result<(), CommandError> {
        let Some(move_id) = move_id else {
            self.0.parts.ledger.permit(project, epoch)?;
            return Ok(());
        };
        let reserved = self.0.parts.ledger.known(project)?.reserved;
        let expected = |r: &crate::grant::Reservation| {
            r.move_id == move_id && r.epoch == epoch && !r.discarding && r.staged.is_none()
        };
        if reserved.as_ref().is_some_and(expected) {
            return Ok(());
        }
        let message = format!("project {project} is not expected here by move {move_id}");
        Err(CommandError { code: ErrorCode::StaleEpoch, message })
    }

    async fn fetch_in_place(
        &self,
        project: ProjectId,
        epoch: Epoch,
        what: &Fetch,
        found: &Backup,
        backups: &dyn Backups,
        work: &Work,
    ) -> Result<(Snapshot, Restored), CommandError> {
        // People wait for it, so it does not queue behind backups that are due.
        let place = Arc::clone(&self.0.restores).acquire_owned().await;
        let _place = place.map_err(|_| cancelled("the restore"))?;
        let storage = &self.0.parts.storage;
        let needs = found.bytes.saturating_add(found.files.saturating_mul(ENTRY_BYTES));
        let free = (self.0.parts.free_bytes)();
        if what.path.is_root() && free < needs.saturating_add(RESERVE_BYTES) {
            let message = format!(
                "the backup takes about {needs} bytes, and this host has {free} free; \
                 make room, or restore it on another host"
            );
            return Err(CommandError { code: ErrorCode::NoSpace, message });
        }
        let room = self.make_room(project, what, needs).await?;
        let place = storage.stage(project, &what.name).await.map_err(storage_error)?;
        let progress = |state| work.progress(state);
        let restored = backups.restore(what.source, &what.backup, &what.path, place.path(), &progress).await;
        let restored = restored.map_err(|error| backup_error(&error))?;
        // Whoever took the project away meanwhile wants nothing of it.
        self.may_fetch(project, epoch, what.move_id)?;
        let snapshot = place.publish().await.map_err(storage_error)?;
        // Until the snapshot is deleted.
        if let Some(room) = room {
            room.keep();
        }
        Ok((snapshot, restored))
    }

    /// Lets a project of this host take `bytes` more, for what comes beside what
    /// is there. One that this host expects has no limit yet.
    async fn make_room(
        &self,
        project: ProjectId,
        what: &Fetch,
        bytes: u64,
    ) -> Result<Option<RaisedRoom>, CommandError> {
        let entry = self.0.parts.ledger.known(project)?;
        if what.move_id.is_some() || entry.may_run().is_none() {
            return Ok(None);
        }
        let room = self.0.parts.snapshots.raise(&entry, what.name.clone(), bytes).await;
        room.map(Some).map_err(storage_error)
    }
}

async fn find(backups: &dyn Backups, source: ProjectId, id: &str) -> Result<Backup, CommandError> {
    let all = backups.list(source).await.map_err(|error| backup_error(&error))?;
    all.into_iter().find(|backup| backup.id == id).ok_or_else(|| CommandError {
        code: ErrorCode::NotFound,
        message: format!("project {source} has no backup {id}"),
    })
}
