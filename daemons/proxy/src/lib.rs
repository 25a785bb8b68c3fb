//! The way into projects for users who cannot reach their host.
//!
//! [`Proxy`] finds a project's host and carries HTTP, WebSocket and SSH to it
//! over TLS that is pinned to the host's identity key. It turns away what its
//! host would certainly refuse, and decides nothing: the host checks again, and
//! redeems.
//!
//! ```no_run
//! use cocalc_proxy::{Config, Proxy};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let config: Config = cocalc_daemon::config::load("proxy", Some("proxy.toml".as_ref()))?;
//!     let proxy = Proxy::start(config).await?;
//!     proxy.run_until(cocalc_daemon::shutdown_signal()).await;
//!     Ok(())
//! }
//! ```

mod config;
mod endpoints;
mod limits;
mod names;
mod pinned;
mod proxy;
mod registrar;

pub use cocalc_daemon::start::Error;
pub use config::Config;
pub use limits::ProxyLimits;
pub use proxy::Proxy;
