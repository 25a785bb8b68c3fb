//! What of a connection ends by itself, and soon: what a server that shuts down
//! waits for.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

/// For so long nothing brief has gone on, and what is left would not end by
/// itself. A client that has just logged in opens its channel within it.
const QUIET: Duration = Duration::from_secs(1);

/// Counts a connection's commands without a terminal.
#[derive(Clone, Debug)]
pub(crate) struct Briefs(Arc<watch::Sender<usize>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(crate) struct Brief(Briefs);

impl Default for Briefs {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Briefs {
    /// One begins.
    pub(crate) fn enter(&self) -> Brief {
        self.0.send_modify(|count| *count += 1);
        Brief(self.clone())
    }

    /// Resolves when there has been none for a second.
    pub(crate) async fn quiet(&self) {
        let mut count = self.0.subscribe();
        loop {
            // The sender is here.
            let _ = count.wait_for(|count| *count == 0).await;
            if timeout(QUIET, count.wait_for(|count| *count > 0)).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Brief {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_quiet_a_second_after_the_last_command() {
        let briefs = Briefs::default();
        let began = Instant::now();
        briefs.quiet().await;
        assert_eq!(began.elapsed(), QUIET);
        let brief = briefs.enter();
        let next = briefs.clone();
        tokio::spawn(async move {
            sleep(Duration::from_secs(5)).await;
            drop(brief);
            sleep(QUIET / 2).await;
            let another = next.enter();
            sleep(Duration::from_secs(5)).await;
            drop(another);
        });
        let began = Instant::now();
        briefs.quiet().await;
        assert_eq!(began.elapsed(), Duration::from_secs(10) + QUIET / 2 + QUIET);
    }
}
