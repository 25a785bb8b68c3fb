//! What a worker may take.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// What a worker may take from the machine, and how long.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// How far it steps back for others on the processor, from 0 to 19.
    /// Default: 10.
    pub nice: i8,
    /// Most memory it may have for data, in bytes; beyond it the call fails.
    /// Measured backups of 20,000 files took under 200 MB. Default: 1 GiB.
    pub memory_bytes_max: u64,
    /// Bytes per second to and from the repository, in each direction. Default:
    /// no limit.
    pub bytes_per_sec_max: Option<u64>,
    /// Below which control group each worker gets one of its own, relative to
    /// the root of the tree, or of each tree in version 1. It is made if it is
    /// missing. Where that cannot be, niceness and the limit on memory remain.
    /// `None` for no group. Default: `cocalc-backup`.
    pub control_group: Option<PathBuf>,
    /// Its part of the processor where it is short, 1 to 10,000, where others
    /// have 100. Needs a control group. Default: 20.
    pub cpu_weight: u16,
    /// Its part of the disk, likewise, where the disk's scheduler has parts.
    /// Default: 20.
    pub io_weight: u16,
    /// How long a call may take. Must be less than the grace of a prune, since
    /// a backup may count on data that a prune has marked. Default: 12 hours.
    pub time_max: Duration,
    /// How long one request to an object store is tried again. Default: two
    /// minutes.
    pub retry_max: Duration,
    /// How long a request to an object store may go without an answer.
    /// Default: one minute.
    pub request_max: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            nice: 10,
            memory_bytes_max: 1 << 30,
            bytes_per_sec_max: None,
            control_group: Some(PathBuf::from("cocalc-backup")),
            cpu_weight: 20,
            io_weight: 20,
            time_max: Duration::from_hours(12),
            retry_max: Duration::from_mins(2),
            request_max: Duration::from_mins(1),
        }
    }
}
