//! The steps of the host that has the project.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName};

use super::{
    MoveHost, Sending, StreamSource, TransferError, carried, is_up, ledger_error, runner_error,
    storage_error, transfer_error,
};
use crate::{
    control::{Carried, CommandError, ErrorCode, MoveReply, ProjectConfig},
    grant::Refusal,
    moves::CARRIED_MAX,
    router::HostAddress,
    storage::{self, SendOptions, SendStream, Storage},
};

/// How long a survey measures the project before it goes on without.
const MEASURE_LIMIT: Duration = Duration::from_secs(20);

/// How and where a snapshot is sent.
pub(super) struct To {
    pub(super) host: HostId,
    pub(super) address: HostAddress,
    pub(super) base: Option<SnapshotName>,
    pub(super) version_max: u32,
}

impl MoveHost {
    pub(super) async fn survey(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
    ) -> Result<MoveReply, CommandError> {
        self.ledger.known(project)?.source(move_id, epoch)?;
        // What may run unseen cannot be frozen, and nothing is carried in vain.
        self.runner.status(project).await.map_err(runner_error)?;
        let snapshots = self.list_carried(project).await?;
        // A backend without quotas walks the files, which may take long.
        let usage = tokio::time::timeout(MEASURE_LIMIT, self.storage.usage(project)).await;
        let bytes = match usage {
            Ok(Ok(usage)) => usage.charged_bytes,
            Ok(Err(error)) => {
                tracing::warn!(%project, error = %crate::chain(&error), "cannot measure what is to be moved");
                0
            }
            Err(_) => 0,
        };
        Ok(MoveReply::Surveyed { bytes, snapshots })
    }

    async fn list_carried(&self, project: ProjectId) -> Result<Vec<Carried>, CommandError> {
        let own = self.own_snapshots(project).await?;
        if own.len() > CARRIED_MAX {
            let message = format!(
                "project {project} has {} snapshots, and {CARRIED_MAX} can be moved with it: delete some first",
                own.len()
            );
            return Err(CommandError { code: ErrorCode::Invalid, message });
        }
        Ok(own.iter().map(carried).collect())
    }

    pub(super) async fn carry(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        snapshot: Carried,
        to: To,
    ) -> Result<MoveReply, CommandError> {
        let work = async {
            self.ledger.known(project)?.source(move_id, epoch)?;
            // In its turn, so that it cannot go between the look and the hold.
            let there = self.own_snapshots(project).await?.iter().any(|own| carried(own) == snapshot);
            let hold = if there { self.storage.hold(project, &snapshot.name).await.ok() } else { None };
            let Some(hold) = hold else { return Ok(MoveReply::Gone { snapshot }) };
            let sent = self.deliver(move_id, project, &snapshot, to).await?;
            // What follows is a delta to it.
            self.bases().insert(project, hold);
            Ok(sent)
        };
        self.in_lane(project, work).await
    }

    pub(super) async fn send(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        name: SnapshotName,
        to: To,
    ) -> Result<MoveReply, CommandError> {
        let work = async {
            self.ledger.known(project)?.source(move_id, epoch)?;
            if !name.as_str().starts_with(&super::snapshot_prefix(move_id)) {
                let message = format!("{name} is not a snapshot of move {move_id}");
                return Err(CommandError { code: ErrorCode::Invalid, message });
            }
            let snapshot = self.storage.snapshot(project, &name).await.map_err(storage_error)?;
            self.deliver(move_id, project, &carried(&snapshot), to).await
        };
        self.in_lane(project, work).await
    }

    /// Not in the project's turn: it may take hours, and starts and stops go
    /// on meanwhile. The lane keeps a repeated command waiting until the first
    /// has ended; the receiver then has it already.
    async fn in_lane(
        &self,
        project: ProjectId,
        work: impl Future<Output = Result<MoveReply, CommandError>>,
    ) -> Result<MoveReply, CommandError> {
        self.sends.run(project, work).await.unwrap_or_else(|| {
            let message = format!("sending project {project} was stopped");
            Err(CommandError { code: ErrorCode::Unavailable, message })
        })
    }

    async fn deliver(
        &self,
        move_id: MoveId,
        project: ProjectId,
        snapshot: &Carried,
        to: To,
    ) -> Result<MoveReply, CommandError> {
        let began = self.clock.boot();
        let Carried { name, origin } = snapshot;
        let options = SendOptions { base: to.base, version_max: to.version_max, ..SendOptions::default() };
        let mut source = Reader { storage: &*self.storage, project, name, options, first: Mutex::default() };
        let first = match self.storage.send(project, name, &source.options).await {
            // What it was to be a delta to was deleted since.
            Err(storage::Error::NoSnapshot { name: missing, .. })
                if source.options.base.as_ref() == Some(&missing) =>
            {
                source.options.base = None;
                self.storage.send(project, name, &source.options).await
            }
            other => other,
        };
        let first = first.map_err(storage_error)?;
        let (estimated_bytes, left_out) = (first.header.estimated_bytes, first.header.left_out.clone());
        *source.first.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(first);
        let progress = |bytes| {
            let name = name.clone();
            (self.on_progress)(&Sending { project, move_id, name, bytes, estimated_bytes });
        };
        let mut delivered = self.transfer.send(to.host, &to.address, move_id, &source, &progress).await;
        if let Err(TransferError::Refused(refusal)) = &delivered
            && refusal.code == ErrorCode::Failed
            && (source.options.base.is_some() || source.options.version_max > 1)
        {
            // Its copy of the base can have what no stream carries (`chattr +C`,
            // for one), to which this one's changes cannot be applied. Whole and
            // plain there is nothing that could be in the way.
            tracing::warn!(%project, %move_id, %name, %refusal, "it is sent once more, whole and plain");
            source.options = SendOptions { version_max: 1, ..SendOptions::whole() };
            source.first = Mutex::default();
            delivered = self.transfer.send(to.host, &to.address, move_id, &source, &progress).await;
        }
        let delivered = delivered.map_err(transfer_error)?;
        if delivered.snapshot.origin != *origin {
            let message = format!("host {} acknowledged another snapshot than {name}", to.host);
            return Err(CommandError { code: ErrorCode::Failed, message });
        }
        if !left_out.is_empty() {
            tracing::warn!(%project, %move_id, %name, left_out = left_out.join("; "), "not all can be moved");
        }
        Ok(MoveReply::Sent {
            name: name.clone(),
            origin: *origin,
            bytes: delivered.bytes,
            millis: u64::try_from(self.clock.boot().saturating_sub(began).as_millis()).unwrap_or(u64::MAX),
            left_out,
        })
    }

