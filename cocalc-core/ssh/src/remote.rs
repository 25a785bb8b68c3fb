//! A process at a host, as its proxy holds it.

use std::{io, time::Duration};

use async_trait::async_trait;
use bytes::BytesMut;
use cocalc_core::{
    ids::ProjectId,
    runner::{Error, Exit, Process, ProcessHandle, Result, WindowSize},
    stream::BoxStream,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    sync::{mpsc, oneshot},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    drive::Control,
    wire::{self, FRAME_BYTES_MAX, Frame},
};

/// What is kept of each stream between the wire and its reader.
const PIPE_BYTES: usize = 64 * 1024;
/// How long a control waits for a writer that is stuck behind input which the
/// process does not read.
const CONTROL_MAX: Duration = Duration::from_secs(5);

/// A process whose streams are frames on `stream`. Dropping its handle closes
/// the stream, which kills the process.
pub(crate) fn remote_process(stream: BoxStream, project: ProjectId, pty: bool) -> Process {
    let (reader, writer) = split(stream);
    let (stdin, stdin_end) = duplex(PIPE_BYTES);
    let (stdout, stdout_end) = duplex(PIPE_BYTES);
    let (stderr, stderr_end) = duplex(PIPE_BYTES);
    let (controls, steered) = mpsc::channel(16);
    let (exit, ended) = oneshot::channel();
    let writing = tokio::spawn(async move {
        // Whoever reads learns that the stream broke.
        let _ = write(writer, stdin_end, steered).await;
    });
    let reading = tokio::spawn(async move {
        let outcome = read(reader, stdout_end, stderr_end).await;
        let _ = exit.send(outcome);
    });
    Process {
        stdin: Box::pin(stdin),
        stdout: Box::pin(stdout),
        stderr: if pty { None } else { Some(Box::pin(stderr)) },
        handle: Box::new(RemoteHandle {
            project,
            controls,
            ended: Some(ended),
            exit: None,
            _tasks: [AbortOnDropHandle::new(writing), AbortOnDropHandle::new(reading)],
        }),
    }
}

async fn write(
    mut writer: WriteHalf<BoxStream>,
    mut stdin: DuplexStream,
    mut controls: mpsc::Receiver<Control>,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    let mut open = true;
    loop {
        buffer.reserve(FRAME_BYTES_MAX / 2);
        let mut limited = (&mut stdin).take(FRAME_BYTES_MAX as u64);
        let frame = tokio::select! {
            control = controls.recv() => match control {
                Some(Control::Resize(size)) => Frame::Resize(size),
                Some(Control::Signal(name)) => Frame::Signal(name),
                None => return writer.shutdown().await,
            },
            read = limited.read_buf(&mut buffer), if open => match read {
                Ok(0) | Err(_) => {
                    open = false;
                    Frame::StdinEnd
                }
                Ok(_) => Frame::Stdin(buffer.split().freeze()),
            },
        };
        wire::send_frame(&mut writer, &frame).await?;
    }
}

async fn read(
    mut reader: ReadHalf<BoxStream>,
    stdout: DuplexStream,
    stderr: DuplexStream,
) -> std::result::Result<Exit, String> {
    let (mut stdout, mut stderr) = (Some(stdout), Some(stderr));
    loop {
        let (pipe, data) = match wire::receive_frame(&mut reader).await {
            Ok(Some(Frame::Stdout(data))) => (&mut stdout, data),
            Ok(Some(Frame::Stderr(data))) => (&mut stderr, data),
            Ok(Some(Frame::OutputEnd)) => {
                (stdout, stderr) = (None, None);
                continue;
            }
            Ok(Some(Frame::Exit(exit))) => return Ok(exit),
            Ok(Some(Frame::Lost(reason))) => return Err(reason),
            Ok(Some(_)) => return Err("the host broke the protocol".into()),
            Ok(None) => return Err("the connection to the host was closed".into()),
            Err(error) => return Err(format!("the connection to the host broke: {error}")),
        };
        if let Some(open) = pipe
            && open.write_all(&data).await.is_err()
        {
            // Nobody reads it; what still comes is dropped.
            *pipe = None;
        }
    }
}

#[derive(Debug)]
struct RemoteHandle {
    project: ProjectId,
    controls: mpsc::Sender<Control>,
    ended: Option<oneshot::Receiver<std::result::Result<Exit, String>>>,
    exit: Option<std::result::Result<Exit, String>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl RemoteHandle {
    async fn control(&self, control: Control) -> Result<()> {
        let project = self.project;
        match self.controls.send_timeout(control, CONTROL_MAX).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Error::NotRunning { project }),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                Err(Error::TimedOut { project, operation: "steering a process", limit: CONTROL_MAX })
            }
        }
    }
}

#[async_trait]
impl ProcessHandle for RemoteHandle {
    async fn resize(&self, size: WindowSize) -> Result<()> {
        self.control(Control::Resize(size)).await
    }

    async fn signal(&self, signal: &str) -> Result<()> {
        self.control(Control::Signal(signal.to_owned())).await
    }

    async fn wait(&mut self) -> Result<Exit> {
        if let Some(ended) = &mut self.ended {
            let outcome =
                ended.await.unwrap_or_else(|_| Err("the connection to the host was dropped".into()));
            self.exit = Some(outcome);
            self.ended = None;
        }
        match &self.exit {
            Some(Ok(exit)) => Ok(exit.clone()),
            Some(Err(reason)) => Err(Error::Backend {
                backend: "the host",
                operation: "follow a process of",
                project: self.project,
                source: reason.clone().into(),
            }),
            None => Err(Error::NotRunning { project: self.project }),
        }
    }
}
