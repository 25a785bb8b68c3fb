//! What the daemons share: configuration from a TOML file and the
//! environment, logging, signals, exit codes, and files that survive a crash.
//!
//! ```
//! #[derive(Debug, serde::Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct Config {
//!     listen: String,
//!     #[serde(default)]
//!     lease_ms: u64,
//! }
//!
//! let vars = [("COCALC_DEMO_LEASE_MS".to_owned(), "3000".to_owned())];
//! let config: Config =
//!     cocalc_daemon::config::parse("demo", "listen = '127.0.0.1:0'", vars)?;
//! assert_eq!((config.listen.as_str(), config.lease_ms), ("127.0.0.1:0", 3000));
//! # Ok::<(), cocalc_daemon::config::Error>(())
//! ```

pub mod acme;
pub mod bus;
pub mod certificate;
pub mod certify;
pub mod config;
pub mod ending;
pub mod files;
pub mod join;
pub mod probe;
mod sockets;
pub mod start;
pub mod time;
pub mod tls;

use std::process::ExitCode;

pub use cocalc_core::chain;

/// Wrong configuration or usage, found before anything was opened.
pub const EXIT_CONFIG: u8 = 2;

/// Logs to standard error, filtered by `COCALC_LOG` (default `info`).
pub fn init_tracing() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("COCALC_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A second subscriber in one process is an embedder's own; theirs stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}

/// Resolves when the process is asked to end, by SIGTERM or SIGINT.
pub async fn shutdown_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        // Without signal handlers the default action ends the process.
        _ => std::future::pending().await,
    }
}

/// SIGHUP, which asks a daemon to read again what it can while it runs. Made at
/// the start: before it, the signal ends the process.
#[derive(Debug)]
pub struct HangUps(Option<tokio::signal::unix::Signal>);

impl HangUps {
    /// From now on the signal does not end the process.
    pub fn watch() -> Self {
        let watched = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup());
        Self(watched.map_err(|error| tracing::warn!(%error, "SIGHUP is not heard")).ok())
    }

    /// Calls `act` at each, for as long as it is polled.
    pub async fn each(mut self, act: impl AsyncFn()) {
        while let Some(signal) = &mut self.0 {
            match signal.recv().await {
                Some(()) => act().await,
                None => self.0 = None,
            }
        }
        std::future::pending().await
    }
}

/// Runs a daemon's `main`: arguments, configuration, then `run`.
///
/// `--config FILE` names the TOML file (default: none, environment only),
/// `--check-config` stops after validation, `--version` and `--help` answer.
/// Listening sockets that a supervisor holds (`LISTEN_FDS`) are taken over.
pub fn main<C, E>(
    name: &str,
    version: &str,
    validate: impl FnOnce(&C) -> Result<(), String>,
    run: impl FnOnce(C) -> Result<(), E>,
) -> ExitCode
where
    C: serde::de::DeserializeOwned,
    E: std::error::Error + 'static,
{
    init_tracing();
    let arguments = match config::Arguments::parse(name, version, std::env::args().skip(1)) {
        Ok(config::Parsed::Run(arguments)) => arguments,
        Ok(config::Parsed::Answer(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("cocalc-{name}: {error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    let config = match config::load::<C>(name, arguments.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("cocalc-{name}: invalid configuration: {}", chain(&error));
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if let Err(reason) = validate(&config) {
        eprintln!("cocalc-{name}: invalid configuration: {reason}");
        return ExitCode::from(EXIT_CONFIG);
    }
    if arguments.check_config {
        println!("cocalc-{name}: the configuration is valid");
        return ExitCode::SUCCESS;
    }
    if let Err(reason) = sockets::adopt() {
        eprintln!("cocalc-{name}: {reason}");
        return ExitCode::from(EXIT_CONFIG);
    }
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %chain(&error), "{name} stopped");
            eprintln!("cocalc-{name}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
