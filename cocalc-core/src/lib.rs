//! The contracts of CoCalc: what storage, runners, authentication, routing,
//! connectors, backups and the bus promise, and the pure state machines that
//! decide who owns a project.
//!
//! This crate opens no socket and spawns no process. Backends live in crates
//! of their own and depend on this one; an embedder hands them over as
//! `Arc<dyn …>` and replaces one without touching the rest.
//!
//! | module | what it is |
//! |---|---|
//! | [`storage`], [`runner`], [`auth`], [`router`], [`connector`], [`bus`], [`backups`], [`clock`], [`wake`] | the traits, one file each |
//! | [`subject`] | subjects and patterns of the bus |
//! | [`control`] | the messages between master, hosts and proxies |
//! | [`grant`] | what a host may run: epochs, grants, freezes |
//! | [`moves`] | the move of a project as a pure state machine, and its driver |
//! | [`apps`] | the apps of a project: what it declares, and their supervision |
//! | [`activity`] | who uses a project, when it is idle, why it runs or was stopped |
//! | [`snapshots`] | automatic snapshots: schedule, retention, and the keeper that does it |
//! | [`memory`] | strict in-memory backends, for tests and for embedders' tests |

pub mod activity;
pub mod admission;
pub mod apps;
pub mod auth;
pub mod backups;
pub mod bus;
pub mod clock;
pub mod connector;
pub mod control;
pub mod error;
pub mod grant;
pub mod images;
pub mod memory;
pub mod moves;
pub mod router;
pub mod runner;
pub mod snapshots;
pub mod storage;
pub mod stream;
pub mod subject;
pub mod wake;

pub use cocalc_ids as ids;
pub use error::{BoxError, chain};
