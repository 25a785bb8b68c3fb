//! Runs the master daemon.

use std::process::ExitCode;

use cocalc_master::{Config, Error, Master};

fn main() -> ExitCode {
    cocalc_daemon::main("master", env!("CARGO_PKG_VERSION"), Config::validate, run)
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Error> {
    // Registered before anything is opened, so that no signal is missed.
    let shutdown = cocalc_daemon::shutdown_signal();
    let master = Master::start(config).await?;
    master.run_until(shutdown).await;
    Ok(())
}
