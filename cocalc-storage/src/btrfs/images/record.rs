//! What is noted of an image.

use std::{
    collections::BTreeSet,
    fs, io,
    path::PathBuf,
    sync::{MutexGuard, PoisonError},
};

use cocalc_core::ids::{ImageDigest, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    btrfs::{Store, layout},
    failure::{Doing as _, Failure},
};

/// What is noted of an image on one host. Nothing of it is part of the digest.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ImageRecord {
    /// What people call it, for instance `debian:12`.
    pub names: BTreeSet<String>,
    /// Where it came from: `tar:sha256:…` for an archive of these bytes,
    /// `docker.io/library/debian@sha256:…` for what was pulled.
    pub sources: BTreeSet<String>,
    /// Bytes of all its files together, holes counted; 0 if nobody has counted.
    pub bytes: u64,
    /// How many names there are in it.
    pub names_in_it: u64,
    /// When it came to this host.
    pub imported: Option<Timestamp>,
    /// When a project last used it here.
    pub used: Option<Timestamp>,
    /// Whether it stays, used or not.
    pub pinned: bool,
}

impl ImageRecord {
    /// Of an image that comes now.
    pub(super) fn of_source(source: String) -> Self {
        Self { sources: [source].into(), imported: Some(Timestamp::now()), ..Self::default() }
    }

    /// Adds what is noted of the same image that came once more.
    pub(super) fn add(&mut self, other: Self) {
        self.names.extend(other.names);
        self.sources.extend(other.sources);
        if self.bytes == 0 {
            (self.bytes, self.names_in_it) = (other.bytes, other.names_in_it);
        }
        self.pinned |= other.pinned;
    }
}

impl Store {
    /// One change of records and images at a time.
    pub(super) fn images_turn(&self) -> MutexGuard<'_, ()> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record_path(&self, digest: &ImageDigest) -> PathBuf {
        self.layout.images().join(format!("{digest}.json"))
    }

    /// What is noted; nothing, if that cannot be read: it is not worth an
    /// image.
    pub(super) fn read_record(&self, digest: &ImageDigest) -> Result<ImageRecord, Failure> {
        match fs::read(self.record_path(digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ImageRecord::default()),
            Err(error) => Err(error).doing("read what is noted of an image"),
            Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(%digest, %error, "what is noted of an image cannot be read");
                ImageRecord::default()
            })),
        }
    }

    pub(super) fn write_record(&self, digest: &ImageDigest, record: &ImageRecord) -> Result<(), Failure> {
        let text = serde_json::to_vec(record).map_err(|error| Failure::Wrong(error.to_string()))?;
        layout::write_atomically(&self.record_path(digest), &text).doing("note something of an image")?;
        self.layout.commit()
    }

    pub(super) fn remove_record(&self, digest: &ImageDigest) -> Result<(), Failure> {
        match fs::remove_file(self.record_path(digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.doing("remove what is noted of an image"),
        }
    }
}
