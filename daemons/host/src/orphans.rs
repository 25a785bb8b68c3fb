//! Removes what runs here of projects that are not this host's, and ends what may not
//! run any more.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    grant::{Ledger, sweep_orphans},
    moves::host::MoveHost,
    runner::Runner,
};

/// How often it is looked for them: a runner may hear late of what is there.
const INTERVAL: Duration = Duration::from_secs(60);

/// Looks for them until the future is dropped.
pub(crate) async fn keep(ledger: Ledger, moves: MoveHost, runner: Arc<dyn Runner>) {
    loop {
        sweep_orphans(&ledger, &*runner).await;
        // A stop may have failed when its right to run ended.
        moves.stop_what_may_not_run().await;
        tokio::time::sleep(INTERVAL).await;
    }
}
