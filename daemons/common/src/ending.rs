//! How a daemon ends: it says so, takes nothing new, lets what is open end, and
//! closes the rest.

use std::time::Duration;

use serde::Deserialize;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// The longest of both times, in seconds.
const SECS_MAX: u16 = 3600;

/// The table `[drain]` of a daemon's configuration.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Drain {
    /// How long it goes on as before once it was asked to end, but for `/readyz`
    /// which is 503: for load balancers that ask there and take a while. In
    /// seconds, at most 3600. Default: 0.
    pub delay_secs: u16,
    /// How long requests and short commands that are under way then have to end.
    /// In seconds, at most 3600. Default: 5.
    pub limit_secs: u16,
}

impl Default for Drain {
    fn default() -> Self {
        Self { delay_secs: 0, limit_secs: 5 }
    }
}

impl Drain {
    /// How long what is open may take.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.limit_secs.into())
    }

    /// Finds values that make no sense.
    ///
    /// # Errors
    ///
    /// Naming the key at fault.
    pub fn validate(&self) -> Result<(), String> {
        for (key, secs) in [("delay_secs", self.delay_secs), ("limit_secs", self.limit_secs)] {
            if secs > SECS_MAX {
                return Err(format!("drain.{key}: at most {SECS_MAX}"));
            }
        }
        Ok(())
    }
}

/// A daemon's way from serving to its end. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    announced: CancellationToken,
    stopped: CancellationToken,
}

impl Ending {
    /// Whether it was announced: `/readyz` is 503 from then on.
    pub fn is_announced(&self) -> bool {
        self.announced.is_cancelled()
    }

    /// Resolves when nothing new is to be taken any more.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.stopped.clone().cancelled_owned()
    }

    /// Announces the end, waits as long as `drain` says, has the listeners
    /// close, and waits for `served`, which ends when all that was open has; at
    /// most for `drain.limit_secs` and a moment in which what is left is closed.
    pub async fn run(&self, drain: Drain, served: impl Future<Output = ()>) {
        /// What the parts take to close what did not end by itself.
        const CLOSING: Duration = Duration::from_secs(3);
        self.announced.cancel();
        tracing::info!("shutting down");
        sleep(Duration::from_secs(drain.delay_secs.into())).await;
        self.stopped.cancel();
        if timeout(drain.limit() + CLOSING, served).await.is_err() {
            tracing::info!("closing what is still open");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_announced_before_anything_closes_and_has_an_end() {
        let ending = Ending::default();
        let drain = Drain { delay_secs: 7, limit_secs: 5 };
        let began = tokio::time::Instant::now();
        let seen = ending.clone();
        let watch = tokio::spawn(async move {
            seen.stopped().await;
            (seen.is_announced(), began.elapsed())
        });
        assert!(!ending.is_announced());
        // What never ends by itself.
        ending.run(drain, std::future::pending()).await;
        assert_eq!(watch.await.unwrap(), (true, Duration::from_secs(7)));
        assert_eq!(began.elapsed(), Duration::from_secs(7 + 5 + 3));
    }

    #[test]
    fn times_have_a_largest_value() {
        assert!(
            Drain { delay_secs: 3601, ..Drain::default() }.validate().unwrap_err().contains("delay_secs")
        );
        assert!(
            Drain { limit_secs: 3601, ..Drain::default() }.validate().unwrap_err().contains("limit_secs")
        );
        Drain::default().validate().unwrap();
    }
}
