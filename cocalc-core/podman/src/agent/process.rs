//! A process in a project, as its host holds it.

use std::{
    io,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::runner::{Exit, Process, ProcessHandle, Result, WindowSize};
use tokio::{
    io::AsyncWrite,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf, pipe},
    },
};

use super::{AgentError, socket};
use crate::signals;

/// What a pipe to or from a command holds, about as much as the sockets that sshd
/// gives to one. With the kernel's 64 KiB a large transfer stops, and another process
/// gets the processor, at every second packet.
const PIPE_BYTES: usize = 256 * 1024;

/// Its connection to the helper; closing it kills the process.
#[derive(Debug)]
pub(super) struct AgentProcess {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    buffer: Vec<u8>,
    ended: Option<Exit>,
    /// Whether the connection ended before the process did.
    cut: bool,
}

impl AgentProcess {
    /// Sends the request, and waits until the process was started or refused.
    pub(super) async fn start(stream: UnixStream, body: &[u8], pty: bool) -> Result<Process, AgentError> {
        let (stdin, for_stdin) = pipe::pipe()?;
        let (for_stdout, stdout) = pipe::pipe()?;
        let (for_stderr, stderr) = pipe::pipe()?;
        if !pty {
            // A smaller one still carries everything.
            for wide in [stdin.as_fd(), stdout.as_fd()] {
                let _ = rustix::pipe::fcntl_setpipe_size(wide, PIPE_BYTES);
            }
        }
        // The child's ends are of other open files than ours: what the project
        // does to their flags does not reach us.
        let (for_stdin, for_stdout) = (for_stdin.into_blocking_fd()?, for_stdout.into_blocking_fd()?);
        let for_stderr = for_stderr.into_blocking_fd()?;
        let fds = [for_stdin.as_fd(), for_stdout.as_fd(), for_stderr.as_fd()];
        let fds = if pty { &fds[..2] } else { &fds[..] };
        socket::send_request(&stream, b'X', fds, body).await?;
        drop((for_stdin, for_stdout, for_stderr));

        let (mut reader, writer) = stream.into_split();
        let mut buffer = Vec::new();
        let answer = match socket::next_frame(&mut reader, &mut buffer).await {
            Err(AgentError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(AgentError::Refused("the project has no room for another process".into()));
            }
            other => other?,
        };
        match answer.split_first() {
            Some((b'S', _)) => {}
            Some((b'E', reason)) => {
                return Err(AgentError::Refused(String::from_utf8_lossy(reason).into_owned()));
            }
            _ => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
        }
        Ok(Process {
            stdin: Box::pin(Closing(Some(stdin))),
            stdout: Box::pin(stdout),
            stderr: (!pty).then(|| Box::pin(stderr) as _),
            handle: Box::new(Self { reader, writer, buffer, ended: None, cut: false }),
        })
    }

    /// Sends a small message whole or, when the helper does not read, not.
    async fn tell(&self, message: &[u8]) -> io::Result<()> {
        let mut frame = u32::try_from(message.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
        frame.extend_from_slice(message);
        let attempt = async {
            loop {
                self.writer.writable().await?;
                match self.writer.try_write(&frame) {
                    Ok(count) if count == frame.len() => return Ok(()),
                    Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // It has ended; there is nobody to tell.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(5), attempt)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// How a process ended, as the helper has it; `None` if it says something else.
pub(crate) fn exit(answer: &[u8]) -> Option<Exit> {
    match *answer {
        [b'X', 0, code] => Some(Exit::Code(code)),
        [b'X', 1, signal] => Some(Exit::Signal(signals::name(signal))),
        _ => None,
    }
}

#[async_trait]
impl ProcessHandle for AgentProcess {
    async fn resize(&self, size: WindowSize) -> Result<()> {
        let [a, b] = size.cols.to_be_bytes();
        let [c, d] = size.rows.to_be_bytes();
        // A lost resize is not worth an error: the next one repairs it.
        if let Err(error) = self.tell(&[b'R', a, b, c, d]).await {
            tracing::debug!(%error, "could not pass on a window size");
        }
        Ok(())
    }

    async fn signal(&self, signal: &str) -> Result<()> {
        match signals::number(signal) {
            Some(number) => {
                if let Err(error) = self.tell(&[b'G', number]).await {
                    tracing::debug!(%error, signal, "could not pass on a signal");
                }
            }
            // As sshd does: names that this system lacks are ignored.
            None => tracing::debug!(signal, "unknown signal"),
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<Exit> {
        if let Some(exit) = &self.ended {
            return Ok(exit.clone());
        }
        let answer = socket::next_frame(&mut self.reader, &mut self.buffer).await;
        let exit = answer.ok().and_then(|answer| exit(&answer)).unwrap_or_else(|| {
            // The helper went away, and with it, killed, all it had started.
            self.cut = true;
            Exit::Signal("KILL".into())
        });
        self.ended = Some(exit.clone());
        Ok(exit)
    }

    fn ended_with_its_project(&self) -> bool {
        self.cut
    }
}

/// A pipe that a shutdown closes, so that its reader sees the end.
#[derive(Debug)]
struct Closing(Option<pipe::Sender>);

impl AsyncWrite for Closing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Some(pipe) => Pin::new(pipe).poll_write(cx, bytes),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Some(pipe) => Pin::new(pipe).poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        self.0 = None;
        Poll::Ready(Ok(()))
    }
}
