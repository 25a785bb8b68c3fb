//! Snapshots on their way to another host.

use std::fmt;

use cocalc_ids::{ProjectId, SnapshotName, VolumeUuid};
use serde::{Deserialize, Serialize};

use crate::stream::BoxRead;

/// Says what a stream holds. Travels before it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SendHeader {
    /// The backend whose stream this is.
    pub backend: String,
    /// Whose snapshot this is.
    pub project: ProjectId,
    /// Its name, there and here.
    pub name: SnapshotName,
    /// Its [`Snapshot::origin`](super::Snapshot::origin).
    pub origin: VolumeUuid,
    /// The snapshot it is a delta to, and that one's origin.
    pub base: Option<(SnapshotName, VolumeUuid)>,
    /// What the backend carries beside the stream, opaque to others; at most
    /// 4 KiB.
    pub extra: String,
    /// An estimate of the bytes in the stream, for people and for reserving
    /// space; 0 if there is none.
    #[serde(default)]
    pub estimated_bytes: u64,
    /// What the snapshot holds and neither the stream nor `extra` carries, in
    /// words for people; empty if nothing.
    #[serde(default)]
    pub left_out: Vec<String>,
}

/// How a snapshot is sent.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct SendOptions {
    /// As a delta to this snapshot, which the receiver must have.
    pub base: Option<SnapshotName>,
    /// Further snapshots that the receiver has, whose bytes the stream may
    /// refer to instead of carrying them.
    pub sources: Vec<SnapshotName>,
    /// The highest version of the stream format that the receiver takes, from
    /// its [`Capabilities::stream_version`](super::Capabilities); 0 for what
    /// every receiver takes.
    pub version_max: u32,
}

impl SendOptions {
    /// Whole, for any receiver.
    pub fn whole() -> Self {
        Self::default()
    }

    /// As a delta to `base`, if there is one, for any receiver.
    pub fn since(base: Option<&SnapshotName>) -> Self {
        Self { base: base.cloned(), ..Self::default() }
    }
}

/// A snapshot on its way to another host.
pub struct SendStream {
    /// What it holds.
    pub header: SendHeader,
    /// The bytes.
    pub reader: BoxRead,
}

impl fmt::Debug for SendStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendStream").field("header", &self.header).finish_non_exhaustive()
    }
}
