//! How long to wait before something that failed is tried again.

use std::time::Duration;

/// The first pause, and the longest.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);
/// What ran for so long was no failed try.
const STEADY: Duration = Duration::from_secs(60);
/// From how many failures in a row on it is a loop.
const LOOP: u32 = 3;

/// Doubles the pause with every failure in a row. Times are of the boot clock.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Backoff {
    failures: u32,
    until: Duration,
}

impl Backoff {
    /// It has failed at `now`, after it had run for `ran`.
    pub fn failed(&mut self, ran: Duration, now: Duration) {
        if ran >= STEADY {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        let doublings = (self.failures - 1).min(16);
        self.until = now.saturating_add((FIRST * (1 << doublings)).min(LONGEST));
    }

    /// It goes well, or somebody wants it tried at once.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// How long to wait, if one has to.
    pub fn wait(&self, now: Duration) -> Option<Duration> {
        (self.until > now).then(|| self.until - now)
    }

    /// How often it has failed in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether it fails again and again.
    pub fn is_loop(&self) -> bool {
        self.failures >= LOOP
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pauses_double_up_to_five_minutes_and_a_steady_run_begins_anew() {
        let mut backoff = Backoff::default();
        let now = Duration::from_secs(1000);
        assert_eq!(backoff.wait(now), None);
        let mut pauses = Vec::new();
        for _ in 0..11 {
            backoff.failed(Duration::ZERO, now);
            pauses.push(backoff.wait(now).unwrap().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert!(backoff.is_loop());
        backoff.failed(STEADY, now);
        assert_eq!((backoff.failures(), backoff.wait(now)), (1, Some(FIRST)));
        backoff.reset();
        assert_eq!(backoff.wait(now), None);
    }

    proptest! {
        #[test]
        fn a_loop_takes_a_bounded_number_of_tries(ran in prop::collection::vec(0_u64..59_000, 1..50)) {
            let (mut backoff, mut now) = (Backoff::default(), Duration::ZERO);
            let mut tries = 0;
            for ran in ran {
                now += backoff.wait(now).unwrap_or_default();
                now += Duration::from_millis(ran);
                backoff.failed(Duration::from_millis(ran), now);
                tries += 1;
                // Nine tries in the first ten minutes, then one in five.
                prop_assert!(tries <= 10 + now.as_secs() / 300);
                prop_assert!(backoff.wait(now).is_some());
            }
        }
    }
}
