//! Images: read-only root file systems, addressed by what is in them.
//!
//! The digest of an image is SHA-256 over a canonical description of its tree
//! (see [`tree`]): names, kinds, modes, owners, times, attributes and bytes.
//! So whoever receives an image, by whatever way, can tell whether it is the
//! one that was named, and the same root file system has the same digest on
//! every host.
//!
//! Beside `images/<digest>` lies `images/<digest>.json`, the [`ImageRecord`]:
//! what people call it and when it was used. An image without one counts.

mod floor;
mod record;
mod travel;
mod tree;
mod unpack;

use std::{
    fmt, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use cocalc_core::{BoxError, ids::ImageDigest, stream::BoxRead};
use rustix::fs::RenameFlags;

pub use self::{
    record::ImageRecord,
    travel::{ImageHeader, ImageStream},
};
use super::{
    Btrfs, Store,
    layout::{entries, need_subvolume, open_directory, subvolume},
    recover::Intent,
    sys,
};
use crate::failure::{Doing as _, Failure};

/// What an image may be at most.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ImageLimits {
    /// Bytes of all its files together, holes counted. Default: 32 GiB.
    pub bytes: u64,
    /// Names in it. Default: two million.
    pub names: u64,
    /// What stays free on the volume meanwhile, in bytes: nothing comes that would
    /// take it. Default: 256 MiB.
    pub free_bytes: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { bytes: 32 << 30, names: 2_000_000, free_bytes: 256 << 20 }
    }
}

/// Why an image could not be imported or found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no such image here.
    #[error("there is no image {digest} here")]
    NotFound {
        /// Its digest.
        digest: ImageDigest,
    },
    /// The archive could not be read or unpacked.
    #[error("the image could not be unpacked: {reason}")]
    BadArchive {
        /// Why.
        reason: String,
    },
    /// What came is not the image that was named.
    #[error("what came is image {found}, and not {wanted}")]
    Different {
        /// What was asked for.
        wanted: ImageDigest,
        /// What it is.
        found: ImageDigest,
    },
    /// It is being sent, or a project has it mounted.
    #[error("image {digest} is in use")]
    InUse {
        /// Its digest.
        digest: ImageDigest,
    },
    /// The volume has no room for it, beside what stays free in any case.
    #[error("the volume has no room for the image beside what stays free; make room on it, or enlarge it")]
    NoSpace,
    /// The volume failed.
    #[error("the volume could not take or find the image")]
    Volume {
        /// Why.
        source: BoxError,
    },
}

impl From<Failure> for ImageError {
    fn from(failure: Failure) -> Self {
        if failure.is_full() { Self::NoSpace } else { Self::Volume { source: failure.into() } }
    }
}

fn bad(reason: impl ToString) -> ImageError {
    ImageError::BadArchive { reason: reason.to_string() }
}

impl Btrfs {
    /// Imports the root file system in an uncompressed tar archive. One that
    /// was imported from the same bytes before costs reading the archive.
    ///
    /// # Errors
    ///
    /// All or nothing; see [`ImageError`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is imported; what was unpacked is removed.
    pub async fn import_image_file(
        &self,
        path: &Path,
        limits: &ImageLimits,
    ) -> Result<ImageDigest, ImageError> {
        let source = unpack::source(tokio::fs::File::open(path).await.map_err(bad)?).await?;
        let known = self.images().await?;
        if let Some((digest, _)) = known.iter().find(|(_, record)| record.sources.contains(&source)) {
            return Ok(*digest);
        }
        let archive = tokio::fs::File::open(path).await.map_err(bad)?;
        // It takes about as much as the archive, whatever that has in it.
        let bytes = archive.metadata().await.map_err(bad)?.len();
        floor::Floor::new(self, limits).fits(bytes)?;
        self.import_image(Box::pin(archive), limits).await
    }

    /// Imports the root file system in a stream of an uncompressed tar archive.
    ///
    /// What has no place in an image is left out: device nodes, and attributes
    /// that mean something to an overlay. An owner above 65,535, who could be
    /// nobody in a project, is refused, and so is what is larger than `limits`.
    ///
    /// # Errors
    ///
    /// All or nothing; see [`ImageError`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is imported; what was unpacked is removed.
    pub async fn import_image(
        &self,
        archive: BoxRead,
        limits: &ImageLimits,
    ) -> Result<ImageDigest, ImageError> {
        self.import_image_as(archive, limits, ImageRecord::default(), |_| Ok(())).await
    }

