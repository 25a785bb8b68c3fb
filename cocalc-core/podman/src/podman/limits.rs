//! What projects may use: the defaults, and what may be asked for.

use cocalc_core::{
    ids::ProjectId,
    runner::{Error, Limits, Result},
};
use rustix::process::Resource;

/// Below these nothing starts reliably.
const MEMORY_MIN: u64 = 64 << 20;
const CPU_MILLIS_MIN: u32 = 50;
const PIDS_MIN: u32 = 32;
const NOFILE_MIN: u32 = 256;

/// The default is a quarter of the machine's memory, but no less than this.
const DEFAULT_MEMORY_MIN: u64 = 512 << 20;
const DEFAULT_PIDS: u32 = 4096;
const DEFAULT_NOFILE: u32 = 8192;

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    memory_bytes: u64,
    cpu_millis: u32,
    pids: u32,
    nofile: u32,
    /// Whether the kernel can limit memory and CPU.
    groups: bool,
}

impl Machine {
    /// Asks the kernel.
    pub(crate) fn find() -> Self {
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
            groups: !crate::probe::limits_missing(),
        }
    }

    /// What a project has that asks for nothing.
    pub(crate) fn defaults(&self) -> Limits {
        let memory = (self.memory_bytes / 4).max(DEFAULT_MEMORY_MIN).min(self.memory_bytes);
        Limits {
            // podman refuses limits that the kernel can't keep.
            memory_bytes: self.groups.then_some(memory),
            cpu_millis: self.groups.then_some(self.cpu_millis),
            pids: Some(DEFAULT_PIDS.min(self.pids)),
            nofile: Some(DEFAULT_NOFILE.min(self.nofile)),
        }
    }

    /// Checks what a project asks for, and fills the rest from `defaults`.
    pub(crate) fn settle(&self, project: ProjectId, asked: &Limits, defaults: &Limits) -> Result<Limits> {
        let Limits { memory_bytes, cpu_millis, pids, nofile } = asked;
        let check = |what: &str, asked: Option<u64>, least: u64, most: u64| match asked {
            Some(asked) if asked < least => Err(Error::Invalid {
                project,
                reason: format!("its limit of {asked} {what} is below the least that works, {least}"),
            }),
            Some(asked) if asked > most => Err(Error::Invalid {
                project,
                reason: format!("its limit of {asked} {what} is more than this host has, {most}"),
            }),
            _ => Ok(()),
        };
        check("bytes of memory", *memory_bytes, MEMORY_MIN, self.memory_bytes)?;
        check(
            "thousandths of a core",
            cpu_millis.map(u64::from),
            CPU_MILLIS_MIN.into(),
            self.cpu_millis.into(),
        )?;
        check("processes", pids.map(u64::from), PIDS_MIN.into(), self.pids.into())?;
        check("open files", nofile.map(u64::from), NOFILE_MIN.into(), self.nofile.into())?;
        Ok(Limits {
            memory_bytes: memory_bytes.or(defaults.memory_bytes),
            cpu_millis: cpu_millis.or(defaults.cpu_millis),
            pids: pids.or(defaults.pids),
            nofile: nofile.or(defaults.nofile),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine =
        Machine { memory_bytes: 8 << 30, cpu_millis: 4000, pids: 32_768, nofile: 65_536, groups: true };

    #[test]
    fn defaults_follow_the_machine() {
        let limits = MACHINE.defaults();
        let expected = Limits {
            memory_bytes: Some(2 << 30),
            cpu_millis: Some(4000),
            pids: Some(4096),
            nofile: Some(8192),
        };
        assert_eq!(limits, expected);
        let small = Machine { memory_bytes: 1 << 30, nofile: 1024, ..MACHINE }.defaults();
        assert_eq!((small.memory_bytes, small.nofile), (Some(512 << 20), Some(1024)));
        let unlimited = Machine { groups: false, ..MACHINE }.defaults();
        assert_eq!((unlimited.memory_bytes, unlimited.cpu_millis), (None, None));
        assert!(Machine::find().memory_bytes < u64::MAX);
    }

    #[test]
    fn what_is_asked_for_is_between_a_minimum_and_the_machine() {
        let project = ProjectId::random();
        let none = Limits::default();
        let settle = |asked: &Limits| MACHINE.settle(project, asked, &MACHINE.defaults());
        assert_eq!(settle(&none).unwrap(), MACHINE.defaults());
        let least =
            Limits { memory_bytes: Some(64 << 20), cpu_millis: Some(50), pids: Some(32), nofile: Some(256) };
        assert_eq!(settle(&least).unwrap(), least);
        for wrong in [
            Limits { memory_bytes: Some((64 << 20) - 1), ..none.clone() },
            Limits { memory_bytes: Some((8 << 30) + 1), ..none.clone() },
            Limits { cpu_millis: Some(0), ..none.clone() },
            Limits { cpu_millis: Some(4001), ..none.clone() },
            Limits { pids: Some(31), ..none.clone() },
            Limits { pids: Some(32_769), ..none.clone() },
            Limits { nofile: Some(255), ..none.clone() },
            Limits { nofile: Some(65_537), ..none.clone() },
        ] {
            assert!(matches!(settle(&wrong), Err(Error::Invalid { .. })), "{wrong:?}");
        }
    }
}
