//! In-memory backends: the strictest reading of each contract.

pub mod bus;
pub mod clock;
pub mod router;
pub mod runner;
pub mod storage;
