//! Where a repository is, and what opens it.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use crate::key::RepositoryKey;

/// A text that never shows in a log.
#[derive(Clone, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Where a repository is. All are laid out as restic lays out its own.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Location {
    /// A directory. Its parent must exist, so that a disk that is not mounted
    /// is an error and not a new repository.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// Amazon S3, or what speaks its protocol.
    S3(S3),
    /// Google Cloud Storage.
    Gcs(Gcs),
}

/// A place in an S3 bucket.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct S3 {
    /// The bucket.
    pub bucket: String,
    /// What all keys of the repository begin with; no `/` at either end.
    pub prefix: String,
    /// The region, for instance `eu-central-1`.
    pub region: String,
    /// Another server than Amazon's. Plain `http` is allowed here only.
    pub endpoint: Option<String>,
    /// Whose requests these are.
    pub access_key_id: String,
    /// What signs them.
    pub secret_access_key: Secret,
    /// Belongs to short-lived credentials.
    pub session_token: Option<Secret>,
}

/// A place in a bucket of Google Cloud Storage.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Gcs {
    /// The bucket.
    pub bucket: String,
    /// What all names of the repository begin with; no `/` at either end.
    pub prefix: String,
    /// Another server than Google's. Plain `http` is allowed here only.
    pub endpoint: Option<String>,
    /// What is shown to it.
    pub credentials: GcsCredentials,
}

/// What is shown to Google Cloud Storage.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GcsCredentials {
    /// A short-lived access token, down-scoped to the prefix: what a host gets.
    Token(Secret),
    /// The key of a service account, as Google gives it out.
    ServiceAccount(Secret),
    /// Nothing: an emulator.
    Anonymous,
}

impl Location {
    /// How restic and rustic name it.
    pub fn restic(&self) -> String {
        match self {
            Self::Directory { path } => path.display().to_string(),
            Self::S3(s3) => {
                let server =
                    s3.endpoint.clone().unwrap_or_else(|| format!("https://s3.{}.amazonaws.com", s3.region));
                format!("s3:{}/{}/{}", server.trim_end_matches('/'), s3.bucket, s3.prefix)
            }
            Self::Gcs(gcs) => format!("gs:{}:/{}", gcs.bucket, gcs.prefix),
        }
    }
}

/// A repository and its key.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Repository {
    /// Where it is.
    pub location: Location,
    /// What encrypts it.
    pub key: RepositoryKey,
    /// Whether other projects have backups in it, too.
    #[serde(default)]
    pub shared: bool,
    /// A second place, which [`Rustic::mirror`](crate::Rustic::mirror) fills and
    /// from which a repair takes what is damaged.
    #[serde(default)]
    pub mirror: Option<Location>,
}

impl Repository {
    /// A project's own, without a mirror.
    pub fn new(location: Location, key: RepositoryKey) -> Self {
        Self { location, key, shared: false, mirror: None }
    }
}
