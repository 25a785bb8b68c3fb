//! Files that are hard to carry, from the contract suite.

#![allow(unused_imports, reason = "each test takes what it needs")]

pub(crate) use cocalc_testkit::storage::{manifest, plant, set_time};
