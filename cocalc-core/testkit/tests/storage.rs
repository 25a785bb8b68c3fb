//! The storage suite holds the model to its promises, and catches backends
//! that break them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

use std::sync::Arc;

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    memory::storage::MemoryStorage,
    storage::{
        Capabilities, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold, Place, Result,
        SendHeader, SendOptions, SendStream, Snapshot, Storage, Usage, Volume, VolumeOptions,
    },
    stream::BoxRead,
};
use cocalc_testkit::{
    faults::{Call, Fault, FaultyStorage},
    storage::{MemoryHarness, agrees_with_model, scripts, storage},
};
use proptest::prelude::*;
use tokio::io::AsyncReadExt as _;

#[tokio::test]
async fn memory_keeps_the_contract() {
    storage(&MemoryHarness::new()).await;
}

#[tokio::test]
async fn a_faulty_storage_without_faults_keeps_the_contract() {
    storage(&MemoryHarness::wrapping(|store| Arc::new(FaultyStorage::new(Arc::new(store))))).await;
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn the_model_agrees_with_itself(script in scripts(40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(agrees_with_model(&MemoryHarness::new(), &script));
    }
}

#[tokio::test]
async fn ordered_faults_come_once() {
    let memory = MemoryStorage::new();
    let store = FaultyStorage::new(Arc::new(memory.clone()));
    let (project, options) = (ProjectId::random(), VolumeOptions::default());
    store.order(Call::Create, Fault::Before);
    store.order(Call::Create, Fault::After);
    assert!(store.create(project, &options).await.is_err());
    assert!(memory.volume(project).await.is_err(), "before: nothing was done");
    assert!(store.create(project, &options).await.is_err());
    assert!(memory.volume(project).await.is_ok(), "after: it was done");
    assert!(store.pending().is_empty());

    let name: SnapshotName = "s".parse().unwrap();
    store.snapshot(project, &name).await.unwrap();
    store.order(Call::Send, Fault::CutAfter(10));
    let mut sent = store.send(project, &name, &SendOptions::whole()).await.unwrap();
    let mut bytes = Vec::new();
    assert!(sent.reader.read_to_end(&mut bytes).await.is_err());
    assert_eq!(bytes.len(), 10);
    assert_eq!(store.seen(), [Call::Create, Call::Create, Call::Snapshot, Call::Send]);
}

/// A way to break the contract.
#[derive(Clone, Copy, Debug)]
enum Mutant {
    CreateTwice,
    DeleteTwiceFails,
    DeleteForgetsSnapshots,
    SnapshotTakenAgain,
    SnapshotFollowsLive,
    SnapshotsNewestFirst,
    ListReversed,
    RestoreKeepsNothing,
    RestoreOverwritesFormer,
    RestoreAgainAndAgain,
    SetAsideKeepsLive,
    CloneTwice,
    LimitIgnored,
    SendIgnoresBase,
    BrokenStreamLeavesSnapshot,
    BrokenStreamAccepted,
    ReceiveChangesOrigin,
    ReceiveTwiceFails,
    ReceiveReplaces,
    MissingBaseUntyped,
    SenderFailureSwallowed,
}

#[derive(Debug)]
struct Mutated {
    inner: MemoryStorage,
    mutant: Mutant,
}

#[async_trait]
impl Storage for Mutated {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume> {
        match (self.mutant, self.inner.create(project, options).await) {
            (Mutant::CreateTwice, Err(_)) => self.inner.volume(project).await,
            (_, made) => made,
        }
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        self.inner.volume(project).await
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        let mut volumes = self.inner.list().await?;
        if matches!(self.mutant, Mutant::ListReversed) {
            volumes.reverse();
        }
        Ok(volumes)
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        match self.mutant {
            Mutant::DeleteTwiceFails => {
                self.inner.volume(project).await?;
                self.inner.delete(project).await
            }
            Mutant::DeleteForgetsSnapshots => {
                let name: SnapshotName = "left".parse().unwrap();
                if self.inner.snapshot(project, &name).await.is_ok() {
                    self.inner.set_aside(project, &"left-2".parse().unwrap()).await?;
                }
                Ok(())
            }
            _ => self.inner.delete(project).await,
        }
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        if matches!(self.mutant, Mutant::SnapshotTakenAgain) {
            self.inner.delete_snapshot(project, name).await?;
        }
        self.inner.snapshot(project, name).await
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        let mut snapshots = self.inner.snapshots(project).await?;
        match self.mutant {
            Mutant::SnapshotsNewestFirst => snapshots.reverse(),
            Mutant::SnapshotFollowsLive => {
                // Looking takes them anew.
                for snapshot in &snapshots {
                    if self.inner.volume(project).await.is_ok() {
                        self.inner.delete_snapshot(project, &snapshot.name).await?;
                        self.inner.snapshot(project, &snapshot.name).await?;
                    }
                }
            }
            _ => {}
        }
        Ok(snapshots)
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        self.inner.delete_snapshot(project, name).await
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold> {
        self.inner.hold(project, name).await
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        self.inner.changed_since(project, name).await
    }

    async fn footprint(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<Footprint> {
        self.inner.footprint(project, snapshot).await
    }

    async fn diff(
        &self,
        project: ProjectId,
        from: &SnapshotName,
        to: Option<&SnapshotName>,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes> {
        self.inner.diff(project, from, to, after, max).await
    }

    async fn copy(&self, from: &Place, to: &Place, options: &CopyOptions) -> Result<Copied> {
        self.inner.copy(from, to, options).await
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume> {
        match (self.mutant, self.inner.restore(project, name, former).await) {
            (Mutant::RestoreKeepsNothing, restored) => {
                self.inner.delete_snapshot(project, former).await?;
                restored
            }
            (Mutant::RestoreOverwritesFormer, Err(Error::AlreadyExists { .. })) => {
                self.inner.delete_snapshot(project, former).await?;
                self.inner.restore(project, name, former).await
            }
            (Mutant::RestoreAgainAndAgain, Ok(_)) => {
                let scratch: SnapshotName = "scratch".parse().unwrap();
                let again = self.inner.restore(project, name, &scratch).await;
                self.inner.delete_snapshot(project, &scratch).await?;
                again
            }
            (_, restored) => restored,
        }
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot> {
        match self.mutant {
            Mutant::SetAsideKeepsLive => self.inner.snapshot(project, keep_as).await,
            _ => self.inner.set_aside(project, keep_as).await,
        }
    }

    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume> {
        if matches!(self.mutant, Mutant::CloneTwice) && self.inner.snapshots(source).await?.len() == 1 {
            self.inner.delete(target).await?;
        }
        self.inner.clone_volume(source, name, target, options).await
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        self.inner.usage(project).await
    }

    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()> {
        match self.mutant {
            Mutant::LimitIgnored => self.inner.usage(project).await.map(|_| ()),
            _ => self.inner.set_limit(project, limit_bytes).await,
        }
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        let whole = SendOptions::whole();
        let options = if matches!(self.mutant, Mutant::SendIgnoresBase) { &whole } else { options };
        self.inner.send(project, name, options).await
    }

    async fn receive(&self, header: &SendHeader, mut stream: BoxRead) -> Result<Snapshot> {
        let project = header.project;
        match self.mutant {
            Mutant::ReceiveTwiceFails if !self.inner.snapshots(project).await?.is_empty() => {
                return Err(Error::AlreadyExists { project, what: "something".to_owned() });
            }
            Mutant::ReceiveReplaces => self.inner.delete_snapshot(project, &header.name).await?,
            Mutant::SenderFailureSwallowed => {
                // Its end is taken for a good one, whatever it was.
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes).await;
                stream = Box::pin(std::io::Cursor::new(bytes));
            }
            _ => {}
        }
        match (self.mutant, self.inner.receive(header, stream).await) {
            (Mutant::BrokenStreamLeavesSnapshot, Err(error @ Error::BadStream { .. })) => {
                self.leave(header).await;
                Err(error)
            }
            (Mutant::BrokenStreamAccepted, Err(Error::BadStream { .. })) => {
                self.leave(header).await;
                self.inner.snapshot(project, &header.name).await
            }
            (Mutant::ReceiveChangesOrigin, Ok(got)) => Ok(Snapshot { origin: got.uuid, ..got }),
            (Mutant::MissingBaseUntyped, Err(error @ Error::NoSnapshot { .. })) => {
                Err(Error::Backend { backend: "mutant", operation: "receive", project, source: error.into() })
            }
            (_, got) => got,
        }
    }
}

impl Mutated {
    /// What a broken stream must not leave.
    async fn leave(&self, header: &SendHeader) {
        let _ = self.inner.create(header.project, &VolumeOptions::default()).await;
        let _ = self.inner.set_aside(header.project, &header.name).await;
    }
}

#[tokio::test]
async fn the_suite_catches_every_mutant() {
    use Mutant as M;
    let mutants = [
        M::CreateTwice,
        M::DeleteTwiceFails,
        M::DeleteForgetsSnapshots,
        M::SnapshotTakenAgain,
        M::SnapshotFollowsLive,
        M::SnapshotsNewestFirst,
        M::ListReversed,
        M::RestoreKeepsNothing,
        M::RestoreOverwritesFormer,
        M::RestoreAgainAndAgain,
        M::SetAsideKeepsLive,
        M::CloneTwice,
        M::LimitIgnored,
        M::SendIgnoresBase,
        M::BrokenStreamLeavesSnapshot,
        M::BrokenStreamAccepted,
        M::ReceiveChangesOrigin,
        M::ReceiveTwiceFails,
        M::ReceiveReplaces,
        M::MissingBaseUntyped,
        M::SenderFailureSwallowed,
    ];
    let mut survivors = Vec::new();
    for mutant in mutants {
        let harness = MemoryHarness::wrapping(|inner| Arc::new(Mutated { inner, mutant }));
        // The suite reports by panicking; a task of its own hears that.
        let caught = tokio::spawn(async move { storage(&harness).await }).await;
        if caught.is_ok() {
            survivors.push(mutant);
        }
    }
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
}
