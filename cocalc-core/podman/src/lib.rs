//! The podman and process runners of CoCalc.
//!
//! [`Podman`] runs each project as a podman container of its own: its root is an
//! overlay of an image and a layer in the project's own volume, both through
//! idmapped mounts, so that what root installs inside is stored with canonical
//! owners and moves along, while the project's ids on the host are its own. It
//! needs root, podman, an OCI runtime, `ip` and `nft`; [`probe`] says what is
//! missing. [`ProcessRunner`] needs nothing and isolates nothing: it is for
//! developing. [`image::build_tar`] builds the standard project image.
//!
//! It is not a container engine, pulls no images, and keeps no projects: where
//! volumes and images are is told by its caller.
//!
//! ```no_run
//! use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};
//!
//! use cocalc_core::{
//!     ids::{Epoch, HostId, ImageDigest, ProjectId},
//!     runner::{ExecRequest, Isolation, Limits, ProjectSpec, Runner},
//! };
//! use cocalc_podman::Podman;
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let host = HostId::random();
//! let images = |digest: ImageDigest| Some(PathBuf::from(format!("/volume/images/{digest}")));
//! let podman = Podman::builder(host, "/var/lib/my-host/runner", Arc::new(images)).build().await?;
//!
//! let project = ProjectId::random();
//! let spec = ProjectSpec {
//!     project,
//!     epoch: Epoch::FIRST,
//!     volume: format!("/volume/projects/{project}").into(),
//!     image: Some(ImageDigest::from_bytes([0; 32])),
//!     slot: 0,
//!     limits: Limits { memory_bytes: Some(2 << 30), ..Limits::default() },
//!     env: BTreeMap::new(),
//!     isolation: Isolation::default(),
//! };
//! podman.start(&spec).await?;
//! let shell = podman.exec(project, ExecRequest::default()).await?;
//! let web = podman.dial(project, 8080).await?;
//! podman.stop(project, Duration::from_secs(10)).await?;
//! # Ok(()) }
//! ```
//!
//! # What a project gets
//!
//! - 65,536 host uids from [`UID_BASE`]` + slot * 65536`; root inside is none of
//!   the host's users. There are [`SLOTS`] such ranges for those that run and those
//!   that are ready to; the one that was used longest ago makes room.
//! - Twelve capabilities over its own files and processes, and limits of
//!   processes, memory, CPU and open files. It sees no control groups.
//! - podman's default seccomp filter, which also refuses mounts, keyrings, the
//!   kernel's log, namespaces of its own (so no containers in it, and no sandboxes
//!   that need them), making Btrfs subvolumes, unusual families of sockets, and
//!   with those `socketcall`: 32-bit programs that need it have no network.
//! - Of `/sys` the processors and the pages.
//! - A network namespace with one address. It reaches what its policy allows
//!   ([`NetworkPolicy`](cocalc_core::runner::NetworkPolicy)), but no address of the
//!   host, no other project, nothing link-local and no private network unless the
//!   host allows it ([`Fences`]). Names are resolved at 127.0.0.11, by the servers
//!   that the host itself asks. The kernel's IPv4 forwarding is turned on for this.
//!   A firewall of the host that drops what is forwarded drops it here too.
//! - A first process of ours, which starts all others: what runs through
//!   [`exec`](cocalc_core::runner::Runner::exec) is its child and has its
//!   limits, filter and capabilities.
//!
//! Several hosts can run on one machine: each has its own
//! [`machine_index`](PodmanBuilder::machine_index). [`cleanup_instance`] removes
//! whatever one of them left, and [`leftovers`] lists it.

mod agent;
mod cgroup;
mod command;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
mod kernel;
mod mounts;
mod net;
mod oom;
mod pidfd;
mod podman;
mod probe;
mod process;
mod signals;
#[path = "../helper/users.rs"]
mod users;

pub use agent::HELPER;
pub use cgroup::CgroupKind;
pub use net::Fences;
pub use podman::{
    BuildError, Images, ParseTimeError, Podman, PodmanBuilder, SLOTS, UID_BASE, Unenforceable,
    cleanup_instance, leftovers, parse_time,
};
pub use probe::{Lack, RunnerProbe, probe};
pub use process::ProcessRunner;
