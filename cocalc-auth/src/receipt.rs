//! The decision behind a receipt: at whom a revocation is in force.
//!
//! A holder is done with when it has acknowledged a position of its stream that
//! contains the change, or when it can admit nobody any more: it was not heard
//! of for as long as its lease and the longest grace it may know, on its clock,
//! and for the time that it takes to close what has ended.

use std::{collections::BTreeMap, time::Duration};

/// Two clocks are measured against each other over a hold by no more than a part
/// in so many: each may run wrong by 500 millionths, five times what crystals
/// do.
const DRIFT_PART: u32 = 1000;
/// A holder looks each second for what time has ended, and gives connections a
/// second to go.
const CLOSING: Duration = Duration::from_secs(2);

/// A place in a peer's stream: the stream's epoch, and the frame.
pub type Place = (u64, u64);

/// What became of a revocation at one holder.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Settled {
    /// It has applied it, and closed the connections concerned.
    Acknowledged,
    /// It was cut off, and its lease and grace have run out.
    Expired,
}

impl Settled {
    /// As in the database and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Acknowledged => "acknowledged",
            Self::Expired => "expired",
        }
    }
}

/// One revocation, and who holds what it revokes; `P` names a holder. Times are
/// of the boot clock.
#[derive(Clone, Debug)]
pub struct Holding<P> {
    holders: BTreeMap<P, Holder>,
}

impl<P> Default for Holding<P> {
    fn default() -> Self {
        Self { holders: BTreeMap::new() }
    }
}

#[derive(Clone, Copy, Debug)]
struct Holder {
    /// By this place the change is in force.
    after: Place,
    /// The longest lease and grace that it may know.
    hold: Duration,
    /// When the last lease that it can hold began at the latest.
    heard: Duration,
    settled: Option<Settled>,
}

impl<P: Copy + Ord> Holding<P> {
    /// Somebody who holds it.
    pub fn add(&mut self, peer: P, after: Place, hold: Duration, heard: Duration) {
        self.holders.insert(peer, Holder { after, hold, heard, settled: None });
    }

    /// What is known of an earlier process's receipt.
    pub fn settled_before(&mut self, peer: P, settled: Settled) {
        if let Some(holder) = self.holders.get_mut(&peer) {
            holder.settled = Some(settled);
        }
    }

    /// The peer has applied everything up to `place`; whether that settles it.
    pub fn acknowledged(&mut self, peer: P, place: Place) -> bool {
        match self.holders.get_mut(&peer) {
            // An acknowledgement of another life of the stream says nothing.
            Some(holder)
                if holder.settled.is_none() && place.0 == holder.after.0 && place.1 >= holder.after.1 =>
            {
                holder.settled = Some(Settled::Acknowledged);
                true
            }
            _ => false,
        }
    }

    /// The peer was heard of: it may hold a lease that begins now.
    pub fn heard(&mut self, peer: P, now: Duration) {
        if let Some(holder) = self.holders.get_mut(&peer) {
            holder.heard = holder.heard.max(now);
        }
    }

    /// Those whose lease and grace have run out by now.
    pub fn expire(&mut self, now: Duration) -> Vec<P> {
        let mut gone = Vec::new();
        for (peer, holder) in &mut self.holders {
            if holder.settled.is_none() && now >= holder.gone() {
                holder.settled = Some(Settled::Expired);
                gone.push(*peer);
            }
        }
        gone
    }

    /// When somebody's lease and grace run out next, if nothing is heard.
    pub fn next(&self) -> Option<Duration> {
        self.holders.values().filter(|holder| holder.settled.is_none()).map(Holder::gone).min()
    }

    /// Whether it is in force everywhere.
    pub fn is_complete(&self) -> bool {
        self.holders.values().all(|holder| holder.settled.is_some())
    }

    /// Everybody who held it, and what became of it there.
    pub fn holders(&self) -> impl Iterator<Item = (P, Option<Settled>)> + '_ {
        self.holders.iter().map(|(peer, holder)| (*peer, holder.settled))
    }
}

impl Holder {
    fn gone(&self) -> Duration {
        self.heard.saturating_add(self.hold).saturating_add(self.hold / DRIFT_PART).saturating_add(CLOSING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn outcome(holding: &Holding<char>, peer: char) -> Option<Settled> {
        holding.holders().find(|(other, _)| *other == peer).and_then(|(_, settled)| settled)
    }

    #[test]
    fn an_acknowledgement_settles_who_gave_it_and_nobody_else() {
        let (a, b) = ('a', 'b');
        let mut holding = Holding::default();
        holding.add(a, (7, 10), secs(30), secs(100));
        holding.add(b, (7, 3), secs(30), secs(100));
        assert!(!holding.acknowledged(a, (7, 9)), "before the change");
        assert!(!holding.acknowledged(a, (6, 50)), "another life of the stream");
        assert!(!holding.acknowledged(a, (8, 50)), "another life of the stream");
        assert!(holding.acknowledged(a, (7, 12)));
        assert!(!holding.acknowledged(a, (7, 12)), "once");
        assert!(!holding.is_complete());
        assert!(!holding.acknowledged('s', (7, 99)), "a stranger's");
        assert!(holding.acknowledged(b, (7, 3)));
        assert!(holding.is_complete());
        assert_eq!((outcome(&holding, a), holding.next()), (Some(Settled::Acknowledged), None));
    }

    #[test]
    fn who_is_silent_is_waited_for_until_lease_and_grace_are_over() {
        let peer = 'p';
        let mut holding = Holding::default();
        holding.add(peer, (1, 5), secs(1000), secs(100));
        // A second for clocks that differ, and two to close what is open.
        assert_eq!(holding.next(), Some(secs(1103)));
        assert!(holding.expire(secs(1102)).is_empty());
        // It renews its lease without having applied the change.
        holding.heard(peer, secs(140));
        holding.heard(peer, secs(120));
        assert!(holding.expire(secs(1142)).is_empty(), "a lease of then may still be held");
        assert_eq!(holding.expire(secs(1143)), [peer]);
        assert!(holding.expire(secs(1144)).is_empty(), "once");
        assert_eq!(outcome(&holding, peer), Some(Settled::Expired));
        // What comes late changes nothing that was told.
        assert!(!holding.acknowledged(peer, (1, 9)));
        assert_eq!(outcome(&holding, peer), Some(Settled::Expired));
    }

    #[test]
    fn no_holder_is_complete_at_once() {
        assert!(Holding::<char>::default().is_complete());
        let peer = 'p';
        let mut holding = Holding::default();
        holding.add(peer, (1, 1), secs(1), secs(0));
        holding.settled_before(peer, Settled::Acknowledged);
        assert!(holding.is_complete() && holding.expire(secs(9)).is_empty());
    }
}