    pub(super) fn park(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
    ) -> Result<MoveReply, CommandError> {
        let now = self.clock.boot();
        self.ledger.unpark_lapsed(now);
        self.ledger.park(project, move_id, epoch, now + self.park_max)?;
        // A move that died between park and freeze must not hold requests for
        // ever. The timer decides nothing but that.
        let (ledger, limit) = (self.ledger.clone(), self.park_max);
        tokio::spawn(async move {
            tokio::time::sleep(limit).await;
            ledger.unpark_if(project, now + limit);
        });
        Ok(MoveReply::Parked)
    }

    pub(super) async fn freeze(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        name: SnapshotName,
        grace: Duration,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.ledger.known(project)?.source(move_id, epoch)?;
        let status = self.runner.status(project).await.map_err(runner_error)?;
        let was_running = is_up(status.state);
        let freeze = move |entry: &mut crate::grant::Entry| entry.freeze(move_id, epoch, was_running);
        // Durable first: from here on nothing starts it under this epoch, not
        // even this host after a crash.
        let entry = self.ledger.change(project, freeze).await.map_err(ledger_error)?;
        let was_running = entry.frozen.is_some_and(|frozen| frozen.was_running);
        self.runner.stop(project, grace).await.map_err(runner_error)?;
        let snapshot = self.storage.snapshot(project, &name).await.map_err(storage_error)?;
        // Nobody takes or deletes one from here on.
        let snapshots = self.list_carried(project).await?;
        Ok(MoveReply::Frozen { epoch, name, origin: snapshot.origin, was_running, snapshots })
    }

    pub(super) async fn thaw(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
        start: bool,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let before = self.ledger.known(project)?;
        let running = if before.granted != Some(epoch) && before.may_run().is_some() {
            // The freeze never arrived, so it may be running under the epoch
            // that ends now; then it goes on under the new one.
            is_up(self.runner.status(project).await.map_err(runner_error)?.state)
        } else {
            false
        };
        let thaw =
            move |entry: &mut crate::grant::Entry| entry.thaw(move_id, epoch, config, start || running);
        let entry = self.ledger.change(project, thaw).await.map_err(ledger_error)?;
        self.end_sends(project).await;
        if entry.granted == Some(epoch) {
            if entry.start_pending {
                let status = self.runner.status(project).await.map_err(runner_error)?;
                if status.epoch != Some(epoch) {
                    // A runner refuses to start what runs under another epoch.
                    self.runner.stop(project, self.stop_grace).await.map_err(runner_error)?;
                }
                self.start_pending(project).await?;
            }
            self.ledger.unpark(project);
        }
        self.delete_move_snapshots(move_id, project).await?;
        Ok(MoveReply::Thawed { epoch })
    }

    pub(super) async fn retire(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        (owner, address): (HostId, HostAddress),
        keep_as: SnapshotName,
    ) -> Result<MoveReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        let before = match self.ledger.known(project) {
            Ok(entry) => entry,
            // A host that lost its ledger has nothing to let go of.
            Err(Refusal::Unknown { .. }) => return Ok(MoveReply::Retired),
            Err(refusal) => return Err(refusal.into()),
        };
        let past = before.is_past(epoch);
        let retire = move |entry: &mut crate::grant::Entry| entry.retire(move_id, owner, epoch, address);
        self.ledger.change(project, retire).await.map_err(ledger_error)?;
        if past {
            return Ok(MoveReply::Retired);
        }
        self.end_sends(project).await;
        self.runner.stop(project, self.stop_grace).await.map_err(runner_error)?;
        self.runner.remove(project).await.map_err(runner_error)?;
        if self.has_volume(project).await? {
            self.storage.set_aside(project, &keep_as).await.map_err(storage_error)?;
        }
        self.delete_older_undo(move_id, project).await?;
        self.ledger.free_slot(project).await.map_err(ledger_error)?;
        Ok(MoveReply::Retired)
    }
}

/// Reads a snapshot as often as it is needed.
struct Reader<'a> {
    storage: &'a dyn Storage,
    project: ProjectId,
    name: &'a SnapshotName,
    options: SendOptions,
    /// The first of its streams, which is open already.
    first: Mutex<Option<SendStream>>,
}

#[async_trait]
impl StreamSource for Reader<'_> {
    async fn open(&self) -> Result<SendStream, TransferError> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        match first {
            Some(stream) => Ok(stream),
            None => {
                let stream = self.storage.send(self.project, self.name, &self.options).await;
                stream.map_err(|error| TransferError::Source { source: error.into() })
            }
        }
    }

    fn repeatable(&self) -> bool {
        self.storage.capabilities().repeatable_streams
    }
}
