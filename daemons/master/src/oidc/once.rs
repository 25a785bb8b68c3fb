//! Secrets that are good once, for a while, and not more than so many.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use crate::secret;

/// Values under secrets: each is taken once, within a time. When there are too
/// many the oldest goes.
#[derive(Debug)]
pub(super) struct Once<T> {
    max: usize,
    life: Duration,
    values: HashMap<[u8; 32], T>,
    /// In the order in which they were put there; those that were taken, too,
    /// until their time is over.
    order: VecDeque<([u8; 32], Duration)>,
}

impl<T> Once<T> {
    pub(super) fn new(max: usize, life: Duration) -> Self {
        Self { max, life, values: HashMap::new(), order: VecDeque::new() }
    }

    /// Keeps `value` for who comes with `secret`.
    pub(super) fn put(&mut self, secret: &str, value: T, now: Duration) {
        self.forget(now);
        while self.order.len() >= self.max {
            self.forget_oldest();
        }
        let key = secret::hash(secret);
        self.values.insert(key, value);
        self.order.push_back((key, now));
    }

    /// What is kept under `secret`, which is worth nothing afterwards.
    pub(super) fn take(&mut self, secret: &str, now: Duration) -> Option<T> {
        self.forget(now);
        self.values.remove(&secret::hash(secret))
    }

    fn forget(&mut self, now: Duration) {
        while self.order.front().is_some_and(|(_, since)| now.saturating_sub(*since) >= self.life) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((key, _)) = self.order.pop_front() {
            self.values.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn a_secret_is_good_once_for_a_while_and_memory_is_bounded() {
        let mut once = Once::new(3, at(10));
        once.put("a", 1, at(0));
        once.put("b", 2, at(5));
        assert_eq!((once.take("a", at(9)), once.take("a", at(9))), (Some(1), None));
        assert_eq!(once.take("b", at(15)), None, "too late");
        for n in 0..100 {
            once.put(&n.to_string(), n, at(20));
            assert!(once.values.len() <= 3 && once.order.len() <= 3);
        }
        assert_eq!((once.take("96", at(20)), once.take("97", at(20))), (None, Some(97)));
        once.put("late", 7, at(40));
        assert_eq!((once.values.len(), once.order.len()), (1, 1));
    }
}
