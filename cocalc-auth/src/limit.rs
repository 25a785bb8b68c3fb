//! Rate limits: the generic cell rate algorithm, in bounded memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// How much is allowed: `burst` at once, and one more every `interval`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Quota {
    /// The time that one unit takes to come back.
    pub interval: Duration,
    /// How many may come at once; at least 1.
    pub burst: u32,
}

impl Quota {
    /// `rate` per second, `burst` at once. A rate of 0 counts as 1.
    pub fn per_second(rate: u32, burst: u32) -> Self {
        Self { interval: Duration::from_secs(1) / rate.max(1), burst: burst.max(1) }
    }
}

/// Limits many keys by one quota.
///
/// Only keys that have used some of their burst take memory. At the limit the
/// key that will be fully recovered first is forgotten, so that strangers,
/// however many, lock nobody out.
///
/// The other side of it: who keeps `limit` keys owing more than another key
/// does, has that one forgotten at each of its turns, and it is not limited
/// meanwhile. That takes `limit` units per [`Quota::interval`], for as long as
/// it lasts. Choose `limit` so that this is more than can arrive, or limit by
/// something else as well; a slow quota needs it most.
pub struct Gcra<K> {
    quota: Quota,
    limit: usize,
    /// When each key will be fully recovered (the theoretical arrival time).
    recovered: BTreeMap<K, Duration>,
    order: BTreeSet<(Duration, K)>,
}

impl<K: Clone + Ord> Gcra<K> {
    /// A limiter that remembers at most `limit` keys.
    pub fn new(quota: Quota, limit: usize) -> Self {
        Self { quota, limit: limit.max(1), recovered: BTreeMap::new(), order: BTreeSet::new() }
    }

    /// Takes one unit for `key` at boot time `now`.
    ///
    /// # Errors
    ///
    /// How long to wait, when there is none.
    pub fn take(&mut self, key: &K, now: Duration) -> Result<(), Duration> {
        self.take_many(key, 1, now)
    }

    /// Takes `units`, for instance bytes, all or none. More than the burst is
    /// granted only when the key is fully recovered, so that it is never
    /// refused for ever.
    ///
    /// # Errors
    ///
    /// How long to wait, when there are not as many.
    pub fn take_many(&mut self, key: &K, units: u32, now: Duration) -> Result<(), Duration> {
        let start = self.recovered.get(key).copied().unwrap_or(now).max(now);
        let cost = self.quota.interval.saturating_mul(units);
        let burst = self.quota.interval.saturating_mul(self.quota.burst).max(cost);
        let end = start.saturating_add(cost);
        let allowed_from = end.saturating_sub(burst);
        if allowed_from > now {
            return Err(allowed_from - now);
        }
        self.forget_recovered(now);
        self.set(key, end);
        Ok(())
    }

    /// Whether there is a unit for `key`, without taking it.
    ///
    /// # Errors
    ///
    /// How long to wait, when there is none.
    pub fn peek(&self, key: &K, now: Duration) -> Result<(), Duration> {
        let Some(end) = self.recovered.get(key) else { return Ok(()) };
        let rest = self.quota.interval.saturating_mul(self.quota.burst.saturating_sub(1));
        match end.saturating_sub(rest).checked_sub(now) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => Ok(()),
        }
    }

    /// How many keys take memory.
    pub fn len(&self) -> usize {
        self.recovered.len()
    }

    /// Whether no key takes memory.
    pub fn is_empty(&self) -> bool {
        self.recovered.is_empty()
    }

    fn set(&mut self, key: &K, end: Duration) {
        if let Some(old) = self.recovered.insert(key.clone(), end) {
            self.order.remove(&(old, key.clone()));
        }
        self.order.insert((end, key.clone()));
        while self.recovered.len() > self.limit {
            let Some((_, first)) = self.order.pop_first() else { return };
            self.recovered.remove(&first);
        }
    }

    /// Two at a time, so that the work of one call is bounded and the map still
    /// shrinks.
    fn forget_recovered(&mut self, now: Duration) {
        for _ in 0..2 {
            match self.order.first() {
                Some((end, _)) if *end <= now => {
                    if let Some((_, key)) = self.order.pop_first() {
                        self.recovered.remove(&key);
                    }
                }
                _ => return,
            }
        }
    }
}

