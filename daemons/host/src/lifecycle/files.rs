//! Commands about a project's files: what is different, copies, clones, usage.

use cocalc_core::{
    control::{CommandError, FRAME_BYTES_MAX, HostReply, ProjectConfig, UsageReport},
    ids::{Epoch, OperationId, ProjectId, SnapshotName, TreePath},
    moves::host::{runner_error, storage_error},
    runner::{self, Applied},
    storage::{self, Changes, CloneOptions, CopyOptions, Place, VolumeOptions},
};

use super::Lifecycle;

/// The most changes in one answer, whoever asks for more.
const CHANGES_MAX: usize = 2_000;
/// What an answer with changes may take, so that it fits a frame with what goes
/// around it.
const CHANGES_BYTES_MAX: usize = FRAME_BYTES_MAX / 4 * 3;

/// What is compared.
pub(super) struct Comparison {
    pub(super) from: SnapshotName,
    pub(super) to: Option<SnapshotName>,
    pub(super) after: Option<TreePath>,
    pub(super) max: usize,
}

/// Of what a project is a copy.
pub(super) struct Original {
    pub(super) source: ProjectId,
    pub(super) epoch: Epoch,
    pub(super) name: Option<SnapshotName>,
    pub(super) same_owner: bool,
}

impl Lifecycle {
    /// Not in the project's turn: it may take long, and reads only.
    pub(super) async fn diff(
        &self,
        project: ProjectId,
        epoch: Epoch,
        compared: Comparison,
    ) -> Result<HostReply, CommandError> {
        self.ledger.permit(project, epoch)?;
        let Comparison { from, to, after, max } = compared;
        // Nobody deletes them while they are read.
        let _from = self.storage.hold(project, &from).await.map_err(storage_error)?;
        let _to = match &to {
            Some(to) => Some(self.storage.hold(project, to).await.map_err(storage_error)?),
            None => None,
        };
        let max = max.clamp(1, CHANGES_MAX);
        let changes = self.storage.diff(project, &from, to.as_ref(), after.as_ref(), max).await;
        let changes = fitting(changes.map_err(storage_error)?, CHANGES_BYTES_MAX);
        Ok(HostReply::Changes { project, changes })
    }

    pub(super) async fn usage(
        &self,
        project: ProjectId,
        epoch: Epoch,
        count: bool,
    ) -> Result<HostReply, CommandError> {
        let entry = self.ledger.permit(project, epoch)?;
        let usage = self.storage.usage(project).await.map_err(storage_error)?;
        let footprint = if count {
            Some(self.storage.footprint(project, None).await.map_err(storage_error)?)
        } else {
            None
        };
        let policy = self.keeper.policy(&entry.config);
        let plan_bytes = entry.config.quota_bytes;
        Ok(HostReply::Usage(UsageReport {
            project,
            usage,
            plan_bytes,
            allowance_bytes: plan_bytes.map(|plan| policy.allowance_bytes(plan)),
            policy,
            notice: self.notice(project),
            footprint,
        }))
    }

    /// What the project's owner should know of its snapshots and backups.
    fn notice(&self, project: ProjectId) -> Option<String> {
        let backups = self.backups.as_ref().and_then(|backups| backups.notice(project));
        match (self.keeper.notice(project), backups) {
            (Some(one), Some(other)) => Some(format!("{one}; {other}")),
            (one, other) => one.or(other),
        }
    }

    pub(super) async fn configure(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        self.check_image(&config)?;
        // Before anything is kept: limits that can't be are no wish of the project.
        let applied = self.limit(project, epoch, &config).await?;
        let entry = self.ledger.configure(project, epoch, config).await?;
        self.keeper.set_limit(project).await.map_err(storage_error)?;
        // Its secrets may be others, too.
        if let Some(secrets) = self.inside.as_ref().and_then(|inside| inside.secrets.as_ref()) {
            secrets.refresh(project);
        }
        // With another image, what was prepared is of no use.
        self.prepare_next(&entry).await;
        match applied {
            Some(applied) => Ok(HostReply::Limits { project, applied }),
            None => self.report(project, vec![]).await.map(HostReply::Project),
        }
    }

    /// Changes what a running project may use, if `config` changes it.
    async fn limit(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: &ProjectConfig,
    ) -> Result<Option<Applied>, CommandError> {
        let before = self.ledger.permit(project, epoch)?.config.effective_limits();
        let limits = config.effective_limits();
        if limits == before {
            return Ok(None);
        }
        match self.runner.set_limits(project, &limits).await {
            Ok(applied) => Ok(Some(applied)),
            // It counts with the next start.
            Err(runner::Error::NotRunning { .. }) => Ok(None),
            Err(error) => Err(runner_error(error)),
        }
    }

    /// Does what must not be done twice, in the project's turn, so that no
    /// freeze comes in between.
    pub(super) async fn once(
        &self,
        operation: OperationId,
        project: ProjectId,
        work: impl Future<Output = Result<HostReply, CommandError>>,
    ) -> Result<HostReply, CommandError> {
        let _turn = self.ledger.turn(project).await;
        if let Some(done) = self.once.begin(operation).await? {
            return Ok(done);
        }
        match work.await {
            Ok(done) => {
                self.once.done(operation, done.clone()).await;
                Ok(done)
            }
            Err(error) => {
                self.once.not_done(operation).await;
                Err(error)
            }
        }
    }

