//! A clock that tests set.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_ids::Timestamp;

use crate::clock::Clock;

/// A clock that stands still until it is moved. Clones show the same time.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<Mutex<(Timestamp, Duration)>>);

impl ManualClock {
    /// Starts at `wall`, 1,000 s after boot.
    pub fn new(wall: Timestamp) -> Self {
        Self(Arc::new(Mutex::new((wall, Duration::from_secs(1000)))))
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, by: Duration) {
        let mut now = self.lock();
        now.0 = now.0.plus(by);
        now.1 += by;
    }

    /// Sets the wall clock alone, as an operator or NTP would.
    pub fn jump(&self, wall: Timestamp) {
        self.lock().0 = wall;
    }

    fn lock(&self) -> MutexGuard<'_, (Timestamp, Duration)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Timestamp {
        self.lock().0
    }

    fn boot(&self) -> Duration {
        self.lock().1
    }
}
