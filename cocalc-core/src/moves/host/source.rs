//! The steps of the host that has the project.

use std::time::Duration;

use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName};

use super::{MoveHost, is_up, ledger_error, runner_error, storage_error, transfer_error};
use crate::{
    control::{CommandError, ErrorCode, MoveReply, ProjectConfig},
    grant::Refusal,
    router::HostAddress,
    storage::SendOptions,
};

impl MoveHost {
    pub(super) async fn send(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        name: SnapshotName,
        base: Option<SnapshotName>,
        to: (HostId, HostAddress),
    ) -> Result<MoveReply, CommandError> {
        // Not in the project's turn: it may take hours, and starts and stops
        // go on meanwhile. The lane keeps a repeated command waiting until
        // the first has ended; the receiver then has it already.
        let sent = self.sends.run(project, self.send_now(move_id, project, epoch, &name, base, to)).await;
        sent.unwrap_or_else(|| {
            let message = format!("sending project {project} was stopped");
            Err(CommandError { code: ErrorCode::Unavailable, message })
        })
    }

    async fn send_now(
        &self,
        move_id: MoveId,
        project: ProjectId,
        epoch: Epoch,
        name: &SnapshotName,
        base: Option<SnapshotName>,
        (host, address): (HostId, HostAddress),
    ) -> Result<MoveReply, CommandError> {
        let entry = self.ledger.known(project)?;
        entry.source(move_id, epoch)?;
        if !name.as_str().starts_with(&super::snapshot_prefix(move_id)) {
            let message = format!("{name} is not a snapshot of move {move_id}");
            return Err(CommandError { code: ErrorCode::Invalid, message });
        }
        let snapshot = self.storage.snapshot(project, name).await.map_err(storage_error)?;
        let began = self.clock.boot();
        let stream = self
            .storage
            .send(project, name, &SendOptions::since(base.as_ref()))
            .await
            .map_err(storage_error)?;
        let progress = |bytes| (self.on_progress)(project, move_id, bytes);
        let delivered = self.transfer.send(host, &address, move_id, stream, &progress).await;
        let delivered = delivered.map_err(transfer_error)?;
        if delivered.snapshot.origin != snapshot.origin {
            let message = format!("host {host} acknowledged another snapshot than {name}");
            return Err(CommandError { code: ErrorCode::Failed, message });
        }
        Ok(MoveReply::Sent {
            name: name.clone(),
            origin: snapshot.origin,
            bytes: delivered.bytes,
            millis: u64::try_from(self.clock.boot().saturating_sub(began).as_millis()).unwrap_or(u64::MAX),
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
        Ok(MoveReply::Frozen { epoch, name, origin: snapshot.origin, was_running })
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
        self.sends.stop(project).await;
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
        self.sends.stop(project).await;
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
