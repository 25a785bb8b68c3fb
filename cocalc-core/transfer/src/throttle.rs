//! How fast snapshots leave this host.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The smallest piece that is sent at once.
const PIECE_BYTES_MIN: usize = 1024;

/// A limit for all streams of a host together, in bytes per second. Clones are
/// one limit, which can be changed at any time.
#[derive(Clone, Debug, Default)]
pub struct Throttle(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// 0: no limit.
    bytes_per_sec: AtomicU64,
    /// When the next piece may go.
    free_at: Mutex<Option<Instant>>,
}

impl Throttle {
    /// Limits what is sent from now on; 0 lifts the limit. Default: none.
    pub fn set(&self, bytes_per_sec: u64) {
        self.0.bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
    }

    /// The limit, in bytes per second; 0 if there is none.
    pub fn bytes_per_sec(&self) -> u64 {
        self.0.bytes_per_sec.load(Ordering::Relaxed)
    }

    /// How much to send at once, so that nobody waits long between pieces.
    pub(crate) fn piece(&self, most: usize) -> usize {
        match self.bytes_per_sec() {
            0 => most,
            rate => usize::try_from(rate / 8).unwrap_or(most).clamp(PIECE_BYTES_MIN, most),
        }
    }

    /// Waits until so many bytes may be sent.
    pub(crate) async fn wait(&self, bytes: usize) {
        let rate = self.bytes_per_sec();
        if rate == 0 || bytes == 0 {
            return;
        }
        let until = {
            let mut free_at = self.0.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let begin = free_at.map_or(now, |at| at.max(now));
            *free_at = Some(begin + Duration::from_secs_f64(bytes as f64 / rate as f64));
            begin
        };
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn streams_share_the_limit_and_it_can_be_changed() {
        let throttle = Throttle::default();
        let began = Instant::now();
        throttle.wait(1 << 30).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "no limit");
        throttle.set(1000);
        assert_eq!(throttle.piece(256 << 10), PIECE_BYTES_MIN);
        let other = throttle.clone();
        for _ in 0..5 {
            tokio::join!(throttle.wait(1000), other.wait(1000));
        }
        throttle.wait(1).await;
        assert_eq!(began.elapsed().as_secs(), 10, "ten pieces of a second each");
        throttle.set(0);
        throttle.wait(1 << 30).await;
        assert_eq!(began.elapsed().as_secs(), 10);
    }
}
