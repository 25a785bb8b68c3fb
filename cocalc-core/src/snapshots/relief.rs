//! How many snapshots go when a project is nearly full. Pure.

use std::time::Duration;

use crate::storage::Usage;

/// At so many percent of the limit snapshots begin to go.
const FULL_PERCENT: u128 = 90;
/// How long deleted bytes may take to be given back before more are deleted:
/// the file system does it in the background.
const SETTLE: Duration = Duration::from_secs(10);
/// The most that go at once.
const WAVE_MAX: usize = 16;

/// What is to be done about a project's usage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Need {
    /// It has room.
    Nothing,
    /// It is nearly full; what was deleted may not have come back yet.
    Wait,
    /// So many more should go.
    Delete(usize),
}

/// What was done about one project that is nearly full.
///
/// Deleted bytes come back late, so snapshots go in waves: one, and when that
/// was not enough after a while two, then four. A project is soon relieved of
/// many small ones, and does not lose ten where the first would have done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Relief {
    wave: usize,
    not_before: Option<Duration>,
}

impl Relief {
    /// Whether `usage` is nearly the limit.
    pub fn is_pressing(usage: &Usage) -> bool {
        usage
            .limit_bytes
            .is_some_and(|limit| u128::from(usage.charged_bytes) * 100 >= u128::from(limit) * FULL_PERCENT)
    }

    /// Hears what the project is charged at `now`, on the boot clock.
    pub fn on_usage(&mut self, usage: &Usage, now: Duration) -> Need {
        if !Self::is_pressing(usage) {
            *self = Self::default();
            return Need::Nothing;
        }
        if self.not_before.is_some_and(|at| now < at) {
            return Need::Wait;
        }
        self.wave = (self.wave * 2).clamp(1, WAVE_MAX);
        self.not_before = Some(now + SETTLE);
        Need::Delete(self.wave)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::UsageSource;

    fn usage(charged_bytes: u64) -> Usage {
        Usage { charged_bytes, limit_bytes: Some(100), source: UsageSource::Quota }
    }

    #[test]
    fn snapshots_go_in_waves_until_it_helps() {
        let mut relief = Relief::default();
        let at = Duration::from_secs;
        assert_eq!(relief.on_usage(&usage(89), at(0)), Need::Nothing);
        assert_eq!(relief.on_usage(&usage(90), at(1)), Need::Delete(1));
        assert_eq!(relief.on_usage(&usage(95), at(10)), Need::Wait);
        let waves: Vec<_> = (1..7).map(|n| relief.on_usage(&usage(95), at(1 + n * 10))).collect();
        assert_eq!(waves, [2, 4, 8, 16, 16, 16].map(Need::Delete));
        assert_eq!(relief.on_usage(&usage(80), at(100)), Need::Nothing);
        assert_eq!(relief.on_usage(&usage(90), at(101)), Need::Delete(1), "from the beginning");
    }

    #[test]
    fn without_a_limit_nothing_presses() {
        let free = Usage { limit_bytes: None, ..usage(u64::MAX) };
        assert_eq!(Relief::default().on_usage(&free, Duration::ZERO), Need::Nothing);
        let huge = Usage { limit_bytes: Some(u64::MAX), ..usage(u64::MAX) };
        assert!(Relief::is_pressing(&huge));
    }
}
