//! What projects may use: the defaults, and what may be asked for.

use cocalc_core::{
    ids::ProjectId,
    runner::{Error, LimitKind, Limits, Result},
};
use rustix::process::Resource;

use crate::{cgroup, probe};

/// Below these nothing starts reliably.
const MEMORY_MIN: u64 = 64 << 20;
const CPU_MILLIS_MIN: u64 = 50;
const PIDS_MIN: u64 = 32;
const NOFILE_MIN: u64 = 256;
const FILES_MIN: u64 = 1 << 20;
const LOG_MIN: u64 = 64 << 10;
const LOG_MAX: u64 = 1 << 30;
const SWAP_MAX: u64 = 1 << 44;
const WEIGHT_MAX: u64 = 10_000;

/// The default is a quarter of the machine's memory, but no less than this.
const DEFAULT_MEMORY_MIN: u64 = 512 << 20;
const DEFAULT_PIDS: u32 = 4096;
const DEFAULT_NOFILE: u32 = 8192;
const DEFAULT_SHM: u64 = 64 << 20;
/// The size of a log, by default.
pub(crate) const DEFAULT_LOG: u64 = 1 << 20;

/// What to do with a project that asks for a limit which this machine can't
/// enforce.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Unenforceable {
    /// Refuse it: it does not start.
    #[default]
    Refuse,
    /// Start it without that limit.
    Accept,
}

/// How much there is of everything.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    memory_bytes: u64,
    cpu_millis: u32,
    pids: u32,
    nofile: u32,
    /// What the kernel can't limit.
    unenforced: Vec<LimitKind>,
    unenforceable: Unenforceable,
}

