//! What fuzz targets reach of the private parsers; nothing for other users.

use std::time::Duration;

use crate::{
    chunks::{self, CHUNK_BYTES_MAX, Pace, Piece},
    frame::{self, Answer, Decision, Hello, Offer, Welcome},
};

/// Reads what a peer may send in each place of a connection, and panics if more
/// is taken than may come.
pub async fn stream(bytes: &[u8]) {
    let _ = frame::read::<Hello>(&mut &*bytes).await;
    let _ = frame::read::<Welcome>(&mut &*bytes).await;
    let _ = frame::read::<Offer>(&mut &*bytes).await;
    let _ = frame::read::<Answer>(&mut &*bytes).await;
    let _ = frame::read::<Decision>(&mut &*bytes).await;
    let pace = Pace { stall: Duration::from_secs(60), beat: Duration::from_secs(60) };
    let mut rest = bytes;
    while let Ok(Piece::Chunk(chunk)) = chunks::next(&mut rest, pace).await {
        assert!((1..=CHUNK_BYTES_MAX).contains(&chunk.len()));
    }
}
