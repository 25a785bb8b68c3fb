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
    /// A control group that the worker joins before it opens anything. It must
    /// exist; what it limits is the operator's choice. Default: none.
    pub control_group: Option<PathBuf>,
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
            control_group: None,
            time_max: Duration::from_hours(12),
            retry_max: Duration::from_mins(2),
            request_max: Duration::from_mins(1),
        }
    }
}
