//! The bytes of a snapshot on the wire: chunks with their length before them,
//! and at the end the SHA-256 of all of them, those before a broken connection
//! included.

use std::{io, time::Duration};

use bytes::Bytes;
use cocalc_core::stream::BoxRead;
use ring::digest::{Context, Digest, SHA256};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use crate::{frame::invalid, throttle::Throttle};

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

/// The bytes of a stream so far: how many, and their hash.
#[derive(Clone)]
pub(crate) struct Prefix {
    hash: Context,
    pub(crate) bytes: u64,
}

impl Default for Prefix {
    fn default() -> Self {
        Self { hash: Context::new(&SHA256), bytes: 0 }
    }
}

impl Prefix {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    pub(crate) fn digest(&self) -> Digest {
        self.hash.clone().finish()
    }

    pub(crate) fn hex(&self) -> String {
        self.digest().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Sends the rest of `reader`, of which `before` has been sent already, and
/// returns how many bytes all of it were.
pub(crate) async fn pump(
    mut reader: BoxRead,
    mut before: Prefix,
    to: &mut (impl AsyncWrite + Unpin),
    pace: Pace,
    throttle: &Throttle,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<u64, PumpError> {
    const LENGTH: usize = 4;
    let mut buffer = vec![0; LENGTH + READ_BYTES];
    loop {
        let (length, body) = buffer.split_at_mut(LENGTH);
        let most = throttle.piece(READ_BYTES);
        let read = match timeout(pace.beat, reader.read(&mut body[..most])).await {
            Ok(read) => read.map_err(PumpError::Source)?,
            // Comparing two large snapshots can be silent for long.
            Err(_) => {
                write(to, &STILL_HERE.to_be_bytes(), pace).await?;
                continue;
            }
        };
        // At most READ_BYTES, which fits.
        length.copy_from_slice(&u32::try_from(read).unwrap_or(STILL_HERE).to_be_bytes());
        before.add(&body[..read]);
        throttle.wait(read).await;
        write(to, &buffer[..LENGTH + read], pace).await?;
        if read == 0 {
            break;
        }
        progress(before.bytes);
    }
    write(to, before.digest().as_ref(), pace).await?;
    Ok(before.bytes)
}

/// Reads `prefix` of the stream again, and leaves the reader behind it; `None`
/// if the stream is not so long.
pub(crate) async fn reread(reader: &mut BoxRead, bytes: u64) -> io::Result<Option<Prefix>> {
    let mut prefix = Prefix::default();
    let mut buffer = vec![0; READ_BYTES];
    while prefix.bytes < bytes {
        let most = usize::try_from(bytes - prefix.bytes).unwrap_or(READ_BYTES).min(READ_BYTES);
        match reader.read(&mut buffer[..most]).await? {
            0 => return Ok(None),
            read => prefix.add(&buffer[..read]),
        }
    }
    Ok(Some(prefix))
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

/// What comes off the wire.
pub(crate) enum Piece {
    Chunk(Bytes),
    /// The end, with the hash of everything before.
    End(Vec<u8>),
}

/// The next piece of what [`pump`] sends. Not cancel safe.
pub(crate) async fn next(from: &mut (impl AsyncRead + Unpin), pace: Pace) -> io::Result<Piece> {
    loop {
        let length = match read(from, 4, pace).await?.as_slice() {
            &[a, b, c, d] => u32::from_be_bytes([a, b, c, d]),
            _ => return Err(invalid("no length")),
        };
        match length {
            STILL_HERE => {}
            0 => return Ok(Piece::End(read(from, SHA256.output_len(), pace).await?)),
            length if length as usize > CHUNK_BYTES_MAX => return Err(invalid("a chunk is too long")),
            length => return Ok(Piece::Chunk(read(from, length as usize, pace).await?.into())),
        }
    }
}

/// Reads exactly `length` bytes; each read within the stall limit.
async fn read(from: &mut (impl AsyncRead + Unpin), length: usize, pace: Pace) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length);
    let mut rest = from.take(length as u64);
    while bytes.len() < length {
        match timeout(pace.stall, rest.read_buf(&mut bytes)).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read?,
            Err(_) => return Err(stalled()),
        };
    }
    Ok(bytes)
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
        let free = Throttle::default();
        let sent = pump(reader, Prefix::default(), &mut wire, PACE, &free, &|_| ()).await.unwrap();
        assert_eq!(sent, content.len() as u64);
        wire
    }

    /// What a receiver reads of what comes off the wire.
    fn reader(mut from: impl AsyncRead + Send + Unpin + 'static) -> BoxRead {
        let (mut feeder, reader) = crate::session::channel();
        tokio::spawn(async move { feeder.feed(&mut from, PACE).await });
        reader
    }

    async fn unwire(wire: Vec<u8>) -> (Vec<u8>, io::Result<usize>) {
        let mut content = Vec::new();
        let end = reader(std::io::Cursor::new(wire)).read_to_end(&mut content).await;
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
            let free = Throttle::default();
            pump(Box::pin(slow), Prefix::default(), &mut near, PACE, &free, &|_| ()).await.unwrap();
        });
        let writing = tokio::spawn(async move {
            for _ in 0..3 {
                tokio::time::sleep(PACE.stall * 3).await;
                source.write_all(b"x").await.unwrap();
            }
        });
        let mut content = Vec::new();
        reader(far).read_to_end(&mut content).await.unwrap();
        assert_eq!(content, b"xxx");
        writing.await.unwrap();
        sending.await.unwrap();
        let (_near, far) = tokio::io::duplex(64);
        let (mut feeder, _reader) = crate::session::channel();
        let mut far = far;
        let error = feeder.feed(&mut far, PACE).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
