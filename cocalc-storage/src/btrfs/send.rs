//! Sending: `btrfs send` as a child process, and its exit heard.

use std::{
    ffi::OsStr,
    future::Future,
    io,
    pin::Pin,
    process::Stdio,
    task::{Context, Poll, ready},
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{Result, SendHeader, SendOptions, SendStream},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, ReadBuf},
    process::ChildStdout,
};

use super::{BACKEND, Btrfs, layout};
use crate::{
    child::Running,
    failure::{Doing as _, Failure},
};

/// What travels beside the stream.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extra {
    /// When the root directory was changed, in seconds and nanoseconds. The
    /// kernel does not send it, and applying a delta changes it.
    pub(super) root_mtime: (i64, u32),
}

impl Btrfs {
    pub(super) async fn send_stream(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        let (name, base) = (name.clone(), options.base.clone());
        let (header, paths) = self
            .blocking(project, "send", move |store| {
                let snapshot = store.layout.need(project, &name)?;
                let stat = rustix::fs::fstat(&snapshot.fd).doing("look at a snapshot")?;
                let extra =
                    Extra { root_mtime: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)) };
                let mut paths = Vec::new();
                let base = match base {
                    None => None,
                    Some(base) => {
                        let found = store.layout.need(project, &base)?;
                        paths.extend(["-p".into(), store.layout.snapshot(project, &base).into_os_string()]);
                        Some((base, layout::origin(&found.info)))
                    }
                };
                paths.push(store.layout.snapshot(project, &name).into_os_string());
                let header = SendHeader {
                    backend: BACKEND.to_owned(),
                    project,
                    origin: layout::origin(&snapshot.info),
                    name,
                    base,
                    extra: serde_json::to_string(&extra)
                        .map_err(|error| Failure::Wrong(error.to_string()))?,
                    estimated_bytes: 0,
                    left_out: Vec::new(),
                };
                Ok((header, paths))
            })
            .await?;
        let mut arguments = vec![OsStr::new("send"), OsStr::new("-q")];
        arguments.extend(paths.iter().map(|path| path.as_os_str()));
        let running = Running::plain("btrfs", &arguments, Stdio::null(), Stdio::piped());
        let reader = running
            .doing("start btrfs send")
            .and_then(Sending::new)
            .map_err(|failure| failure.public(BACKEND, project, "send"))?;
        Ok(SendStream { header, reader: Box::pin(reader) })
    }
}

/// The output of a sender, which ends well only if the sender did. Dropping it
/// kills the sender.
struct Sending {
    stdout: ChildStdout,
    exit: Pin<Box<dyn Future<Output = io::Result<()>> + Send>>,
    ended: bool,
}

impl Sending {
    fn new(mut running: Running) -> Result<Self, Failure> {
        let stdout = running.child.stdout.take();
        let stdout = stdout.ok_or_else(|| Failure::Wrong("btrfs send has no output".to_owned()))?;
        let exit = Box::pin(async move {
            let status = running.child.wait().await?;
            if status.success() {
                Ok(())
            } else {
                Err(io::Error::other(format!("btrfs send failed, {status}: {}", running.words())))
            }
        });
        Ok(Self { stdout, exit, ended: false })
    }
}

impl AsyncRead for Sending {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.ended || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stdout).poll_read(cx, buf))?;
        if buf.filled().len() == before {
            // The pipe is closed; how the sender ended decides what that means.
            let exit = ready!(this.exit.as_mut().poll(cx));
            this.ended = true;
            exit?;
        }
        Poll::Ready(Ok(()))
    }
}
