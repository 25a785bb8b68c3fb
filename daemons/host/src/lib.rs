//! A project-host: stores and runs projects, and lets their users in.
//!
//! [`Host`] composes storage, runner, grants, authentication, HTTP, SSH and the
//! channel to its peers; `cocalc-host` is a thin program on it. An integrator
//! brings storage and runner of their own with [`Backends`], and runs a host
//! inside their own server. It never mints tokens and never decides who owns a
//! project: the master does.
//!
//! ```no_run
//! use cocalc_host::{Config, Host};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let config: Config = cocalc_daemon::config::load("host", Some("host.toml".as_ref()))?;
//!     let host = Host::start(config).await?;
//!     host.run_until(cocalc_daemon::shutdown_signal()).await;
//!     Ok(())
//! }
//! ```

mod apps;
mod backends;
mod backups;
mod config;
mod deaths;
mod drill;
mod endpoints;
mod files;
mod host;
mod idle;
mod images;
mod inbox;
mod inside_keys;
mod lifecycle;
mod limits;
mod names;
mod orphans;
mod peers;
mod ran;
mod registrar;
mod secrets;
mod startup;
mod visits;
mod wake;
mod watch;
mod wave;

pub use backends::Backends;
pub use cocalc_daemon::start::Error;
pub use config::{
    BackupSettings, Config, Networks, ProjectNetwork, RunnerKind, StorageKind, UnenforceableLimits,
};
pub use host::Host;
pub use idle::Idle;
pub use images::{ImageSettings, Images};
pub use lifecycle::Lifecycle;
pub use limits::HostLimits;
pub use startup::Startup;
