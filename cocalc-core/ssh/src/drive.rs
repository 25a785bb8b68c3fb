//! Carrying one process between its user and the runner.

use std::{future::Future, io, time::Duration};

use bytes::{Bytes, BytesMut};
use cocalc_core::{
    runner::{Error, Exit, Process, ProcessHandle, WindowSize},
    stream::{BoxRead, BoxWrite},
};
use tokio::{
    io::AsyncReadExt,
    sync::mpsc,
    time::{Instant, sleep_until},
};

/// How much is read from a process at a time; what OpenSSH takes in a packet.
const CHUNK_BYTES: usize = 32 * 1024;
/// What a terminal may still show after its process has ended. Background
/// processes can hold it open for ever; sshd does not wait for them either.
const PTY_DRAIN: Duration = Duration::from_secs(2);

/// Something a user does to a process besides writing to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Control {
    Resize(WindowSize),
    Signal(String),
}

/// Where a process's output goes. An error means that nobody wants it.
pub(crate) trait Sink: Sync {
    fn stdout(&self, data: Bytes) -> impl Future<Output = io::Result<()>> + Send;
    fn stderr(&self, data: Bytes) -> impl Future<Output = io::Result<()>> + Send;
    /// No more of either.
    fn end(&self) -> impl Future<Output = io::Result<()>> + Send;
}

/// How the driving of a process ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It ended by itself, and all its output was passed on.
    Exit(Exit),
    /// The runner cannot tell.
    Lost(Error),
    /// The project has ended, and the process with it.
    Cut,
    /// Its user has gone; it was killed.
    Abandoned,
}

/// Passes output to `sink` and `controls` to the process, and lets `feed`
/// write its input, until the process has ended and its output too.
///
/// Dropping the future kills the process.
pub(crate) async fn drive<F: Future<Output = ()>>(
    process: Process,
    pty: bool,
    feed: impl FnOnce(BoxWrite) -> F,
    sink: &impl Sink,
    mut controls: mpsc::Receiver<Control>,
) -> Ended {
    let Process { stdin, stdout, stderr, mut handle } = process;
    let feed = feed(stdin);
    let output = async {
        tokio::try_join!(copy_stdout(stdout, sink), copy_stderr(stderr, sink))?;
        sink.end().await
    };
    tokio::pin!(feed, output);
    let (mut fed, mut shown, mut controlled) = (false, false, true);
    let mut exit: Option<(Exit, Instant)> = None;
    loop {
        match &exit {
            Some(_) if shown && handle.ended_with_its_project() => return Ended::Cut,
            Some((exit, _)) if shown => return Ended::Exit(exit.clone()),
            _ => {}
        }
        let drained = exit.as_ref().map_or_else(Instant::now, |(_, at)| *at + PTY_DRAIN);
        tokio::select! {
            result = &mut output, if !shown => match result {
                Ok(()) => shown = true,
                Err(_) => return Ended::Abandoned,
            },
            () = &mut feed, if !fed => fed = true,
            ended = handle.wait(), if exit.is_none() => match ended {
                Ok(ended) => exit = Some((ended, Instant::now())),
                Err(error) => return Ended::Lost(error),
            },
            control = controls.recv(), if controlled && exit.is_none() => match control {
                Some(control) => apply(&*handle, control).await,
                None => controlled = false,
            },
            () = sleep_until(drained), if pty && exit.is_some() => {
                if sink.end().await.is_err() {
                    return Ended::Abandoned;
                }
                shown = true;
            }
        }
    }
}

async fn apply(handle: &dyn ProcessHandle, control: Control) {
    let applied = match &control {
        Control::Resize(size) => handle.resize(*size).await,
        Control::Signal(name) => handle.signal(name).await,
    };
    // The process may just have ended; its user learns that anyway.
    if let Err(error) = applied {
        tracing::debug!(?control, %error, "a process was not steered");
    }
}

async fn copy_stdout(mut from: BoxRead, sink: &impl Sink) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    while let Some(data) = read(&mut from, &mut buffer).await {
        sink.stdout(data).await?;
    }
    Ok(())
}

async fn copy_stderr(from: Option<BoxRead>, sink: &impl Sink) -> io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = BytesMut::new();
    while let Some(data) = read(&mut from, &mut buffer).await {
        sink.stderr(data).await?;
    }
    Ok(())
}

/// The next output; `None` after the last.
async fn read(from: &mut BoxRead, buffer: &mut BytesMut) -> Option<Bytes> {
    buffer.reserve(CHUNK_BYTES);
    // The buffer may have more room than that.
    match from.take(CHUNK_BYTES as u64).read_buf(buffer).await {
        Ok(0) => None,
        Ok(_) => Some(buffer.split().freeze()),
        Err(error) => {
            // A terminal whose last process has gone ends so, too.
            tracing::debug!(%error, "the output of a process broke off");
            None
        }
    }
}
