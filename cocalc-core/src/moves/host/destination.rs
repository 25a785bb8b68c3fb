//! The steps of the host that is to have the project.

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName, VolumeUuid};

use super::{Inbound, MoveHost, carried, ledger_error, runner_error, storage_error};
use crate::{
    control::{Carried, CommandError, ErrorCode, MoveReply, ProjectConfig},
    grant::Entry,
    moves::{CARRIED_MAX, is_conflict, is_internal, snapshot_name},
    storage::{self, SendHeader, Snapshot},
    stream::BoxRead,
};

/// What is to come.
pub(super) struct Incoming {
    pub(super) source: HostId,
    pub(super) epoch: Epoch,
    pub(super) bytes: u64,
    pub(super) config: ProjectConfig,
    pub(super) snapshots: Vec<Carried>,
}

impl MoveHost {
    pub(super) async fn reserve(
        &self,
        move_id: MoveId,
        project: ProjectId,
        incoming: Incoming,
    ) -> Result<MoveReply, CommandError> {
        let Incoming { source, epoch, bytes, config, snapshots } = incoming;
        if snapshots.len() > CARRIED_MAX || snapshots.iter().any(|snapshot| is_internal(&snapshot.name)) {
            let message =
                format!("the snapshots announced for project {project} are too many, or not its own");
            return Err(CommandError { code: ErrorCode::Invalid, message });
        }
        let reserved = self.ledger.entry(project).and_then(|entry| entry.reserved);
        if !reserved.is_some_and(|reserved| reserved.move_id == move_id && !reserved.discarding) {
            // Only once: later on, what has arrived takes the space.
            (self.admission)(&config, bytes)?;
        }
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
        let here = self.storage.snapshots(project).await.map_err(storage_error)?;
        let here = here.iter().filter(|snapshot| !is_internal(&snapshot.name)).map(carried).collect();
        let policy = config.snapshots.unwrap_or_default();
        let room = config.quota_bytes.map(|plan| policy.limit_bytes(plan).max(bytes).saturating_mul(2));
        let reserve = move |entry: &mut Entry| {
            entry.reserve(move_id, source, epoch, config)?;
            entry.announce(move_id, snapshots, here)
        };
        self.ledger.change(project, reserve).await.map_err(ledger_error)?;
        // What comes was within its limit where it was, and may take more here,
        // where what is left of an earlier stay has one. Its own comes when it
        // is staged; then it is not lifted any more.
        let staged = self.ledger.entry(project).and_then(|entry| entry.reserved?.staged).is_some();
        if !staged {
            match self.storage.set_limit(project, room).await {
                Ok(()) | Err(storage::Error::Unsupported { .. } | storage::Error::NotFound { .. }) => {}
                Err(error) => return Err(storage_error(error)),
            }
        }
        Ok(MoveReply::Reserved)
    }

    pub(super) async fn stage(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        (name, origin): (SnapshotName, VolumeUuid),
        own: Vec<Carried>,
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
        let here: Vec<Carried> = snapshots.iter().map(carried).collect();
        if let Some(missing) = own.iter().find(|snapshot| !here.contains(snapshot)) {
            let message = format!("{} of project {project} has not arrived", missing.name);
            return Err(CommandError { code: ErrorCode::NotFound, message });
        }
        // Of an earlier stay, and deleted since. Where there was a conflict,
        // nobody knows what they are worth.
        let conflict = here.iter().any(|snapshot| is_conflict(snapshot.name.as_str()));
        let stale = |snapshot: &Carried| !conflict && !is_internal(&snapshot.name) && !own.contains(snapshot);
        let stale = here.into_iter().filter(stale).collect();
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
        let policy = reserved.config.snapshots.unwrap_or_default();
        let limit = reserved.config.quota_bytes.map(|plan| policy.limit_bytes(plan));
        match self.storage.set_limit(project, limit).await {
            // Without quotas the limit is only a wish, as the backend warns.
            Ok(()) | Err(storage::Error::Unsupported { .. }) => {}
            Err(error) => return Err(storage_error(error)),
        }
        let stage = move |entry: &mut Entry| entry.stage(move_id, origin, stale);
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
            if let Some(had) = entry.reserved.as_ref().and_then(|reserved| reserved.had.as_ref()) {
                for snapshot in self.storage.snapshots(project).await.map_err(storage_error)? {
                    if !is_internal(&snapshot.name) && !had.contains(&carried(&snapshot)) {
                        self.storage.delete_snapshot(project, &snapshot.name).await.map_err(storage_error)?;
                    }
                }
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
        let entry = self.ledger.known(header.project)?;
        entry.expects(move_id, from)?;
        let this = Carried { name: header.name.clone(), origin: header.origin };
        let announced = entry.reserved.is_some_and(|reserved| reserved.announced.contains(&this));
        // Any other name could take the place of, or pose as, a snapshot that
        // people made.
        if announced || header.name.as_str().starts_with(&super::snapshot_prefix(move_id)) {
            return Ok(());
        }
        let message = format!("{} is not a snapshot of move {move_id}", header.name);
        Err(CommandError { code: ErrorCode::Invalid, message })
    }

    /// Deletes what has the name of a snapshot that comes and is another: it is
    /// of an earlier stay, and the owner has deleted it since.
    async fn make_way(&self, header: &SendHeader) -> Result<(), CommandError> {
        let project = header.project;
        let here = self.storage.snapshots(project).await.map_err(storage_error)?;
        let in_the_way = here.iter().any(|s| s.name == header.name && s.origin != header.origin);
        let conflict = here.iter().any(|snapshot| is_conflict(snapshot.name.as_str()));
        // The storage refuses what is still in the way.
        if in_the_way && !conflict && !is_internal(&header.name) {
            self.storage.delete_snapshot(project, &header.name).await.map_err(storage_error)?;
        }
        Ok(())
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
            self.make_way(header).await?;
            self.storage.receive(header, stream).await.map_err(storage_error)
        };
        self.receives.run(header.project, receive).await.unwrap_or_else(|| {
            let message = format!("receiving project {} was stopped", header.project);
            Err(CommandError { code: ErrorCode::Unavailable, message })
        })
    }
}
