//! Typed identifiers, epochs and names, for every CoCalc crate.
//!
//! An identifier can only be built by parsing, has exactly one spelling, and
//! is therefore safe to use as a path name, a cache key or a bus subject. This
//! crate has no async code and does no I/O.
//!
//! ```
//! use cocalc_ids::{Epoch, ProjectId};
//!
//! let project: ProjectId = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b".parse()?;
//! assert_eq!(project.to_string(), "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b");
//! // One spelling only: upper case is refused.
//! assert!("0A7B1C9E-4F52-4A8E-9D3B-1C2D3E4F5A6B".parse::<ProjectId>().is_err());
//! assert!(Epoch::FIRST < Epoch::FIRST.next());
//! # Ok::<(), cocalc_ids::ParseIdError>(())
//! ```

mod access;
mod digest;
mod epoch;
mod name;
mod restrictions;
mod time;
mod tree_path;
mod uuid_id;

pub use access::{Action, Role, Scope};
pub use digest::ImageDigest;
pub use epoch::Epoch;
pub use name::{HostName, ProjectAlias, SnapshotName};
pub use restrictions::{Ports, Restrictions};
pub use time::Timestamp;
pub use tree_path::TreePath;
pub use uuid_id::{
    AccountId, HostId, KeyId, MoveId, OperationId, ProjectId, ProxyId, ReceiptId, SessionId, VolumeUuid,
};

/// Says that a text is not the one canonical spelling of an identifier.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a valid {kind}: expected {expected}")]
#[non_exhaustive]
pub struct ParseIdError {
    /// What was being parsed, for instance `project id`.
    pub kind: &'static str,
    /// The accepted form, for people.
    pub expected: &'static str,
}
