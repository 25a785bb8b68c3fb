//! A snapshot that is being taken in, for longer than one connection.

use std::io;

use bytes::Bytes;
use cocalc_core::{
    control::CommandError,
    storage::{SendHeader, Snapshot},
    stream::BoxRead,
};
use futures_util::stream;
use tokio::{
    io::AsyncRead,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::{io::StreamReader, sync::CancellationToken};

use crate::{
    chunks::{self, Pace, Piece, Prefix},
    frame::invalid,
};

/// How many chunks may lie between the wire and who applies them.
const QUEUED_MAX: usize = 2;

/// The end of a stream that was whole.
enum Fed {
    Chunk(Bytes),
    End,
}

/// What it came to; `None` while it is being taken in.
pub(crate) type Outcome = Option<Result<Snapshot, CommandError>>;

/// Puts what comes off the wire where it is applied.
///
/// The last chunk is held back until the hash has been checked, so whoever
/// applies the stream cannot have come to its end before it is known to be
/// whole.
pub(crate) struct Feeder {
    to: mpsc::Sender<Fed>,
    /// What has come, `held` included.
    pub(crate) prefix: Prefix,
    held: Option<Bytes>,
}

/// A feeder, and what is read of it: an error in the place of the end if the
/// feeder is dropped before.
pub(crate) fn channel() -> (Feeder, BoxRead) {
    let (to, from) = mpsc::channel(QUEUED_MAX);
    let pieces = stream::try_unfold(from, async |mut from: mpsc::Receiver<Fed>| match from.recv().await {
        Some(Fed::Chunk(chunk)) => Ok(Some((chunk, from))),
        Some(Fed::End) => Ok(None),
        None => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
    });
    let feeder = Feeder { to, prefix: Prefix::default(), held: None };
    (feeder, Box::pin(StreamReader::new(Box::pin(pieces))))
}

impl Feeder {
    /// Takes the rest of the stream off the wire. An error that says
    /// [`InvalidData`](io::ErrorKind::InvalidData) is of the stream, every other
    /// one of the wire.
    ///
    /// # Cancel safety
    ///
    /// What has come as a whole chunk counts, and no other; the rest can be
    /// taken off another wire.
    pub(crate) async fn feed(&mut self, from: &mut (impl AsyncRead + Unpin), pace: Pace) -> io::Result<()> {
        loop {
            let piece = chunks::next(from, pace).await?;
            match piece {
                Piece::Chunk(chunk) => {
                    let place = self.to.reserve().await.map_err(|_| gone())?;
                    self.prefix.add(&chunk);
                    if let Some(before) = self.held.replace(chunk) {
                        place.send(Fed::Chunk(before));
                    }
                }
                Piece::End(hash) => {
                    if hash != self.prefix.digest().as_ref() {
                        return Err(invalid("the stream is damaged"));
                    }
                    if self.held.is_some() {
                        let place = self.to.reserve().await.map_err(|_| gone())?;
                        if let Some(last) = self.held.take() {
                            place.send(Fed::Chunk(last));
                        }
                    }
                    self.to.reserve().await.map_err(|_| gone())?.send(Fed::End);
                    return Ok(());
                }
            }
        }
    }
}

/// Nobody applies it any more.
fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

/// A snapshot on its way in.
pub(crate) struct Session {
    pub(crate) header: SendHeader,
    /// Who feeds it has it.
    pub(crate) feeder: tokio::sync::Mutex<Feeder>,
    outcome: watch::Receiver<Outcome>,
    /// Ends the connection that feeds it, because another one has come.
    pub(crate) replaced: std::sync::Mutex<CancellationToken>,
    /// Applies it; ends with this.
    task: JoinHandle<()>,
}

impl Session {
    /// Begins to apply what `work` makes of the stream.
    pub(crate) fn start<F>(header: SendHeader, work: impl FnOnce(BoxRead) -> F) -> Self
    where
        F: Future<Output = Result<Snapshot, CommandError>> + Send + 'static,
    {
        let (feeder, reader) = channel();
        let (tell, outcome) = watch::channel(None);
        let work = work(reader);
        let task = tokio::spawn(async move {
            let done = work.await;
            tell.send_replace(Some(done));
        });
        let replaced = std::sync::Mutex::default();
        Self { header, feeder: tokio::sync::Mutex::new(feeder), outcome, replaced, task }
    }

    /// What it comes to, once that is known; `None` if it was cut off.
    pub(crate) async fn ended(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        outcome.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// Tells what it comes to, without keeping it.
    pub(crate) fn outcome(&self) -> watch::Receiver<Outcome> {
        self.outcome.clone()
    }

    /// Whether it goes on.
    pub(crate) fn lives(&self) -> bool {
        self.outcome.borrow().is_none() && !self.task.is_finished()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}
