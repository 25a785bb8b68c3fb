//! A storage that fails on command.

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{
        Capabilities, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold, Place, Result,
        SendHeader, SendOptions, SendStream, Snapshot, Staged, Storage, Usage, Volume, VolumeOptions,
    },
    stream::BoxRead,
};
use tokio::io::{AsyncRead, ReadBuf};

/// A call of [`Storage`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[allow(missing_docs, reason = "each is the method of that name")]
pub enum Call {
    Create,
    Volume,
    List,
    Delete,
    Snapshot,
    Snapshots,
    SnapshotPath,
    DeleteSnapshot,
    Hold,
    ChangedSince,
    Restore,
    SetAside,
    Clone,
    Usage,
    SetLimit,
    Footprint,
    Diff,
    Copy,
    Send,
    Receive,
    Stage,
}

/// What goes wrong with a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// It fails and has done nothing.
    Before,
    /// It is done, and its caller is told that it failed: the answer was lost.
    After,
    /// Of `send` and `receive`: the stream breaks after so many bytes.
    CutAfter(u64),
}

/// A storage that passes every call on, except where a fault was ordered.
/// Clones are one.
#[derive(Clone, Debug)]
pub struct FaultyStorage {
    inner: Arc<dyn Storage>,
    plan: Arc<Mutex<Plan>>,
    /// Where it says that snapshots are, if the inner one has no files.
    paths: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Plan {
    ordered: Vec<(Call, Fault)>,
    seen: Vec<Call>,
}

impl FaultyStorage {
    /// Wraps a storage; nothing is ordered yet.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, plan: Arc::default(), paths: None }
    }

    /// Says that snapshots are below `root`, whether there is anything or not,
    /// for a storage that has no files.
    #[must_use]
    pub fn with_paths(self, root: impl Into<PathBuf>) -> Self {
        Self { paths: Some(root.into()), ..self }
    }

    /// Orders a fault for the next `call`; more than one come in order.
    pub fn order(&self, call: Call, fault: Fault) {
        self.lock().ordered.push((call, fault));
    }

    /// The faults that no call has met yet.
    pub fn pending(&self) -> Vec<(Call, Fault)> {
        self.lock().ordered.clone()
    }

    /// The calls so far.
    pub fn seen(&self) -> Vec<Call> {
        self.lock().seen.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meet(&self, call: Call) -> Option<Fault> {
        let mut plan = self.lock();
        plan.seen.push(call);
        let at = plan.ordered.iter().position(|(ordered, _)| *ordered == call)?;
        Some(plan.ordered.remove(at).1)
    }

    async fn pass<T>(
        &self,
        call: Call,
        project: ProjectId,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        match self.meet(call) {
            None => work.await,
            Some(Fault::Before | Fault::CutAfter(_)) => Err(injected(project)),
            Some(Fault::After) => {
                work.await?;
                Err(injected(project))
            }
        }
    }
}

fn injected(project: ProjectId) -> Error {
    let source = "a fault was ordered".into();
    Error::Backend { backend: "faulty", operation: "serve", project, source }
}

/// Breaks after so many bytes.
struct Cut {
    inner: BoxRead,
    left: u64,
}

impl AsyncRead for Cut {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.remaining());
        let mut part = buf.take(most);
        let polled = self.inner.as_mut().poll_read(cx, &mut part);
        let read = part.filled().len();
        // The part is the beginning of what `buf` has left.
        let bytes = part.filled().to_vec();
        buf.put_slice(&bytes);
        self.left -= read as u64;
        polled
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Storage for FaultyStorage {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume> {
        self.pass(Call::Create, project, self.inner.create(project, options)).await
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        self.pass(Call::Volume, project, self.inner.volume(project)).await
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        self.pass(Call::List, ProjectId::from_bytes([0; 16]), self.inner.list()).await
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        self.pass(Call::Delete, project, self.inner.delete(project)).await
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        self.pass(Call::Snapshot, project, self.inner.snapshot(project, name)).await
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        self.pass(Call::Snapshots, project, self.inner.snapshots(project)).await
    }

    async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<PathBuf>> {
        let path = self.pass(Call::SnapshotPath, project, self.inner.snapshot_path(project, name)).await?;
        let told = || self.paths.as_ref().map(|root| root.join(project.to_string()).join(name.as_str()));
        Ok(path.or_else(told))
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        self.pass(Call::DeleteSnapshot, project, self.inner.delete_snapshot(project, name)).await
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold> {
        self.pass(Call::Hold, project, self.inner.hold(project, name)).await
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        self.pass(Call::ChangedSince, project, self.inner.changed_since(project, name)).await
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume> {
        self.pass(Call::Restore, project, self.inner.restore(project, name, former)).await
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot> {
        self.pass(Call::SetAside, project, self.inner.set_aside(project, keep_as)).await
    }

    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume> {
        self.pass(Call::Clone, target, self.inner.clone_volume(source, name, target, options)).await
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        self.pass(Call::Usage, project, self.inner.usage(project)).await
    }

    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()> {
        self.pass(Call::SetLimit, project, self.inner.set_limit(project, limit_bytes)).await
    }

    async fn footprint(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<Footprint> {
        self.pass(Call::Footprint, project, self.inner.footprint(project, snapshot)).await
    }

    async fn diff(
        &self,
        project: ProjectId,
        from: &SnapshotName,
        to: Option<&SnapshotName>,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes> {
        self.pass(Call::Diff, project, self.inner.diff(project, from, to, after, max)).await
    }

    async fn copy(&self, from: &Place, to: &Place, options: &CopyOptions) -> Result<Copied> {
        self.pass(Call::Copy, to.project, self.inner.copy(from, to, options)).await
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        match self.meet(Call::Send) {
            Some(Fault::Before | Fault::After) => Err(injected(project)),
            Some(Fault::CutAfter(left)) => {
                let SendStream { header, reader } = self.inner.send(project, name, options).await?;
                Ok(SendStream { header, reader: Box::pin(Cut { inner: reader, left }) })
            }
            None => self.inner.send(project, name, options).await,
        }
    }

    async fn stage(&self, project: ProjectId, name: &SnapshotName) -> Result<Box<dyn Staged>> {
        self.pass(Call::Stage, project, self.inner.stage(project, name)).await
    }

    async fn receive(&self, header: &SendHeader, stream: BoxRead) -> Result<Snapshot> {
        match self.meet(Call::Receive) {
            None => self.inner.receive(header, stream).await,
            Some(Fault::Before) => Err(injected(header.project)),
            Some(Fault::After) => {
                self.inner.receive(header, stream).await?;
                Err(injected(header.project))
            }
            Some(Fault::CutAfter(left)) => {
                self.inner.receive(header, Box::pin(Cut { inner: stream, left })).await
            }
        }
    }
}
