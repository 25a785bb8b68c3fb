//! Project volumes on Btrfs, and in plain directories.
