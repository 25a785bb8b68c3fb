//! Images on their way between hosts: the kernel's stream of the subvolume,
//! guarded as those of snapshots are, and believed by its digest only.

use std::{fmt, sync::atomic::Ordering};

use cocalc_core::{
    ids::{ImageDigest, SnapshotName, VolumeUuid},
    stream::BoxRead,
};
use rustix::fs::{Timespec, Timestamps};
use serde::{Deserialize, Serialize};

use super::{
    ImageError, ImageLimits, ImageRecord, StagedImage, bad,
    floor::{Floor, Watched},
    tree::Strictness,
};
use crate::{
    btrfs::{
        Btrfs, NOBODY,
        apply::Applier,
        guard::StreamGuard,
        layout::{self, need_subvolume},
        receive::{Caller, pump},
        send::{Opened, Sending},
    },
    failure::{Doing as _, Failure},
};

/// What is said of an image before its stream.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ImageHeader {
    /// Which image.
    pub digest: ImageDigest,
    /// What its subvolume is called in the stream.
    pub origin: VolumeUuid,
    /// When its root directory was changed, in seconds and nanoseconds, which
    /// the kernel does not send.
    pub root_mtime: (i64, u32),
    /// What is noted of it where it comes from.
    pub record: ImageRecord,
}

/// An image as a stream.
pub struct ImageStream {
    /// What comes.
    pub header: ImageHeader,
    /// The stream; fails, and does not merely end, if the sender fails.
    pub reader: BoxRead,
}

impl fmt::Debug for ImageStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageStream").field("header", &self.header).finish_non_exhaustive()
    }
}

/// An image's name in a stream.
fn name(digest: &ImageDigest) -> Result<SnapshotName, ImageError> {
    digest.to_string().parse().map_err(bad)
}

impl Btrfs {
    /// Streams an image, for a host that takes streams up to `version_max`.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`] if it is not here.
    pub async fn send_image(
        &self,
        digest: &ImageDigest,
        version_max: u32,
    ) -> Result<ImageStream, ImageError> {
        let digest = *digest;
        let version = version_max.min(self.0.stream_version);
        let opened = self.image_work(move |store| {
            if store.find_image(&digest)?.is_none() {
                return Ok(None);
            }
            let image = need_subvolume(&store.layout.image(&digest))?;
            let stat = rustix::fs::fstat(&image.fd).doing("look at an image")?;
            let header = ImageHeader {
                digest,
                origin: layout::origin(&image.info),
                root_mtime: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
                record: store.read_record(&digest)?,
            };
            let reader = Sending::start(Opened::alone(image), version).doing("start to send")?;
            Ok(Some(ImageStream { header, reader: Box::pin(reader) }))
        });
        opened.await?.ok_or(ImageError::NotFound { digest })
    }

    /// Takes an image in from a stream that [`send_image`](Self::send_image)
    /// made on any host. It must be the one that `header` names; one that is
    /// here already is left, and the stream is not read.
    ///
    /// # Errors
    ///
    /// All or nothing; [`ImageError::Different`] if it is another one.
    ///
    /// # Cancel safety
    ///
    /// Nothing is imported; what came is removed.
    pub async fn receive_image(
        &self,
        header: &ImageHeader,
        stream: BoxRead,
        limits: &ImageLimits,
    ) -> Result<ImageDigest, ImageError> {
        if self.image_path(&header.digest).await.is_ok() {
            return Ok(header.digest);
        }
        if header.record.bytes > limits.bytes {
            let reason =
                format!("it has {} bytes, and an image at most {}", header.record.bytes, limits.bytes);
            return Err(bad(reason));
        }
        let floor = Floor::new(self, limits);
        floor.fits(header.record.bytes)?;
        let staged = self.stage_image().await?;
        let (caller, gone) = Caller::new();
        let (applier, staged) = {
            let (origin, flag) = (header.origin, gone.flag.clone());
            self.image_work(move |_| {
                let root = need_subvolume(&staged.path())?;
                Ok((Applier::new(root.fd, origin, Vec::new(), flag), staged))
            })
            .await?
        };
        let guard = StreamGuard::new(&name(&header.digest)?, header.origin, None);
        // Whatever the other host says of its size.
        let (stream, full) = Watched::new(bounded(stream, limits), floor);
        // In a task of its own: what is dropped while it is applied to would be
        // removed under it.
        let stall_limit = self.0.stall_limit;
        let pumped = tokio::spawn(async move {
            let done = pump(NOBODY, applier, guard, Box::pin(stream), gone.told, stall_limit).await;
            (done.map(drop), staged)
        });
        let (done, staged): (Result<(), Failure>, StagedImage) =
            pumped.await.map_err(|error| Failure::Wrong(error.to_string()))?;
        drop(caller);
        match done {
            Err(_) if full.load(Ordering::Relaxed) => return Err(ImageError::NoSpace),
            Err(Failure::Public(error)) => return Err(bad(error)),
            other => other?,
        }
        let (tv_sec, nanos) = header.root_mtime;
        let staged = self
            .image_work(move |_| {
                let times = Timestamps {
                    last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
                    last_modification: Timespec { tv_sec, tv_nsec: nanos.min(999_999_999).into() },
                };
                let root = need_subvolume(&staged.path())?;
                rustix::fs::futimens(&root.fd, &times).doing("set the time of the root directory")?;
                Ok(staged)
            })
            .await?;
        let record = ImageRecord {
            imported: Some(cocalc_core::ids::Timestamp::now()),
            used: None,
            pinned: false,
            ..header.record.clone()
        };
        self.settle_image(staged, Some(header.digest), record, *limits, Strictness::Refuse).await
    }
}

/// A stream that ends when it is longer than any image.
fn bounded(stream: BoxRead, limits: &ImageLimits) -> BoxRead {
    use tokio::io::AsyncReadExt as _;
    // Names take some hundred bytes in a stream, and data a little more than
    // its own length. What is cut off is refused by the guard.
    let most =
        limits.bytes.saturating_add(limits.bytes / 8).saturating_add(limits.names.saturating_mul(4096));
    Box::pin(stream.take(most))
}
