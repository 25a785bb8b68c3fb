//! SSH into projects: the server at a host and at a proxy, what they say to
//! each other, and a small client.
//!
//! `ssh <project id>@host` opens a shell in that project. The user name is the
//! project ([`project_of_user`]), the key, the certificate of the master or the
//! connect token says who it is, and
//! a [`Gate`] decides: [`LocalGate`] on a host, by its own rights;
//! [`RemoteGate`] on a proxy, by asking the project's host ([`SshPeers`]).
//! Shells, commands with exact exit status, terminals, sftp, scp, rsync and
//! local port forwarding work as with OpenSSH's own server. An
//! [`SshIngress`] ends a connection as soon as its
//! [`Admission`](cocalc_core::auth::Admission) is revoked.
//!
//! What it is not: it runs nothing itself (that is a
//! [`Runner`](cocalc_core::runner::Runner)) and knows no rights (that is an
//! [`Auth`](cocalc_core::auth::Auth)). What has to listen or connect inside a
//! project is a process there ([`Tool`](cocalc_core::runner::Tool)): remote
//! forwarding, Unix sockets, agent and X11.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//!
//! use cocalc_core::{auth::Auth, router::Router, runner::Runner, wake::Wake};
//! use cocalc_ssh::{HostKeys, LocalGate, SshIngress};
//!
//! async fn serve(
//!     auth: Arc<dyn Auth>,
//!     router: Arc<dyn Router>,
//!     runner: Arc<dyn Runner>,
//!     wake: Arc<dyn Wake>,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let keys = HostKeys::load_or_create(Path::new("ssh_host_ed25519_key"))?;
//!     let gate = LocalGate::new(auth, router, Arc::new(runner)).wake(wake);
//!     let ingress = SshIngress::builder(Arc::new(gate), keys).build();
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:7811").await?;
//!     ingress.serve(listener, std::future::pending()).await;
//!     Ok(())
//! }
//! ```
//!
//! # Flow control
//!
//! The protocol library grants credit when data arrives, not when it is
//! consumed, and has one amount for the whole connection: left alone, one
//! process that does not read stops every channel of its connection. Here
//! every channel has a queue of its own, nothing ever waits in the
//! connection's loop, and the amount is chosen anew after each grant, so that
//! the next packet's sender gets what is meant for it. A channel whose process
//! does not read is stopped at its client, with some MiB waiting here, for
//! as long as it takes; the others go on, each with a window in a round trip
//! or two. What all queues hold together is bounded
//! ([`SshIngressBuilder::input_bytes_max`]): there, of the project that keeps most,
//! the channel is closed that reads least, and its user told; so it is at 64 MiB of
//! one connection, and at 32 MiB of one channel, which a client reaches by ignoring
//! its credit. Between proxy and host every process
//! and forwarded port has a stream of its own, with the kernel's flow control.
//! Output is never read from a process before its client has credit for it.
//!
//! # Limits that are known
//!
//! The library keeps some kilobytes of each closed channel while a connection
//! lives, so one connection opens 10,000 channels at most; clients then open
//! another.
//!
//! It answers a `break` (RFC 4335) itself, with a failure, which that document
//! foresees for terminals that have no line to break, as these have none.
//!
//! It verifies signatures of security keys (`sk-…`), which their flags and counter
//! are part of, but tells nobody the flags: a signature that was made without a
//! touch is as good as one with. That a touch, or a PIN, is demanded is up to the
//! key, and keys that are listed with `verify-required` or `no-touch-required` are
//! refused, because neither could be kept.

mod algorithms;
mod brief;
mod channel;
pub mod client;
mod connection;
mod drive;
mod environment;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod host_keys;
mod ingress;
mod input;
mod line;
mod peers;
mod penalties;
mod remote;
mod reverse;
mod sessions;
mod user;
mod wire;
mod witness;

pub use gate::{Access, Attempt, Gate, LocalGate, Login, Moved, Names, Passage, Refusal, RemoteGate};
pub use host_keys::{HostCertificateError, HostKeyError, HostKeyType, HostKeys};
pub use ingress::{SshIngress, SshIngressBuilder};
pub use peers::SshPeers;
pub use sessions::Sessions;
pub use user::project_of_user;
pub use witness::{Visit, Witness};
