//! What Btrfs storage does with volumes as a whole. Needs root, loop devices,
//! btrfs-progs and a kernel with simple quotas (6.7).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod changed;
mod faults;
mod footprint;
mod images;
mod opening;
mod quota;
mod stores;
mod trash;
