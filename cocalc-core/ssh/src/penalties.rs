//! Addresses that only ever fail.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

/// From here on an address is barred.
const BARRED: Duration = Duration::from_secs(15);
/// The longest that one is barred for.
const MOST: Duration = Duration::from_secs(600);
/// How many addresses are remembered.
const ADDRESSES_MAX: usize = 65_536;

/// How a connection that did not log in ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Offence {
    /// A credential was refused.
    Refused,
    /// It left, or spoke something else, before it showed any.
    Left,
    /// It did nothing until its time was over.
    Idle,
}

impl Offence {
    /// As OpenSSH's `PerSourcePenalties`.
    fn weight(self) -> Duration {
        Duration::from_secs(match self {
            Self::Refused => 5,
            Self::Left => 1,
            Self::Idle => 20,
        })
    }
}

/// What each address owes, which time pays off. Who owes much is barred until
/// it is paid.
#[derive(Debug, Default)]
pub(crate) struct Penalties {
    paid_at: HashMap<IpAddr, Instant>,
}

impl Penalties {
    /// Notes an offence of `address`.
    pub(crate) fn note(&mut self, address: IpAddr, offence: Offence, now: Instant) {
        if self.paid_at.len() >= ADDRESSES_MAX && !self.paid_at.contains_key(&address) {
            self.paid_at.retain(|_, at| *at > now);
            // Who owes least goes, if all of them still owe.
            if self.paid_at.len() >= ADDRESSES_MAX {
                let least = self.paid_at.iter().min_by_key(|(_, at)| **at).map(|(address, _)| *address);
                least.map(|address| self.paid_at.remove(&address));
            }
        }
        let at = self.paid_at.entry(address).or_insert(now);
        *at = ((*at).max(now) + offence.weight()).min(now + MOST);
    }

    /// Forgets what `address` owes: it has logged in.
    pub(crate) fn forgive(&mut self, address: IpAddr) {
        self.paid_at.remove(&address);
    }

    /// Whether `address` is barred.
    pub(crate) fn bars(&self, address: IpAddr, now: Instant) -> bool {
        self.paid_at.get(&address).is_some_and(|at| at.saturating_duration_since(now) >= BARRED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn who_fails_again_and_again_is_barred_for_a_while() {
        let (mut penalties, start) = (Penalties::default(), Instant::now());
        let after = |secs| start + Duration::from_secs(secs);
        for _ in 0..2 {
            penalties.note(address(1), Offence::Refused, start);
        }
        assert!(!penalties.bars(address(1), start), "mistakes are human");
        penalties.note(address(1), Offence::Refused, start);
        assert!(penalties.bars(address(1), start) && !penalties.bars(address(2), start));
        assert!(!penalties.bars(address(1), after(1)));
        for _ in 0..10_000 {
            penalties.note(address(1), Offence::Refused, after(1));
        }
        assert!(penalties.bars(address(1), after(500)));
        assert!(!penalties.bars(address(1), after(601)), "there is an end to it");
        penalties.note(address(3), Offence::Idle, start);
        assert!(penalties.bars(address(3), start));
        penalties.forgive(address(3));
        assert!(!penalties.bars(address(3), start));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut penalties, now) = (Penalties::default(), Instant::now());
        for _ in 0..10 {
            penalties.note(address(0), Offence::Idle, now);
        }
        for n in 1..ADDRESSES_MAX as u32 + 100 {
            penalties.note(address(n), Offence::Left, now);
        }
        assert_eq!(penalties.paid_at.len(), ADDRESSES_MAX);
        assert!(penalties.bars(address(0), now), "who owes most is not forgotten for who owes least");
    }
}