impl<K> fmt::Debug for Gcra<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gcra").field("quota", &self.quota).field("limit", &self.limit).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_then_the_rate() {
        let mut limit = Gcra::new(Quota::per_second(1, 3), 10);
        let start = SECOND * 100;
        for _ in 0..3 {
            assert_eq!(limit.take(&"a", start), Ok(()));
        }
        assert_eq!((limit.peek(&"a", start), limit.peek(&"b", start)), (Err(SECOND), Ok(())));
        assert_eq!(limit.take(&"a", start), Err(SECOND));
        assert_eq!(limit.take(&"b", start), Ok(()), "keys do not share");
        assert_eq!(limit.take(&"a", start + SECOND), Ok(()));
        assert_eq!(limit.take(&"a", start + SECOND), Err(SECOND));
    }

    #[test]
    fn a_wait_that_was_told_is_enough() {
        let mut limit = Gcra::new(Quota::per_second(10, 5), 10);
        let now = SECOND;
        while limit.take(&1, now).is_ok() {}
        let wait = limit.take(&1, now).unwrap_err();
        assert!(limit.take(&1, now + wait - Duration::from_nanos(1)).is_err());
        assert!(limit.take(&1, now + wait).is_ok());
        // More than the burst waits for full recovery, and is then granted.
        let wait = limit.take_many(&1, 50, now + wait).map_err(|more| wait + more).unwrap_err();
        assert!(limit.take_many(&1, 50, now + wait).is_ok());
    }

    /// The price of memory that is bounded without locking anybody out, as the
    /// documentation states it.
    #[test]
    fn a_full_memory_forgets_who_owes_least_and_refuses_no_stranger() {
        let mut limit = Gcra::new(Quota::per_second(1, 3), 64);
        for other in 1..=64 {
            limit.take_many(&other, 3, SECOND).unwrap();
        }
        for _ in 0..100 {
            assert_eq!(limit.take(&0, SECOND), Ok(()));
        }
        assert!(limit.take(&64, SECOND).is_err(), "who owes more is not forgotten for it");
        // Once one of the others has recovered, there is room for its name.
        let later = SECOND * 5;
        let granted = (0..100).filter(|_| limit.take(&0, later).is_ok()).count();
        assert_eq!((granted, limit.len() <= 64), (3, true));
    }

    proptest! {
        /// Whatever comes: never more than the quota in any window, and memory
        /// within its bound.
        #[test]
        fn never_more_than_the_quota(steps in prop::collection::vec((0u8..4, 0u64..700), 1..200)) {
            let mut limit = Gcra::new(Quota::per_second(2, 3), 4);
            let mut now = Duration::ZERO;
            let mut granted: Vec<Vec<Duration>> = vec![Vec::new(); 4];
            for (key, wait) in steps {
                now += Duration::from_millis(wait);
                if limit.take(&key, now).is_ok() {
                    granted[usize::from(key)].push(now);
                }
                prop_assert!(limit.len() <= 4 && limit.order.len() == limit.len());
            }
            for times in granted {
                for (first, from) in times.iter().enumerate() {
                    for (last, until) in times.iter().enumerate().skip(first) {
                        let allowed = 3 + (*until - *from).as_millis() / 500;
                        prop_assert!((last - first + 1) as u128 <= allowed);
                    }
                }
            }
        }

        #[test]
        fn memory_is_bounded_by_the_limit(keys in prop::collection::vec(any::<u16>(), 0..500)) {
            let mut limit = Gcra::new(Quota::per_second(1, 2), 16);
            for key in keys {
                let _ = limit.take(&key, SECOND);
                prop_assert!(limit.len() <= 16);
            }
        }
    }
}
