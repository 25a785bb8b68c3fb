//! Runs a project-host.

use std::{pin::pin, process::ExitCode};

use cocalc_daemon::HangUps;
use cocalc_host::{Config, Error, Host};

/// Requests and packets are short-lived memory of several threads: of the C library's
/// allocator an SSH upload takes a third more processor time, and a request a quarter.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cocalc_daemon::main("host", env!("CARGO_PKG_VERSION"), Config::validate, run)
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Error> {
    // Looked at first, which registers them, so that no signal is missed.
    let hang_ups = HangUps::watch();
    let mut shutdown = pin!(cocalc_daemon::shutdown_signal());
    let host = tokio::select! {
        biased;
        () = &mut shutdown => return Ok(()),
        started = Host::start(config) => started?,
    };
    let tls = host.tls();
    tokio::select! {
        () = host.run_until(shutdown) => {}
        () = hang_ups.each(async || {
            tracing::info!("SIGHUP: the certificate is read again; all else is read at the next start");
            if let Some(tls) = &tls {
                tls.look_again().await;
            }
        }) => {}
    }
    Ok(())
}
