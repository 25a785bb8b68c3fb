//! What master and hosts say to each other about images.
//!
//! Work that takes long is begun and then asked after, by the operation that
//! names it: a repeated call finds what it began. A host that was restarted
//! begins anew.

use std::collections::BTreeSet;

use cocalc_ids::{HostId, ImageDigest, OperationId, Timestamp};
use serde::{Deserialize, Serialize};

use super::CommandError;

/// What the master asks a host to do about its images.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "about_images", rename_all = "snake_case")]
pub enum ImageRequest {
    /// Begin this work unless it has been begun, and say how far it is when
    /// there is news, or after a while.
    Work {
        /// For which operation.
        operation: OperationId,
        /// What to do.
        task: ImageTask,
        /// How long to wait for news, in milliseconds.
        wait_ms: u64,
    },
    /// End this work. It leaves nothing behind, and may just have been done.
    Cancel {
        /// Of which operation.
        operation: OperationId,
    },
    /// Let another host have an image, for a while.
    Offer {
        /// Which image.
        digest: ImageDigest,
        /// Who may fetch it.
        to: HostId,
        /// For how long from now, in seconds.
        life_secs: u64,
    },
    /// Change what is noted of an image.
    Note {
        /// Which image.
        digest: ImageDigest,
        /// Whether it stays, used or not; as it is if `None`.
        pinned: Option<bool>,
        /// A name that it gets, and another image loses.
        name: Option<String>,
    },
    /// Delete what no project has used for so long.
    Prune {
        /// For how long, in seconds.
        unused_secs: u64,
        /// Only say what would be deleted.
        dry_run: bool,
    },
}

/// How a host comes by an image.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum ImageTask {
    /// From a registry.
    Pull {
        /// An OCI reference, for instance `docker.io/library/debian:12`.
        reference: String,
        /// What it is called here.
        name: Option<String>,
    },
    /// From Debian packages.
    Build {
        /// The recipe, as text.
        recipe: String,
        /// What it is called here.
        name: Option<String>,
    },
    /// From a file in the host's directory for that.
    Import {
        /// The file's name there.
        file: String,
        /// What it is called here.
        name: Option<String>,
    },
    /// From another host, which was told to offer it.
    Fetch {
        /// Which image.
        digest: ImageDigest,
        /// From whom.
        from: HostId,
    },
}

/// What a host answers about its images.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "about_images", rename_all = "snake_case")]
pub enum ImageReply {
    /// The work goes on.
    Working {
        /// Of which operation.
        operation: OperationId,
        /// What is being done, for people.
        phase: String,
        /// Bytes that have come.
        bytes: u64,
        /// About how many there will be, if anybody knows.
        bytes_expected: Option<u64>,
    },
    /// The work is done.
    Done {
        /// Of which operation.
        operation: OperationId,
        /// The image that it brought.
        image: ImageReport,
    },
    /// There is no such work, or it has ended now.
    Cancelled {
        /// Of which operation.
        operation: OperationId,
    },
    /// It may be fetched.
    Offered {
        /// Which image.
        digest: ImageDigest,
        /// By whom.
        to: HostId,
    },
    /// What is noted of it now.
    Noted(ImageReport),
    /// What was deleted, or would be.
    Pruned {
        /// Which.
        images: Vec<ImageReport>,
    },
    /// It was not done.
    Error(CommandError),
}

/// An image as one host has it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ImageReport {
    /// Its digest.
    pub digest: ImageDigest,
    /// What people call it.
    #[serde(default)]
    pub names: BTreeSet<String>,
    /// Where it came from.
    #[serde(default)]
    pub sources: BTreeSet<String>,
    /// Bytes of its files; 0 if nobody has counted.
    #[serde(default)]
    pub bytes: u64,
    /// Whether it stays, used or not.
    #[serde(default)]
    pub pinned: bool,
    /// How many projects on that host have it as their image.
    #[serde(default)]
    pub projects: u64,
    /// When a project last used it there.
    #[serde(default)]
    pub used: Option<Timestamp>,
    /// When it came there.
    #[serde(default)]
    pub imported: Option<Timestamp>,
}
