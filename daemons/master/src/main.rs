//! Runs the master daemon.

use std::process::ExitCode;

use cocalc_master::{Config, Error, Master};

fn main() -> ExitCode {
    cocalc_daemon::main("master", env!("CARGO_PKG_VERSION"), Config::validate, run)
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Error> {
    let hang_ups = cocalc_daemon::HangUps::watch();
    // Looked at first, which registers it, so that no signal is missed.
    let mut shutdown = std::pin::pin!(cocalc_daemon::shutdown_signal());
    let master = tokio::select! {
        biased;
        () = &mut shutdown => return Ok(()),
        started = Master::start(config) => started?,
    };
    let tls = master.tls();
    tokio::select! {
        () = master.run_until(shutdown) => {}
        () = hang_ups.each(async || {
            tracing::info!("SIGHUP: the certificate is read again; all else is read at the next start");
            if let Some(tls) = &tls {
                tls.look_again().await;
            }
        }) => {}
    }
    Ok(())
}
