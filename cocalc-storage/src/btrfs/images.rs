//! Images: read-only root file systems, addressed by the exact bytes that were
//! imported.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use cocalc_core::{BoxError, ids::ImageDigest, stream::BoxRead};
use rustix::fs::RenameFlags;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::{
    Btrfs, Store,
    layout::{entries, need_subvolume, open_directory, subvolume},
    recover::Intent,
    sys,
};
use crate::{
    child::Running,
    failure::{Doing as _, Failure},
};

const CHUNK: usize = 128 << 10;
/// An archive ends with two blocks of zeros.
const END_MARK: usize = 1024;
/// How long unpacking may take no input or give no end.
const STALL_LIMIT: Duration = Duration::from_secs(600);

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
    /// The volume failed.
    #[error("the volume could not take or find the image")]
    Volume {
        /// Why.
        source: BoxError,
    },
}

impl From<Failure> for ImageError {
    fn from(failure: Failure) -> Self {
        Self::Volume { source: failure.into() }
    }
}

fn bad(reason: impl ToString) -> ImageError {
    ImageError::BadArchive { reason: reason.to_string() }
}

impl Btrfs {
    /// Imports the root file system in an uncompressed tar archive; one that
    /// is here already costs reading it.
    ///
    /// # Errors
    ///
    /// All or nothing; see [`ImageError`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is imported; what was unpacked goes when the store opens again.
    pub async fn import_image_file(&self, path: &Path) -> Result<ImageDigest, ImageError> {
        // Hashing costs less than unpacking what is here already.
        let mut file = tokio::fs::File::open(path).await.map_err(bad)?;
        let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
        loop {
            match file.read(&mut chunk).await.map_err(bad)? {
                0 => break,
                length => hash.update(&chunk[..length]),
            }
        }
        let digest = ImageDigest::from_bytes(hash.finalize().into());
        if self.image_path(&digest).await.is_ok() {
            return Ok(digest);
        }
        self.import_image(Box::pin(tokio::fs::File::open(path).await.map_err(bad)?)).await
    }

    /// The same, from a stream of bytes.
    ///
    /// # Errors
    ///
    /// All or nothing; see [`ImageError`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is imported; what was unpacked goes when the store opens again.
    pub async fn import_image(&self, archive: BoxRead) -> Result<ImageDigest, ImageError> {
        let staging = cocalc_core::ids::VolumeUuid::random().to_string();
        let name = staging.clone();
        self.image_work(move |store| {
            let parent = open_directory(&store.layout.staging()).doing("open staging")?;
            sys::create_subvolume(&parent, &name, None).doing("make a subvolume")
        })
        .await?;
        let unpacked = unpack(&self.0.layout.staging().join(&staging), archive).await;
        self.image_work(move |store| {
            let done = unpacked.map(|digest| store.keep_image(&staging, digest));
            let removed = store.remove_staged(&staging, None);
            Ok((done, removed))
        })
        .await
        .and_then(|(done, removed)| {
            let digest = done??;
            removed?;
            Ok(digest)
        })
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
    pub async fn images(&self) -> Result<Vec<ImageDigest>, ImageError> {
        self.image_work(|store| {
            let mut found = Vec::new();
            for name in entries(&store.layout.images())? {
                let Ok(digest) = name.parse::<ImageDigest>() else { continue };
                if store.find_image(&digest)?.is_some() {
                    found.push(digest);
                }
            }
            found.sort_by_key(|digest| *digest.as_bytes());
            Ok(found)
        })
        .await
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

impl Store {
    fn find_image(&self, digest: &ImageDigest) -> Result<Option<PathBuf>, Failure> {
        let path = self.layout.image(digest);
        let found = subvolume(&path)?.is_some_and(|image| image.info.read_only);
        Ok(found.then_some(path))
    }

    fn keep_image(&self, staging: &str, digest: ImageDigest) -> Result<ImageDigest, Failure> {
        if self.find_image(&digest)?.is_some() {
            return Ok(digest);
        }
        let path = self.layout.staging().join(staging);
        let unpacked = need_subvolume(&path)?;
        self.layout.commit()?;
        self.intending(&Intent::Image { digest }, || {
            super::volumes::rename(&path, &self.layout.image(&digest), RenameFlags::NOREPLACE)?;
            self.layout.commit()?;
            sys::set_read_only(&unpacked.fd).doing("make an image read-only")
        })?;
        Ok(digest)
    }
}

/// Unpacks an archive into `place`; its digest.
async fn unpack(place: &Path, mut archive: BoxRead) -> Result<ImageDigest, ImageError> {
    let arguments = [
        "--extract",
        "--preserve-permissions",
        "--same-owner",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--file=-",
        "--directory",
    ]
    .map(OsStr::new);
    let arguments = [arguments.as_slice(), &[place.as_os_str()]].concat();
    let running = Running::confined("tar", &arguments, Stdio::piped(), Stdio::null());
    let mut running = running.map_err(bad)?;
    let mut stdin = running.child.stdin.take().ok_or_else(|| bad("tar has no input"))?;
    let (mut hash, mut chunk, mut accepts) = (Sha256::new(), vec![0; CHUNK], true);
    let mut zeros = 0;
    loop {
        let length = timeout(STALL_LIMIT, archive.read(&mut chunk)).await.map_err(bad)?.map_err(bad)?;
        if length == 0 {
            break;
        }
        hash.update(&chunk[..length]);
        zeros = match chunk[..length].iter().rposition(|byte| *byte != 0) {
            Some(last) => length - 1 - last,
            None => zeros + length,
        };
        // tar stops at the end mark; what follows still counts in the digest.
        accepts =
            accepts && timeout(STALL_LIMIT, stdin.write_all(&chunk[..length])).await.map_err(bad)?.is_ok();
    }
    drop(stdin);
    let status = timeout(STALL_LIMIT, running.child.wait()).await.map_err(bad)?.map_err(bad)?;
    if !status.success() {
        return Err(bad(format!("tar failed, {status}: {}", running.words())));
    }
    // tar takes an archive that is cut between two files for a whole one.
    if zeros < END_MARK {
        return Err(bad("it is cut off"));
    }
    Ok(ImageDigest::from_bytes(hash.finalize().into()))
}
