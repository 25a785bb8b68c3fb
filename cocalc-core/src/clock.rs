//! Wall and boot time, injected.

use std::{fmt, sync::Arc, time::Duration};

pub use cocalc_ids::Timestamp;

/// Tells the time. Everything that decides by time takes it from here or as an
/// argument, so that tests and simulations own it.
///
/// # Contract
///
/// `boot` never goes back, and counts while the machine sleeps; `wall` may
/// jump either way.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The wall clock.
    fn wall(&self) -> Timestamp;

    /// Time since the machine booted, suspend included (CLOCK_BOOTTIME).
    fn boot(&self) -> Duration;
}

impl<T: Clock + ?Sized> Clock for Arc<T> {
    fn wall(&self) -> Timestamp {
        (**self).wall()
    }

    fn boot(&self) -> Duration {
        (**self).boot()
    }
}

/// The clocks of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> Timestamp {
        Timestamp::now()
    }

    fn boot(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
    }
}
