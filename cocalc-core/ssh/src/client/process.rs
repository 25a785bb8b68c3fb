//! A process at the server, as its client holds it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use cocalc_core::{
    ids::ProjectId,
    runner::{Error, Exit, Process, ProcessHandle, Result, WindowSize},
};
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, client::Msg};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::{mpsc, oneshot},
};
use tokio_util::task::AbortOnDropHandle;

use super::{Check, Handle};
use crate::{
    channel::{signal, signal_name},
    drive::Control,
};

const PIPE_BYTES: usize = 256 * 1024;

/// Wraps a channel in which something runs.
pub(super) fn process(
    channel: Channel<Msg>,
    connection: Arc<Handle<Check>>,
    project: ProjectId,
    pty: bool,
) -> Process {
    let (read, write) = channel.split();
    let write = Arc::new(write);
    let (stdin, stdin_end) = duplex(PIPE_BYTES);
    let (stdout, stdout_end) = duplex(PIPE_BYTES);
    let (stderr, stderr_end) = duplex(PIPE_BYTES);
    let (controls, steered) = mpsc::channel(16);
    let (exit, ended) = oneshot::channel();
    let feeding = tokio::spawn(feed(write.clone(), stdin_end));
    tokio::spawn(steer(write, steered));
    let reading = tokio::spawn(async move {
        let _ = exit.send(receive(read, stdout_end, stderr_end).await);
    });
    Process {
        stdin: Box::pin(stdin),
        stdout: Box::pin(stdout),
        stderr: if pty { None } else { Some(Box::pin(stderr)) },
        handle: Box::new(Running {
            project,
            controls,
            ended: Some(ended),
            exit: None,
            _connection: connection,
            _tasks: [AbortOnDropHandle::new(feeding), AbortOnDropHandle::new(reading)],
        }),
    }
}

async fn feed(write: Arc<ChannelWriteHalf<Msg>>, mut stdin: DuplexStream) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(32 * 1024);
        match (&mut stdin).take(32 * 1024).read_buf(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(_) if write.data_bytes(buffer.split().freeze()).await.is_err() => return,
            Ok(_) => {}
        }
    }
    let _ = write.eof().await;
}

/// Passes controls on until the process's handle is dropped, then closes the
/// channel. It ends with the connection at the latest.
async fn steer(write: Arc<ChannelWriteHalf<Msg>>, mut controls: mpsc::Receiver<Control>) {
    while let Some(control) = controls.recv().await {
        let sent = match control {
            Control::Resize(size) => {
                write.window_change(u32::from(size.cols), u32::from(size.rows), 0, 0).await
            }
            Control::Signal(name) => write.signal(signal(&name)).await,
        };
        if sent.is_err() {
            return;
        }
    }
    let _ = write.close().await;
}

async fn receive(mut read: ChannelReadHalf, stdout: DuplexStream, stderr: DuplexStream) -> Option<Exit> {
    let (mut stdout, mut stderr) = (Some(stdout), Some(stderr));
    let mut exit = None;
    while let Some(message) = read.wait().await {
        let (pipe, data) = match message {
            ChannelMsg::Data { data } => (&mut stdout, data),
            ChannelMsg::ExtendedData { data, ext: 1 } => (&mut stderr, data),
            ChannelMsg::Eof => {
                (stdout, stderr) = (None, None);
                continue;
            }
            ChannelMsg::ExitStatus { exit_status } => {
                // The protocol has 32 bits, processes have 8.
                exit = Some(Exit::Code(u8::try_from(exit_status).unwrap_or(255)));
                continue;
            }
            ChannelMsg::ExitSignal { signal_name: name, .. } => {
                exit = Some(Exit::Signal(signal_name(&name).unwrap_or("UNKNOWN").to_owned()));
                continue;
            }
            ChannelMsg::Close => break,
            _ => continue,
        };
        if let Some(open) = pipe
            && open.write_all(&data).await.is_err()
        {
            // Nobody reads it; what still comes is dropped.
            *pipe = None;
        }
    }
    exit
}

struct Running {
    project: ProjectId,
    controls: mpsc::Sender<Control>,
    ended: Option<oneshot::Receiver<Option<Exit>>>,
    exit: Option<Exit>,
    _connection: Arc<Handle<Check>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("project", &self.project).finish_non_exhaustive()
    }
}

impl Running {
    async fn control(&self, control: Control) -> Result<()> {
        self.controls.send(control).await.map_err(|_| Error::NotRunning { project: self.project })
    }
}

#[async_trait]
impl ProcessHandle for Running {
    async fn resize(&self, size: WindowSize) -> Result<()> {
        self.control(Control::Resize(size)).await
    }

    async fn signal(&self, signal: &str) -> Result<()> {
        self.control(Control::Signal(signal.to_owned())).await
    }

    async fn wait(&mut self) -> Result<Exit> {
        if let Some(ended) = &mut self.ended {
            self.exit = ended.await.ok().flatten();
            self.ended = None;
        }
        self.exit.clone().ok_or_else(|| Error::Backend {
            backend: "the SSH server",
            operation: "follow a process of",
            project: self.project,
            source: "the connection ended before the process did".into(),
        })
    }
}
