//! Runs a project-host.

use std::process::ExitCode;

use cocalc_host::{Config, Error, Host};

fn main() -> ExitCode {
    cocalc_daemon::main("host", env!("CARGO_PKG_VERSION"), Config::validate, run)
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Error> {
    let host = Host::start(config).await?;
    host.run_until(cocalc_daemon::shutdown_signal()).await;
    Ok(())
}
