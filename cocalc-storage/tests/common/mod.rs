//! Files that are hard to carry, from the contract suite.

pub(crate) use cocalc_testkit::storage::{manifest, plant, set_time};
