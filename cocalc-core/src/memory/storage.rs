//! Volumes in memory.
