//! Addresses whose requests were denied too often wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use cocalc_core::auth::Denial;
use tokio::time::Instant;

/// Addresses that are remembered. At the limit, the one that has least to wait
/// for is forgotten.
const SOURCES_MAX: usize = 16_384;

/// Counts denials by source address: `burst` at once, and one more after each
/// `interval`.
#[derive(Debug)]
pub(crate) struct Failures {
    burst: u32,
    interval: Duration,
    sources: Mutex<Sources>,
}

#[derive(Debug, Default)]
struct Sources {
    /// When all of an address's denials will be forgiven.
    forgiven: BTreeMap<IpAddr, Instant>,
    order: BTreeSet<(Instant, IpAddr)>,
}

impl Failures {
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        Self { burst: burst.max(1), interval, sources: Mutex::default() }
    }

    /// Refuses an address that has to wait, before anything of its request is
    /// looked up or verified.
    pub(crate) fn check(&self, source: Option<IpAddr>, now: Instant) -> Result<(), Denial> {
        let Some(source) = source.map(network) else { return Ok(()) };
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(forgiven) = sources.forgiven.get(&source) else { return Ok(()) };
        let ahead = forgiven.saturating_duration_since(now);
        let allowed = self.interval.saturating_mul(self.burst - 1);
        match ahead.checked_sub(allowed) {
            Some(retry_after) if !retry_after.is_zero() => Err(Denial::RateLimited { retry_after }),
            _ => Ok(()),
        }
    }

    /// Counts a denial. Those of requests that were let in together count no
    /// further than the burst.
    pub(crate) fn count(&self, source: Option<IpAddr>, now: Instant) {
        let Some(source) = source.map(network) else { return };
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        // Two at a time: the work is bounded, and the map still shrinks.
        for _ in 0..2 {
            if sources.order.first().is_some_and(|(forgiven, _)| *forgiven <= now) {
                sources.forget_first();
            }
        }
        let before = sources.forgiven.get(&source).copied();
        let most = now + self.interval.saturating_mul(self.burst);
        let forgiven = (before.unwrap_or(now).max(now) + self.interval).min(most);
        if let Some(before) = before {
            sources.order.remove(&(before, source));
        }
        sources.forgiven.insert(source, forgiven);
        sources.order.insert((forgiven, source));
        if sources.forgiven.len() > SOURCES_MAX {
            sources.forget_first();
        }
    }
}

impl Sources {
    fn forget_first(&mut self) {
        if let Some((_, source)) = self.order.pop_first() {
            self.forgiven.remove(&source);
        }
    }
}

/// What one party controls: an address, or an IPv6 network of a site.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn source(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn a_burst_is_forgiven_one_by_one() {
        let failures = Failures::new(3, SECOND);
        let (one, other) = (source("192.0.2.1"), source("192.0.2.2"));
        let start = Instant::now();
        for _ in 0..10 {
            failures.count(one, start);
            failures.count(None, start);
        }
        let wait = |source, now| failures.check(source, now).err();
        let second = Some(Denial::RateLimited { retry_after: SECOND });
        assert_eq!(wait(one, start), second);
        assert_eq!(wait(source("::ffff:192.0.2.1"), start), second, "the same address");
        assert_eq!((wait(other, start), wait(None, start)), (None, None));
        let later = start + SECOND;
        assert_eq!(wait(one, later), None);
        failures.count(one, later);
        assert_eq!(wait(one, later), second);
        let much_later = later + 3 * SECOND;
        for _ in 0..2 {
            failures.count(one, much_later);
            assert_eq!(wait(one, much_later), None, "all was forgiven");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let failures = Failures::new(2, SECOND);
        let worst = source("2001:db8::1");
        let start = Instant::now();
        failures.count(worst, start);
        failures.count(worst, start);
        for low in 0..20_000_u32 {
            failures.count(Some(IpAddr::from(low.to_be_bytes())), start);
        }
        assert!(failures.check(source("2001:db8::2"), start).is_err(), "a site is one, and kept");
        let len = || {
            let sources = failures.sources.lock().unwrap();
            assert_eq!(sources.forgiven.len(), sources.order.len());
            sources.order.len()
        };
        assert_eq!(len(), SOURCES_MAX);
        for _ in 0..SOURCES_MAX {
            failures.count(worst, start + 10 * SECOND);
        }
        assert_eq!(len(), 1, "what is forgiven is forgotten");
    }
}
