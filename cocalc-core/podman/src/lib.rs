//! The podman and process runners of CoCalc.

mod agent;
mod cgroup;
mod command;
pub mod image;
mod kernel;
mod mounts;
mod net;
mod pidfd;
mod podman;
mod probe;
mod process;
mod signals;

pub use cgroup::CgroupKind;
pub use net::Outbound;
pub use podman::{
    BuildError, Images, ParseTimeError, Podman, PodmanBuilder, SLOTS, UID_BASE, cleanup_instance, parse_time,
};
pub use probe::{Lack, RunnerProbe, probe};
pub use process::ProcessRunner;
