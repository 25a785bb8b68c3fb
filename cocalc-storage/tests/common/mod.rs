//! Files that are hard to carry, from the contract suite, and a way to cut the
//! power.

#![allow(unused_imports, dead_code, reason = "each test takes what it needs")]

pub(crate) mod power;

pub(crate) use cocalc_testkit::storage::{manifest, plant, set_time};
