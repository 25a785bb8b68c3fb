//! The bytes of a snapshot on the wire: chunks with their length before them,
//! and at the end the SHA-256 of all of them.
//!
//! The last chunk is held back until the hash has been checked, so whoever
//! applies the stream cannot have come to its end before it is known to be
//! whole.

use std::{io, time::Duration};

use bytes::Bytes;
use cocalc_core::stream::BoxRead;
use futures_util::stream;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use tokio_util::io::StreamReader;

use crate::frame::invalid;

/// The largest chunk.
pub(crate) const CHUNK_BYTES_MAX: usize = 1 << 20;

/// What the sender reads at once.
const READ_BYTES: usize = 256 << 10;

/// Instead of a length: nothing yet, but the sender lives.
const STILL_HERE: u32 = u32::MAX;

/// How fast the stream has to move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// No progress for this long cuts the stream.
    pub(crate) stall: Duration,
    /// How often who has nothing to say says so.
    pub(crate) beat: Duration,
}

/// Why a stream was not sent to its end.
#[derive(Debug)]
pub(crate) enum PumpError {
    /// The snapshot could not be read.
    Source(io::Error),
    /// It could not be written.
    Wire(io::Error),
}

/// Sends all of `reader`, and returns how many bytes that were.
pub(crate) async fn pump(
    mut reader: BoxRead,
    to: &mut (impl AsyncWrite + Unpin),
    pace: Pace,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<u64, PumpError> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut total = 0u64;
    loop {
        let read = match timeout(pace.beat, reader.read(&mut buffer)).await {
            Ok(read) => read.map_err(PumpError::Source)?,
            // Comparing two large snapshots can be silent for long.
            Err(_) => {
                write(to, &STILL_HERE.to_be_bytes(), pace).await?;
                continue;
            }
        };
        let chunk = &buffer[..read];
        // At most READ_BYTES, which fits.
        let length = u32::try_from(read).unwrap_or(STILL_HERE);
        write(to, &length.to_be_bytes(), pace).await?;
        if read == 0 {
            break;
        }
        hash.update(chunk);
        write(to, chunk, pace).await?;
        total += read as u64;
        progress(total);
    }
    write(to, &hash.finalize(), pace).await?;
    Ok(total)
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8], pace: Pace) -> Result<(), PumpError> {
    let written = timeout(pace.stall, async {
        to.write_all(bytes).await?;
        to.flush().await
    });
    match written.await {
        Ok(written) => written.map_err(PumpError::Wire),
        Err(_) => Err(PumpError::Wire(stalled())),
    }
}

/// The bytes that [`pump`] sent, or an error in the place of their end.
pub(crate) fn reader(from: impl AsyncRead + Send + Unpin + 'static, pace: Pace) -> BoxRead {
    let chunks = Chunks { from, pace, hash: Sha256::new(), held: None, ended: false };
    Box::pin(StreamReader::new(Box::pin(stream::try_unfold(chunks, Chunks::next))))
}

struct Chunks<R> {
    from: R,
    pace: Pace,
    hash: Sha256,
    /// The last chunk, which is given out when what follows it is known.
    held: Option<Bytes>,
    ended: bool,
}

impl<R: AsyncRead + Unpin> Chunks<R> {
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        while !self.ended {
            let length = match self.read(4).await?.as_slice() {
                &[a, b, c, d] => u32::from_be_bytes([a, b, c, d]),
                _ => return Err(invalid("no length")),
            };
            if length == STILL_HERE {
                continue;
            }
            if length as usize > CHUNK_BYTES_MAX {
                return Err(invalid("a chunk is too long"));
            }
            let before = if length == 0 {
                self.ended = true;
                let expected = std::mem::take(&mut self.hash).finalize();
                if self.read(expected.len()).await? != expected.as_slice() {
                    return Err(invalid("the stream is damaged"));
                }
                self.held.take()
            } else {
                let chunk = self.read(length as usize).await?;
                self.hash.update(&chunk);
                self.held.replace(chunk.into())
            };
            if let Some(chunk) = before {
                return Ok(Some((chunk, self)));
            }
        }
        Ok(None)
    }

    /// Reads exactly `length` bytes; each read within the stall limit.
    async fn read(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        let mut rest = (&mut self.from).take(length as u64);
        while bytes.len() < length {
            match timeout(self.pace.stall, rest.read_buf(&mut bytes)).await {
                Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => read?,
                Err(_) => return Err(stalled()),
            };
        }
        Ok(bytes)
    }
}

pub(crate) fn stalled() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the other end stands still")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { stall: Duration::from_secs(5), beat: Duration::from_secs(1) };

    async fn wire(content: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let reader = Box::pin(std::io::Cursor::new(content.to_vec()));
        let sent = pump(reader, &mut wire, PACE, &|_| ()).await.unwrap();
        assert_eq!(sent, content.len() as u64);
        wire
    }

    async fn unwire(wire: Vec<u8>) -> (Vec<u8>, io::Result<usize>) {
        let mut content = Vec::new();
        let mut reader = reader(std::io::Cursor::new(wire), PACE);
        let end = reader.read_to_end(&mut content).await;
        (content, end)
    }

    #[tokio::test]
    async fn what_is_sent_arrives() {
        for size in [0, 1, READ_BYTES - 1, READ_BYTES, 3 * READ_BYTES + 7] {
            let content: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            let (arrived, end) = unwire(wire(&content).await).await;
            assert!(end.is_ok() && arrived == content, "{size}");
        }
    }

    #[tokio::test]
    async fn no_cut_and_no_damage_looks_like_an_end() {
        let content = b"the quick brown fox".repeat(50);
        let whole = wire(&content).await;
        for cut in 0..whole.len() {
            let (arrived, end) = unwire(whole[..cut].to_vec()).await;
            assert!(end.is_err() && arrived.is_empty(), "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            let (arrived, end) = unwire(damaged).await;
            assert!(end.is_err(), "damaged at {at}");
            // The last chunk is held back: of damaged bytes nothing comes out.
            let in_bytes = (4..4 + content.len()).contains(&at);
            assert!(!in_bytes || arrived.is_empty(), "damaged at {at}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_source_is_not_a_dead_one_but_a_silent_wire_is() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (mut source, slow) = tokio::io::duplex(64);
        let sending = tokio::spawn(async move {
            let mut near = near;
            pump(Box::pin(slow), &mut near, PACE, &|_| ()).await.unwrap();
        });
        let writing = tokio::spawn(async move {
            for _ in 0..3 {
                tokio::time::sleep(PACE.stall * 3).await;
                source.write_all(b"x").await.unwrap();
            }
        });
        let mut content = Vec::new();
        reader(far, PACE).read_to_end(&mut content).await.unwrap();
        assert_eq!(content, b"xxx");
        writing.await.unwrap();
        sending.await.unwrap();
        let (_near, far) = tokio::io::duplex(64);
        let error = reader(far, PACE).read_to_end(&mut content).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
