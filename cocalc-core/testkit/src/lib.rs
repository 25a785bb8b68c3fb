//! Contract suites, models and fault wrappers for CoCalc backends.
//!
//! Each suite is an ordinary async function that a backend's own test calls;
//! it panics with the broken promise.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a suite reports a broken promise by panicking")]

pub mod auth_sim;
pub mod backups;
pub mod bus;
pub mod executable;
pub mod faults;
pub mod router;
pub mod runner;
pub mod sim;
pub mod storage;

pub use cocalc_core::memory::clock::ManualClock;
