//! What the host itself serves of a project to a browser: the project page and
//! its parts. Nothing here decides who may see it; `host/page.rs` does.

pub(crate) mod assets;
pub(crate) mod ports;
pub(crate) mod ring;
pub(crate) mod socket;
pub(crate) mod terminals;

pub use assets::{SHARED_SCRIPT, SHARED_STYLE};
pub use terminals::TerminalLimits;
