//! What fuzz targets reach of the private parsers; nothing for other users.

use crate::{
    reverse::{Lines, accepted},
    wire::{self, Answer, FRAME_BYTES_MAX, Frame, Hello},
};

/// Reads what a proxy sends to a host, or a host to a proxy, and panics if a
/// frame is not what it would be sent as.
pub async fn peer(bytes: &[u8]) {
    // The same bytes in each place where they could come.
    let _ = wire::receive::<Hello>(&mut &*bytes).await;
    let _ = wire::receive::<Answer>(&mut &*bytes).await;
    let mut rest = bytes;
    while let Ok(Some(frame)) = wire::receive_frame(&mut rest).await {
        if let Frame::Stdin(data) | Frame::Stdout(data) | Frame::Stderr(data) = &frame {
            assert!(data.len() <= FRAME_BYTES_MAX);
        }
        let mut sent = Vec::new();
        let again = match wire::send_frame(&mut sent, &frame).await {
            Ok(()) => wire::receive_frame(&mut sent.as_slice()).await,
            Err(error) => Err(error),
        };
        assert!(matches!(&again, Ok(Some(again)) if *again == frame), "{frame:?}: {again:?}");
    }
}

/// Reads what a tool in a project says, which its tenant may have made up, and
/// panics if something of it is not fit to be shown.
pub async fn tool(bytes: &[u8]) {
    let mut lines = Lines::new(Box::pin(std::io::Cursor::new(bytes.to_vec())));
    while let Some(line) = lines.next().await {
        if let Some((_, (address, _))) = accepted(&line) {
            assert!(address.len() <= 64 && address.bytes().all(|b| b.is_ascii_graphic()), "{address:?}");
        }
    }
}
