//! Project volumes on Btrfs, and in plain directories.

pub mod btrfs;
mod child;
mod failure;
mod locks;
pub mod loopback;
mod walk;

pub use btrfs::{Btrfs, BtrfsBuilder, ImageError, OpenError, Probe, QuotaKind, StreamGuard, probe};
