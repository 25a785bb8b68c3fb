//! Sending: the kernel's own call, in a thread that writes into a pipe.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{Hold, Result, SendHeader, SendOptions, SendStream},
};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::unix::pipe,
    sync::oneshot,
};

use super::{BACKEND, Btrfs, contents, layout, sys};
use crate::failure::{Doing as _, Failure};

/// What the pipe holds, so that the kernel does not wait for us after every
/// command; the most that an ordinary user may ask for.
pub(super) const PIPE_BYTES: usize = 1 << 20;
/// How long who drops a stream waits for its thread, which ends at its next
/// write; it does not write while it compares what has not changed.
const END_LIMIT: Duration = Duration::from_millis(250);
/// How many snapshots a stream may refer to beside its base.
const SOURCES_MAX: usize = 16;

/// What travels beside the stream.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extra {
    /// When the root directory was changed, in seconds and nanoseconds. The
    /// kernel does not send it, and applying a delta changes it.
    pub(super) root_mtime: (i64, u32),
    /// When the snapshot was taken, in seconds and nanoseconds.
    #[serde(default)]
    pub(super) taken: (u64, u32),
    /// The origins of the further snapshots that the stream may refer to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) sources: Vec<VolumeUuid>,
}

/// What is opened and held for a stream.
pub(super) struct Opened {
    snapshot: File,
    info: sys::SubvolInfo,
    base: Option<(SnapshotName, sys::SubvolInfo)>,
    sources: Vec<sys::SubvolInfo>,
    _holds: Vec<Hold>,
}

impl Opened {
    /// A subvolume that is no snapshot of a project, whole.
    pub(super) fn alone(subvolume: layout::Subvolume) -> Self {
        let layout::Subvolume { fd: snapshot, info } = subvolume;
        Self { snapshot, info, base: None, sources: Vec::new(), _holds: Vec::new() }
    }
}

impl Btrfs {
    pub(super) async fn send_stream(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        let (wanted, options) = (name.clone(), options.clone());
        let version = options.version_max.min(self.0.stream_version);
        if options.sources.len() > SOURCES_MAX {
            let reason = format!("a stream refers to at most {SOURCES_MAX} snapshots beside its base");
            return Err(Failure::Wrong(reason).public(BACKEND, project, "send"));
        }
        // Its turn, so that nothing is deleted before it is held.
        let opened = self.exclusive(project, "send", move |store| {
            let mut holds = Vec::new();
            let mut open = |name: &SnapshotName| {
                let found = store.layout.need(project, name)?;
                holds.push(store.holds.take(project, name));
                Ok::<_, Failure>(found)
            };
            let snapshot = open(&wanted)?;
            let base = match &options.base {
                Some(base) => Some((base.clone(), open(base)?.info)),
                None => None,
            };
            let sources = options.sources.iter().map(|name| Ok(open(name)?.info));
            let sources = sources.collect::<Result<_, Failure>>()?;
            Ok(Opened { snapshot: snapshot.fd, info: snapshot.info, base, sources, _holds: holds })
        });
        let opened = opened.await?;
        let name = name.clone();
        // Reads the whole tree of a large project, so not in its turn.
        let described =
            self.blocking(project, "send", move |_| Ok((describe(project, name, &opened)?, opened)));
        let (header, opened) = described.await?;
        let reader = Sending::start(opened, version)
            .doing("start to send")
            .map_err(|failure| failure.public(BACKEND, project, "send"))?;
        Ok(SendStream { header, reader: Box::pin(reader) })
    }
}

fn describe(project: ProjectId, name: SnapshotName, opened: &Opened) -> Result<SendHeader, Failure> {
    let stat = rustix::fs::fstat(&opened.snapshot).doing("look at a snapshot")?;
    let extra = Extra {
        root_mtime: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        taken: layout::taken(&opened.info),
        sources: opened.sources.iter().map(layout::origin).collect(),
    };
    // What was written after the base, if that is the older one.
    let since = opened.base.as_ref().map(|(_, info)| info.created_transid);
    let since = since.filter(|since| *since <= opened.info.created_transid);
    let contents = contents::survey(&opened.snapshot, since)?;
    Ok(SendHeader {
        backend: BACKEND.to_owned(),
        project,
        origin: layout::origin(&opened.info),
        name,
        base: opened.base.as_ref().map(|(name, info)| (name.clone(), layout::origin(info))),
        extra: serde_json::to_string(&extra).map_err(|error| Failure::Wrong(error.to_string()))?,
        estimated_bytes: contents.stream_bytes,
        left_out: contents.left_out,
    })
}

/// The output of a sender, which ends well only if the sender did. Dropping it
/// ends the sender.
pub(super) struct Sending {
    /// `None` only while it is dropped.
    pipe: Option<pipe::Receiver>,
    sent: oneshot::Receiver<io::Result<()>>,
    ended: bool,
    thread: Arc<Ending>,
}

/// Whether a thread has ended.
#[derive(Default)]
struct Ending {
    ended: Mutex<bool>,
    heard: Condvar,
}

impl Ending {
    fn tell(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.heard.notify_all();
    }

    fn wait(&self, limit: Duration) {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let _ended = self.heard.wait_timeout_while(ended, limit, |ended| !*ended);
    }
}

impl Sending {
    pub(super) fn start(opened: Opened, version: u32) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // Slower without, where the user has too many pipes.
        let _ = fcntl_setpipe_size(&reader, PIPE_BYTES);
        let pipe = pipe::Receiver::from_owned_fd(reader)?;
        let (tell, sent) = oneshot::channel();
        let thread = Arc::new(Ending::default());
        let ending = Arc::clone(&thread);
        std::thread::Builder::new().name("btrfs-send".to_owned()).spawn(move || {
            let outcome = send(&opened, &writer, version);
            // Only now may the snapshots go, and whoever waits for that hears
            // of it; the result is there before the reader sees the end.
            drop(opened);
            let _ = tell.send(outcome);
            drop(writer);
            ending.tell();
        })?;
        Ok(Self { pipe: Some(pipe), sent, ended: false, thread })
    }
}

fn send(opened: &Opened, pipe: &OwnedFd, version: u32) -> io::Result<()> {
    let base = opened.base.as_ref().map(|(_, info)| info.tree);
    let sources: Vec<u64> = opened.sources.iter().map(|info| info.tree).collect();
    sys::stream::send(&opened.snapshot, pipe, base, &sources, version)
}

impl Drop for Sending {
    fn drop(&mut self) {
        // A write into it fails from now on.
        self.pipe = None;
        self.thread.wait(END_LIMIT);
    }
}

impl AsyncRead for Sending {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(pipe) = this.pipe.as_mut().filter(|_| !this.ended && buf.remaining() > 0) else {
            return Poll::Ready(Ok(()));
        };
        let before = buf.filled().len();
        ready!(Pin::new(pipe).poll_read(cx, buf))?;
        if buf.filled().len() == before {
            // The pipe is closed; how the sender ended decides what that means.
            let sent = ready!(Pin::new(&mut this.sent).poll(cx));
            this.ended = true;
            let sent = sent.unwrap_or_else(|_| Err(io::Error::other("its thread has gone")));
            sent.map_err(|error| {
                io::Error::new(error.kind(), format!("the snapshot cannot be sent: {error}"))
            })?;
        }
        Poll::Ready(Ok(()))
    }
}
