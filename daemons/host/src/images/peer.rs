//! Images on their way from host to host, over the authenticated channel: the
//! one that wants an image dials, names it, and gets its stream if the master
//! has said that it may have it. What comes is believed by its digest only.

use std::{io, time::Duration};

use cocalc_core::{
    connector::{Peer, Service},
    control::{CommandError, ErrorCode},
    ids::{HostId, ImageDigest},
    storage::Storage as _,
    stream::{BoxRead, BoxStream},
};
use cocalc_storage::{Btrfs, ImageHeader};
use cocalc_transfer::{read_message, write_message};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf},
    time::timeout,
};

use super::{Images, World, image_error, work::Progress};

/// How long the other host may take for a message, or for the next bytes.
const STALL_LIMIT: Duration = Duration::from_secs(60);
const DIAL_LIMIT: Duration = Duration::from_secs(10);
const CHUNK: usize = 256 << 10;

/// Which image is wanted.
#[derive(Debug, Deserialize, Serialize)]
struct Wanted {
    digest: ImageDigest,
    /// The highest version of streams that are taken.
    version_max: u32,
}

/// The answer.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// The stream follows.
    Comes(ImageHeader),
    /// It does not.
    Refused(CommandError),
}

impl Images {
    /// Serves a peer that wants an image.
    pub(crate) async fn serve(&self, peer: Peer, mut stream: BoxStream) -> io::Result<()> {
        let wanted: Wanted = timeout(STALL_LIMIT, read_message(&mut stream)).await??;
        match self.send(peer, &wanted).await {
            Err(error) => {
                tracing::warn!(?peer, digest = %wanted.digest, reason = error.message, "an image was refused");
                write_message(&mut stream, &Answer::Refused(error)).await?;
            }
            Ok((header, mut reader)) => {
                tracing::info!(?peer, digest = %wanted.digest, "sending an image");
                write_message(&mut stream, &Answer::Comes(header)).await?;
                let mut chunk = vec![0; CHUNK];
                loop {
                    let length = reader.read(&mut chunk).await?;
                    if length == 0 {
                        break;
                    }
                    timeout(STALL_LIMIT, stream.write_all(&chunk[..length])).await??;
                }
            }
        }
        timeout(STALL_LIMIT, stream.shutdown()).await?
    }

    async fn send(&self, peer: Peer, wanted: &Wanted) -> Result<(ImageHeader, BoxRead), CommandError> {
        let allowed = matches!(peer, Peer::Host(host) if self.is_offered(wanted.digest, host));
        if !allowed {
            let message = format!("the master has not said that image {} goes there", wanted.digest);
            return Err(CommandError { code: ErrorCode::Unavailable, message });
        }
        let sent = self.store()?.send_image(&wanted.digest, wanted.version_max).await;
        let sent = sent.map_err(image_error)?;
        Ok((sent.header, sent.reader))
    }

    /// Fetches an image from another host.
    pub(super) async fn fetch(
        &self,
        store: &Btrfs,
        digest: ImageDigest,
        from: HostId,
        progress: &Progress,
        world: &World,
    ) -> Result<(), CommandError> {
        let unavailable = |what: String| CommandError { code: ErrorCode::Unavailable, message: what };
        let broke = |error: io::Error| unavailable(format!("the image broke off on its way: {error}"));
        progress.phase("asking the other host");
        let dial = world.peers.open(from, Service::Images, None, DIAL_LIMIT).await;
        let mut stream = dial.map_err(|error| unavailable(cocalc_core::chain(&error)))?;
        let wanted = Wanted { digest, version_max: store.capabilities().stream_version };
        let ask = async {
            write_message(&mut stream, &wanted).await?;
            read_message::<Answer>(&mut stream).await
        };
        let answer = timeout(STALL_LIMIT, ask).await.map_err(|error| broke(error.into()))?.map_err(broke)?;
        let header = match answer {
            Answer::Comes(header) if header.digest == digest => header,
            Answer::Comes(_) => return Err(unavailable("the other host sends another image".to_owned())),
            Answer::Refused(error) => return Err(error),
        };
        progress.phase("fetching the image");
        let expected = header.record.bytes;
        progress.bytes(0, (expected > 0).then_some(expected));
        let (counter, mut seen) = tokio::sync::watch::channel(0);
        let counted = Counted { stream, counter, count: 0 };
        let limits = self.0.settings.limits();
        let receive = store.receive_image(&header, Box::pin(counted), &limits);
        let mut receive = std::pin::pin!(receive);
        loop {
            tokio::select! {
                done = &mut receive => return done.map(drop).map_err(image_error),
                Ok(()) = seen.changed() => {
                    progress.bytes(*seen.borrow_and_update(), (expected > 0).then_some(expected));
                }
            }
        }
    }
}

/// Counts what is read.
struct Counted {
    stream: BoxStream,
    counter: tokio::sync::watch::Sender<u64>,
    count: u64,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let before = buf.filled().len();
        std::task::ready!(self.stream.as_mut().poll_read(cx, buf))?;
        self.count += u64::try_from(buf.filled().len() - before).unwrap_or(0);
        // Now and then is enough.
        if self.count - *self.counter.borrow() >= 1 << 20 {
            self.counter.send_replace(self.count);
        }
        std::task::Poll::Ready(Ok(()))
    }
}