impl Machine {
    /// Asks the kernel.
    pub(crate) fn find(unenforceable: Unenforceable) -> Self {
        let kib = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("MemTotal:")?.split(' ').rev().nth(1)?.parse().ok())
        });
        let pids = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            memory_bytes: kib.map_or(u64::MAX, |kib: u64| kib.saturating_mul(1024)),
            cpu_millis: u32::try_from(cores).unwrap_or(u32::MAX).saturating_mul(1000),
            pids: pids.and_then(|pids| pids.trim().parse().ok()).unwrap_or(32_768),
            nofile: rustix::process::getrlimit(Resource::Nofile)
                .maximum
                .map_or(1 << 20, |hard| u32::try_from(hard).unwrap_or(u32::MAX)),
            unenforced: cgroup::unenforced(),
            unenforceable,
        }
    }

    /// What can't be limited here.
    pub(crate) fn unenforced(&self) -> &[LimitKind] {
        &self.unenforced
    }

    fn enforces(&self, kind: LimitKind) -> bool {
        !self.unenforced.contains(&kind)
    }

    /// What a project has that asks for nothing.
    pub(crate) fn defaults(&self) -> Limits {
        let memory = (self.memory_bytes / 4).max(DEFAULT_MEMORY_MIN).min(self.memory_bytes);
        Limits {
            memory_bytes: Some(memory),
            swap_bytes: Some(0),
            cpu_millis: Some(self.cpu_millis),
            cpu_weight: Some(100),
            pids: Some(DEFAULT_PIDS.min(self.pids)),
            nofile: Some(DEFAULT_NOFILE.min(self.nofile)),
            io_weight: Some(100),
            tmp_bytes: None,
            shm_bytes: Some(DEFAULT_SHM),
            log_bytes: Some(DEFAULT_LOG),
        }
    }

    /// The least and the most of a limit, and its unit.
    fn range(&self, kind: LimitKind) -> (u64, u64, &'static str) {
        match kind {
            LimitKind::Memory => (MEMORY_MIN, self.memory_bytes, "bytes of memory"),
            LimitKind::Swap => (0, SWAP_MAX, "bytes of swap"),
            LimitKind::Cpu => (CPU_MILLIS_MIN, self.cpu_millis.into(), "thousandths of a core"),
            LimitKind::CpuWeight => (1, WEIGHT_MAX, "as CPU weight"),
            LimitKind::Pids => (PIDS_MIN, self.pids.into(), "processes"),
            LimitKind::Nofile => (NOFILE_MIN, self.nofile.into(), "open files"),
            LimitKind::IoWeight => (1, WEIGHT_MAX, "as I/O weight"),
            LimitKind::Tmp => (FILES_MIN, self.memory_bytes, "bytes in /tmp"),
            LimitKind::Shm => (FILES_MIN, self.memory_bytes, "bytes in /dev/shm"),
            LimitKind::Log => (LOG_MIN, LOG_MAX, "bytes of log"),
            _ => (0, u64::MAX, "of something"),
        }
    }

    /// Checks what a project asks for, and fills the rest from `defaults`.
    /// What can't be enforced is left out: podman would refuse it.
    pub(crate) fn settle(&self, project: ProjectId, asked: &Limits, defaults: &Limits) -> Result<Limits> {
        let invalid = |reason: String| Err(Error::Invalid { project, reason });
        for kind in asked.asked() {
            let (least, most, unit) = self.range(kind);
            let value = asked.of(kind).unwrap_or_default();
            if value < least {
                return invalid(format!(
                    "its limit of {value} {unit} is below the least that works, {least}"
                ));
            }
            if value > most {
                return invalid(format!("its limit of {value} {unit} is more than this host has, {most}"));
            }
            if !self.enforces(kind) && self.unenforceable == Unenforceable::Refuse {
                let (why, _) = probe::unenforced_because(kind);
                return invalid(format!(
                    "this host can't enforce its limit of {value} {unit} ({kind}): {why}; \
                     leave it out, or let the host accept it (unenforceable_limits)"
                ));
            }
        }
        let mut settled = asked.or(defaults);
        let keep = |kind| self.enforces(kind);
        settled.memory_bytes = settled.memory_bytes.filter(|_| keep(LimitKind::Memory));
        settled.swap_bytes = settled.swap_bytes.filter(|_| keep(LimitKind::Swap));
        settled.cpu_millis = settled.cpu_millis.filter(|_| keep(LimitKind::Cpu));
        settled.cpu_weight = settled.cpu_weight.filter(|_| keep(LimitKind::CpuWeight));
        settled.pids = settled.pids.filter(|_| keep(LimitKind::Pids));
        settled.io_weight = settled.io_weight.filter(|_| keep(LimitKind::IoWeight));
        Ok(settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            memory_bytes: 8 << 30,
            cpu_millis: 4000,
            pids: 32_768,
            nofile: 65_536,
            unenforced: Vec::new(),
            unenforceable: Unenforceable::Refuse,
        }
    }

    #[test]
    fn defaults_follow_the_machine() {
        let limits = machine().defaults();
        assert_eq!((limits.memory_bytes, limits.cpu_millis), (Some(2 << 30), Some(4000)));
        assert_eq!((limits.pids, limits.nofile), (Some(4096), Some(8192)));
        let small = Machine { memory_bytes: 1 << 30, nofile: 1024, ..machine() }.defaults();
        assert_eq!((small.memory_bytes, small.nofile), (Some(512 << 20), Some(1024)));
        assert!(Machine::find(Unenforceable::Refuse).memory_bytes < u64::MAX);
    }

    #[test]
    fn what_is_asked_for_is_between_a_minimum_and_the_machine() {
        let project = ProjectId::random();
        let none = Limits::default();
        let settle = |asked: &Limits| machine().settle(project, asked, &machine().defaults());
        assert_eq!(settle(&none).unwrap(), machine().defaults());
        let least = Limits {
            memory_bytes: Some(64 << 20),
            cpu_millis: Some(50),
            cpu_weight: Some(1),
            pids: Some(32),
            nofile: Some(256),
            tmp_bytes: Some(1 << 20),
            ..none.clone()
        };
        assert_eq!(settle(&least).unwrap(), least.or(&machine().defaults()));
        for wrong in [
            Limits { memory_bytes: Some((64 << 20) - 1), ..none.clone() },
            Limits { memory_bytes: Some((8 << 30) + 1), ..none.clone() },
            Limits { swap_bytes: Some(u64::MAX), ..none.clone() },
            Limits { cpu_millis: Some(0), ..none.clone() },
            Limits { cpu_millis: Some(4001), ..none.clone() },
            Limits { cpu_weight: Some(0), ..none.clone() },
            Limits { cpu_weight: Some(10_001), ..none.clone() },
            Limits { io_weight: Some(0), ..none.clone() },
            Limits { pids: Some(31), ..none.clone() },
            Limits { pids: Some(32_769), ..none.clone() },
            Limits { nofile: Some(255), ..none.clone() },
            Limits { nofile: Some(65_537), ..none.clone() },
            Limits { tmp_bytes: Some(1), ..none.clone() },
            Limits { shm_bytes: Some(9 << 30), ..none.clone() },
            Limits { log_bytes: Some(1), ..none.clone() },
        ] {
            assert!(matches!(settle(&wrong), Err(Error::Invalid { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn what_cannot_be_enforced_is_refused_or_left_out_as_configured() {
        let project = ProjectId::random();
        let lacking = Machine { unenforced: vec![LimitKind::IoWeight, LimitKind::Memory], ..machine() };
        let asked = Limits { io_weight: Some(50), ..Limits::default() };
        let refused = lacking.settle(project, &asked, &lacking.defaults());
        let Err(Error::Invalid { reason, .. }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("I/O weight") && reason.contains("unenforceable_limits"), "{reason}");
        let nothing = lacking.settle(project, &Limits::default(), &lacking.defaults()).unwrap();
        assert_eq!((nothing.io_weight, nothing.memory_bytes), (None, None), "defaults are no demand");
        let accepting = Machine { unenforceable: Unenforceable::Accept, ..lacking };
        let settled = accepting.settle(project, &asked, &accepting.defaults()).unwrap();
        assert_eq!(settled.io_weight, None);
    }
}
