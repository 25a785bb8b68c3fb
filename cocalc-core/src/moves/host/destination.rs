//! The steps of the host that is to have the project.

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName, VolumeUuid};

use super::{Inbound, MoveHost, ledger_error, runner_error, storage_error};
use crate::{
    control::{CommandError, ErrorCode, MoveReply, ProjectConfig},
    grant::Entry,
    moves::snapshot_name,
    storage::{self, SendHeader, Snapshot},
    stream::BoxRead,
};

impl MoveHost {
    pub(super) async fn reserve(
        &self,
        move_id: MoveId,
        project: ProjectId,
        source: HostId,
        epoch: Epoch,
        bytes: u64,
        config: ProjectConfig,
    ) -> Result<MoveReply, CommandError> {
        (self.admission)(&config, bytes)?;
        let _turn = self.ledger.turn(project).await;
        if let Some(entry) = self.ledger.entry(project)
            && let Some(held) = entry.reserved
            && held.move_id != move_id
            && (held.discarding || held.epoch < epoch)
        {
            // An earlier move that can no longer be committed: the map has had
            // a higher epoch since, or its abort was recorded.
            self.discard_now(held.move_id, project).await?;
        }
        let before = self.ledger.entry(project).unwrap_or_else(|| Entry::new(project));
        before.clone().reserve(move_id, source, epoch, config.clone()).map_err(CommandError::from)?;
        if before.reserved.is_none() {
            // Whatever still lies here is of an epoch that is over, since the
            // source has the project now. Nothing of it may be taken for what
            // this move brings.
            let seen = self.ledger.observe(project, source, epoch, None).await.map_err(ledger_error)?;
            self.put_aside(&seen.unwrap_or(before)).await?;
        }
        let reserve = move |entry: &mut Entry| entry.reserve(move_id, source, epoch, config);
        self.ledger.change(project, reserve).await.map_err(ledger_error)?;
        Ok(MoveReply::Reserved)
    }

    pub(super) async fn stage(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        name: SnapshotName,
        origin: VolumeUuid,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let entry = self.ledger.known(project)?;
        let reserved = entry.reserved.as_ref().filter(|r| r.move_id == move_id && !r.discarding);
        let Some(reserved) = reserved.filter(|r| r.epoch == epoch) else {
            let message = format!("move {move_id} of project {project} is not expected here");
            return Err(CommandError { code: ErrorCode::StaleEpoch, message });
        };
        if reserved.staged == Some(origin) {
            return Ok(MoveReply::Staged { origin });
        }
        self.receives.stop(project).await;
        let snapshots = self.storage.snapshots(project).await.map_err(storage_error)?;
        match snapshots.iter().find(|snapshot| snapshot.name == name) {
            Some(snapshot) if snapshot.origin == origin => {}
            Some(_) => {
                let message = format!("{name} of project {project} is not the frozen snapshot");
                return Err(CommandError { code: ErrorCode::Invalid, message });
            }
            None => {
                let message = format!("{name} of project {project} has not arrived");
                return Err(CommandError { code: ErrorCode::NotFound, message });
            }
        }
        let former = snapshot_name(move_id, "former");
        self.storage.restore(project, &name, &former).await.map_err(storage_error)?;
        match self.storage.set_limit(project, reserved.config.quota_bytes).await {
            // Without quotas the limit is only a wish, as the backend warns.
            Ok(()) | Err(storage::Error::Unsupported { .. }) => {}
            Err(error) => return Err(storage_error(error)),
        }
        let stage = move |entry: &mut Entry| entry.stage(move_id, origin);
        self.ledger.change(project, stage).await.map_err(ledger_error)?;
        Ok(MoveReply::Staged { origin })
    }

    pub(super) async fn activate(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
        start: bool,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let activate = move |entry: &mut Entry| entry.activate(move_id, epoch, config, start);
        self.ledger.known(project)?;
        self.ledger.change(project, activate).await.map_err(ledger_error)?;
        let report = self.start_pending(project).await?;
        Ok(MoveReply::Activated { epoch, report })
    }

    pub(super) async fn discard(
        &self,
        move_id: MoveId,
        project: ProjectId,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.discard_now(move_id, project).await?;
        Ok(MoveReply::Discarded)
    }

    async fn discard_now(&self, move_id: MoveId, project: ProjectId) -> Result<(), CommandError> {
        // Durable first: nothing more is accepted, so what is deleted stays
        // deleted, and a late Reserve does not come back to life.
        let mark = move |entry: &mut Entry| {
            entry.discard(move_id);
            Ok(())
        };
        self.ledger.change(project, mark).await.map_err(ledger_error)?;
        self.delete_arrived(move_id, project).await
    }

    /// Deletes what a discarded move brought here.
    pub(super) async fn delete_arrived(
        &self,
        move_id: MoveId,
        project: ProjectId,
    ) -> Result<(), CommandError> {
        let entry = self.ledger.known(project)?;
        let ours = entry.reserved.as_ref().is_some_and(|r| r.move_id == move_id && r.discarding);
        if ours {
            self.receives.stop(project).await;
            self.runner.remove(project).await.map_err(runner_error)?;
            // Not `Storage::delete`: the project's snapshots from when it lived
            // here before stay.
            if self.has_volume(project).await? {
                let doomed = snapshot_name(move_id, "discarded");
                self.storage.set_aside(project, &doomed).await.map_err(storage_error)?;
            }
        }
        self.delete_move_snapshots(move_id, project).await?;
        let forget = move |entry: &mut Entry| {
            entry.discarded(move_id);
            Ok(())
        };
        self.ledger.change(project, forget).await.map_err(ledger_error)?;
        self.ledger.free_slot(project).await.map_err(ledger_error)
    }

    fn expected(&self, from: HostId, move_id: MoveId, header: &SendHeader) -> Result<(), CommandError> {
        self.ledger.known(header.project)?.expects(move_id, from)?;
        let ours = |name: &SnapshotName| name.as_str().starts_with(&super::snapshot_prefix(move_id));
        // A name outside of the move's could take the place of, or pose as, a
        // snapshot that people made.
        if ours(&header.name) {
            return Ok(());
        }
        let message = format!("{} is not a snapshot of move {move_id}", header.name);
        Err(CommandError { code: ErrorCode::Invalid, message })
    }
}

#[async_trait]
impl Inbound for MoveHost {
    async fn offered(
        &self,
        from: HostId,
        move_id: MoveId,
        header: &SendHeader,
    ) -> Result<Option<Snapshot>, CommandError> {
        self.expected(from, move_id, header)?;
        let snapshots = self.storage.snapshots(header.project).await.map_err(storage_error)?;
        Ok(snapshots.into_iter().find(|s| s.name == header.name && s.origin == header.origin))
    }

    async fn receive(
        &self,
        from: HostId,
        move_id: MoveId,
        header: &SendHeader,
        stream: BoxRead,
    ) -> Result<Snapshot, CommandError> {
        let receive = async {
            // Asked again when its turn has come: an abort may have come first.
            self.expected(from, move_id, header)?;
            self.storage.receive(header, stream).await.map_err(storage_error)
        };
        self.receives.run(header.project, receive).await.unwrap_or_else(|| {
            let message = format!("receiving project {} was stopped", header.project);
            Err(CommandError { code: ErrorCode::Unavailable, message })
        })
    }
}