    /// The same, with what is to be noted of it, and with a last change: `dress`
    /// gets the root directory of what was unpacked, before it is looked through.
    ///
    /// # Errors
    ///
    /// All or nothing; see [`ImageError`]. What `dress` finds wrong is a
    /// [`BadArchive`](ImageError::BadArchive).
    ///
    /// # Cancel safety
    ///
    /// Nothing is imported; what was unpacked is removed.
    pub async fn import_image_as(
        &self,
        archive: BoxRead,
        limits: &ImageLimits,
        noted: ImageRecord,
        dress: impl FnOnce(&OwnedFd) -> io::Result<()> + Send + 'static,
    ) -> Result<ImageDigest, ImageError> {
        let staged = self.stage_image().await?;
        let limits = *limits;
        let mut record =
            ImageRecord::of_source(unpack::unpack(self, &staged.path(), archive, &limits).await?);
        record.add(noted);
        let staged = self
            .image_work(move |_| {
                let root = crate::tree::open_root(&staged.path()).doing("open what was unpacked")?;
                Ok((dress(&root), staged))
            })
            .await?;
        let (dressed, staged) = staged;
        dressed.map_err(bad)?;
        self.settle_image(staged, None, record, limits, tree::Strictness::LeaveOut).await
    }

    /// An empty place on the volume for what comes before an image does: it goes
    /// with all that is in it when it is dropped, or when the store opens again.
    ///
    /// # Errors
    ///
    /// If the volume has no room.
    pub async fn scratch(&self) -> Result<Scratch, ImageError> {
        Ok(Scratch(self.stage_image().await?))
    }

    /// Where the root file system of an image is.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`] if it is not here.
    pub async fn image_path(&self, digest: &ImageDigest) -> Result<PathBuf, ImageError> {
        let digest = *digest;
        let found = self.image_work(move |store| store.find_image(&digest)).await?;
        found.ok_or(ImageError::NotFound { digest })
    }

    /// The images that are here, ordered by digest.
    ///
    /// # Errors
    ///
    /// Those of reading the volume.
    pub async fn images(&self) -> Result<Vec<(ImageDigest, ImageRecord)>, ImageError> {
        self.image_work(|store| {
            let mut found = Vec::new();
            for name in entries(&store.layout.images())? {
                let Ok(digest) = name.parse::<ImageDigest>() else { continue };
                if store.find_image(&digest)?.is_some() {
                    found.push((digest, store.read_record(&digest)?));
                }
            }
            found.sort_by_key(|(digest, _)| *digest.as_bytes());
            Ok(found)
        })
        .await
    }

    /// Changes what is noted of an image, and returns that.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`] if it is not here; those of writing.
    pub async fn note_image(
        &self,
        digest: &ImageDigest,
        change: impl FnOnce(&mut ImageRecord) + Send + 'static,
    ) -> Result<ImageRecord, ImageError> {
        let digest = *digest;
        let done = self.image_work(move |store| {
            let _turn = store.images_turn();
            if store.find_image(&digest)?.is_none() {
                return Ok(None);
            }
            let mut record = store.read_record(&digest)?;
            change(&mut record);
            store.write_record(&digest, &record)?;
            Ok(Some(record))
        });
        done.await?.ok_or(ImageError::NotFound { digest })
    }