    pub(super) async fn restore_path(
        &self,
        project: ProjectId,
        epoch: Epoch,
        name: SnapshotName,
        path: TreePath,
        former: &SnapshotName,
    ) -> Result<HostReply, CommandError> {
        self.ledger.permit(project, epoch)?;
        let _held = self.storage.hold(project, &name).await.map_err(storage_error)?;
        // Taken again, it is the same: a repeated command keeps what was there
        // before the first.
        self.storage.snapshot(project, former).await.map_err(storage_error)?;
        let options = CopyOptions { same_owner: true, replace: true };
        let from = Place::frozen(project, name, path.clone());
        let copied = self.storage.copy(&from, &Place::live(project, path), &options).await;
        Ok(HostReply::Copied { project, copied: copied.map_err(storage_error)? })
    }

    pub(super) async fn copy(
        &self,
        project: ProjectId,
        epoch: Epoch,
        from: Place,
        from_epoch: Epoch,
        to: TreePath,
        options: CopyOptions,
    ) -> Result<HostReply, CommandError> {
        // What is read may go on running, and even leave: it is read through
        // what was opened.
        self.ledger.permit(project, epoch)?;
        self.ledger.permit(from.project, from_epoch)?;
        let _held = match &from.snapshot {
            Some(name) => Some(self.storage.hold(from.project, name).await.map_err(storage_error)?),
            None => None,
        };
        let copied = self.storage.copy(&from, &Place::live(project, to), &options).await;
        Ok(HostReply::Copied { project, copied: copied.map_err(storage_error)? })
    }

    pub(super) async fn clone_project(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
        original: Original,
    ) -> Result<HostReply, CommandError> {
        self.check_image(&config)?;
        let options = CloneOptions {
            volume: VolumeOptions { limit_bytes: self.keeper.limit_bytes(&config) },
            same_owner: original.same_owner,
        };
        let source = original.source;
        let made = self.ledger.permit(project, epoch).is_ok() && self.storage.volume(project).await.is_ok();
        // Before the new project's turn: no two turns are ever held at once.
        let name = match (made, original.name) {
            (true, _) => None,
            (false, Some(name)) => {
                self.ledger.permit(source, original.epoch)?;
                Some(name)
            }
            // Its present state, as an automatic snapshot: that goes by itself.
            (false, None) => {
                let _turn = self.ledger.turn(source).await;
                let entry = self.ledger.permit(source, original.epoch)?;
                Some(self.keeper.capture(&entry).await.map_err(storage_error)?)
            }
        };
        let _turn = self.ledger.turn(project).await;
        if let Some(name) = name {
            let _held = self.storage.hold(source, &name).await.map_err(storage_error)?;
            self.ledger.create(project, epoch, config).await?;
            match self.storage.clone_volume(source, &name, project, &options).await {
                // An earlier try of the same command made it.
                Ok(_) | Err(storage::Error::AlreadyExists { .. }) => {}
                Err(error) => return Err(storage_error(error)),
            }
        }
        let entry = self.ledger.permit(project, epoch)?;
        self.prepare_next(&entry).await;
        self.report(project, vec![]).await.map(HostReply::Project)
    }
}

/// As many of the changes as fit into `bytes`, at least one.
fn fitting(mut changes: Changes, bytes: usize) -> Changes {
    let mut left = bytes;
    let fits = changes.changes.iter().take_while(|change| {
        let size = serde_json::to_vec(change).map_or(usize::MAX, |text| text.len() + 1);
        let fits = size <= left;
        left = left.saturating_sub(size);
        fits
    });
    let fits = fits.count().max(1);
    if fits < changes.changes.len() {
        changes.changes.truncate(fits);
        changes.more = true;
    }
    changes
}

#[cfg(test)]
mod tests {
    use cocalc_core::storage::{Change, ChangeKind, NodeKind};

    use super::*;

    #[test]
    fn changes_fit_a_frame_whatever_the_paths() {
        let change = |n: usize| Change {
            // Each byte is three in the text.
            path: TreePath::from_bytes(&[&[0xff; 250], format!("{n:04}").as_bytes()].concat()).unwrap(),
            kind: ChangeKind::Added,
            node: NodeKind::File,
            bytes: u64::MAX,
        };
        let all = Changes { changes: (0..CHANGES_MAX).map(change).collect(), more: false };
        let page = fitting(all.clone(), CHANGES_BYTES_MAX);
        assert!(page.more && page.changes[..] == all.changes[..page.changes.len()]);
        let reply = HostReply::Changes { project: ProjectId::random(), changes: page };
        assert!(serde_json::to_vec(&reply).unwrap().len() < FRAME_BYTES_MAX);
        let few = Changes { changes: all.changes[..3].to_vec(), more: false };
        assert_eq!(fitting(few.clone(), CHANGES_BYTES_MAX), few);
        assert_eq!(fitting(few, 0).changes.len(), 1, "there is always progress");
    }
}
