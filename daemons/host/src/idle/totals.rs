//! What all projects together have used, for the host's metrics.

use cocalc_core::runner::Stats;

/// Of all projects of this host since its daemon was started. What they used
/// between their start and the first look is not in it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Totals {
    /// Projects that are looked at now, that is those that run.
    pub(crate) running: u64,
    /// What they have of memory, and of processes and threads, at their last looks.
    pub(crate) memory_bytes: u64,
    pub(crate) pids: u64,
    /// These only grow.
    pub(crate) used: Used,
}

/// What was used between looks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Used {
    pub(crate) cpu_micros: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) oom_kills: u64,
}

impl Used {
    /// What a project has used between two looks at one run of it.
    pub(crate) fn add(&mut self, then: &Stats, now: &Stats) {
        let more = |sum: &mut u64, then: u64, now: u64| *sum = sum.saturating_add(now.saturating_sub(then));
        more(&mut self.cpu_micros, then.cpu_micros, now.cpu_micros);
        more(&mut self.read_bytes, then.read_bytes, now.read_bytes);
        more(&mut self.written_bytes, then.written_bytes, now.written_bytes);
        more(&mut self.received_bytes, then.received_bytes, now.received_bytes);
        more(&mut self.sent_bytes, then.sent_bytes, now.sent_bytes);
        more(&mut self.oom_kills, then.oom_kills, now.oom_kills);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_grow_and_a_counter_that_begins_anew_takes_nothing_back() {
        let stats = |cpu_micros, oom_kills| Stats { cpu_micros, oom_kills, ..Stats::default() };
        let mut used = Used::default();
        used.add(&stats(5, 0), &stats(12, 1));
        used.add(&stats(12, 1), &stats(3, 0));
        used.add(&stats(3, 0), &stats(4, 0));
        assert_eq!(used, Used { cpu_micros: 8, oom_kills: 1, ..Used::default() });
    }
}
