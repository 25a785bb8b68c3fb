//! Runs a proxy.

use std::process::ExitCode;

use cocalc_proxy::{Config, Error, Proxy};

fn main() -> ExitCode {
    cocalc_daemon::main("proxy", env!("CARGO_PKG_VERSION"), Config::validate, run)
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Error> {
    let proxy = Proxy::start(config).await?;
    proxy.run_until(cocalc_daemon::shutdown_signal()).await;
    Ok(())
}