    /// Deletes an image. Whether a project wants it is for the caller to know.
    /// Deleting what is not there is harmless. Space returns later.
    ///
    /// # Errors
    ///
    /// [`ImageError::InUse`] while it is sent to another host.
    pub async fn remove_image(&self, digest: &ImageDigest) -> Result<(), ImageError> {
        let digest = *digest;
        let removed = self.image_work(move |store| {
            let _turn = store.images_turn();
            let Some(found) = subvolume(&store.layout.image(&digest))? else {
                store.remove_record(&digest)?;
                return Ok(true);
            };
            match sys::destroy_subvolume(&store.layout.root_fd, found.info.tree) {
                Ok(()) => {}
                // The kernel refuses what it is sending.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
                    return Ok(false);
                }
                Err(error) => return Err(error).doing("delete an image"),
            }
            store.remove_record(&digest)?;
            store.layout.commit()?;
            Ok(true)
        });
        if removed.await? { Ok(()) } else { Err(ImageError::InUse { digest }) }
    }

    /// Makes an empty subvolume in staging.
    async fn stage_image(&self) -> Result<StagedImage, ImageError> {
        let name = cocalc_core::ids::VolumeUuid::random().to_string();
        let staged = StagedImage { store: Arc::clone(&self.0), name: name.clone() };
        self.image_work(move |store| {
            let parent = open_directory(&store.layout.staging()).doing("open staging")?;
            sys::create_subvolume(&parent, &name, None).doing("make a subvolume")
        })
        .await?;
        Ok(staged)
    }

    /// Looks through what was unpacked, and makes it an image: the `wanted`
    /// one, if it is said which.
    async fn settle_image(
        &self,
        staged: StagedImage,
        wanted: Option<ImageDigest>,
        record: ImageRecord,
        limits: ImageLimits,
        strictness: tree::Strictness,
    ) -> Result<ImageDigest, ImageError> {
        self.image_work(move |store| {
            let seen = match tree::settle(&staged.path(), &limits, strictness) {
                Ok(seen) => seen,
                Err(tree::Unfit::Refused(reason)) => return Ok(Err(bad(reason))),
                Err(tree::Unfit::Io(source)) => {
                    return Err(Failure::Io { doing: "look through an image", source });
                }
            };
            if let Some(wanted) = wanted.filter(|wanted| *wanted != seen.digest) {
                return Ok(Err(ImageError::Different { wanted, found: seen.digest }));
            }
            let mut record = record;
            (record.bytes, record.names_in_it) = (seen.bytes, seen.names);
            store.keep_image(&staged.name, seen.digest, record)?;
            Ok(Ok(seen.digest))
        })
        .await?
    }

    async fn image_work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, ImageError> {
        let store = Arc::clone(&self.0);
        let joined = tokio::task::spawn_blocking(move || work(&store)).await;
        Ok(joined.map_err(|error| Failure::Wrong(error.to_string()))??)
    }
}

/// A place on the volume that goes when it is dropped.
pub struct Scratch(StagedImage);

impl Scratch {
    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.0.path()
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scratch").field(&self.path()).finish()
    }
}

/// A place in staging for an image, removed when it is dropped: what was made
/// an image is not there any more.
struct StagedImage {
    store: Arc<Store>,
    name: String,
}

impl StagedImage {
    fn path(&self) -> PathBuf {
        self.store.layout.staging().join(&self.name)
    }
}

impl Drop for StagedImage {
    fn drop(&mut self) {
        let (store, name) = (Arc::clone(&self.store), std::mem::take(&mut self.name));
        let remove = move || {
            if let Err(failure) = store.remove_staged(&name, None) {
                let error = cocalc_core::chain(&failure);
                tracing::warn!(error, name, "staging is left until the store opens again");
            }
        };
        match tokio::runtime::Handle::try_current() {
            // The future that held it may have been dropped.
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

impl Store {
    fn find_image(&self, digest: &ImageDigest) -> Result<Option<PathBuf>, Failure> {
        let path = self.layout.image(digest);
        let found = subvolume(&path)?.is_some_and(|image| image.info.read_only);
        Ok(found.then_some(path))
    }

    /// Makes what is staged an image, or adds to what is noted of the one that
    /// is here already.
    fn keep_image(&self, staging: &str, digest: ImageDigest, record: ImageRecord) -> Result<(), Failure> {
        let _turn = self.images_turn();
        if self.find_image(&digest)?.is_some() {
            let mut known = self.read_record(&digest)?;
            known.add(record);
            return self.write_record(&digest, &known);
        }
        let path = self.layout.staging().join(staging);
        let unpacked = need_subvolume(&path)?;
        self.layout.commit()?;
        self.intending(&Intent::Image { digest }, || {
            super::volumes::rename(&path, &self.layout.image(&digest), RenameFlags::NOREPLACE)?;
            self.layout.commit()?;
            sys::set_read_only(&unpacked.fd).doing("make an image read-only")
        })?;
        self.write_record(&digest, &record)
    }
}
