//! What a project may use.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a project may use. `None` is the backend's default.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Limits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Swap in bytes, beyond the memory. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_bytes: Option<u64>,
    /// CPU in thousandths of a core.
    pub cpu_millis: Option<u32>,
    /// Its part of the CPU while others want it too, from 1 to 10,000, against
    /// 100 of a project that says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u16>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// Open files per process.
    pub nofile: Option<u32>,
    /// Its part of the disks' time while others want it too, from 1 to 10,000,
    /// against 100 of a project that says nothing. There is no limit of bytes
    /// per second: on Btrfs, one who waits for his turn holds up the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u16>,
    /// The size of `/tmp` in bytes, then in memory and counted as memory.
    /// Default: none, `/tmp` is among its files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tmp_bytes: Option<u64>,
    /// The size of `/dev/shm` in bytes, counted as memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm_bytes: Option<u64>,
    /// The size of its log on the host in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<u64>,
}

/// One of the [`Limits`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LimitKind {
    /// [`Limits::memory_bytes`].
    Memory,
    /// [`Limits::swap_bytes`].
    Swap,
    /// [`Limits::cpu_millis`].
    Cpu,
    /// [`Limits::cpu_weight`].
    CpuWeight,
    /// [`Limits::pids`].
    Pids,
    /// [`Limits::nofile`].
    Nofile,
    /// [`Limits::io_weight`].
    IoWeight,
    /// [`Limits::tmp_bytes`].
    Tmp,
    /// [`Limits::shm_bytes`].
    Shm,
    /// [`Limits::log_bytes`].
    Log,
}

impl LimitKind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Memory,
        Self::Swap,
        Self::Cpu,
        Self::CpuWeight,
        Self::Pids,
        Self::Nofile,
        Self::IoWeight,
        Self::Tmp,
        Self::Shm,
        Self::Log,
    ];
}

impl fmt::Display for LimitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Swap => "swap",
            Self::Cpu => "CPU",
            Self::CpuWeight => "CPU weight",
            Self::Pids => "processes",
            Self::Nofile => "open files",
            Self::IoWeight => "I/O weight",
            Self::Tmp => "the size of /tmp",
            Self::Shm => "the size of /dev/shm",
            Self::Log => "the size of its log",
        })
    }
}

impl Limits {
    /// One of them, as a number of its unit.
    pub fn of(&self, kind: LimitKind) -> Option<u64> {
        match kind {
            LimitKind::Memory => self.memory_bytes,
            LimitKind::Swap => self.swap_bytes,
            LimitKind::Cpu => self.cpu_millis.map(u64::from),
            LimitKind::CpuWeight => self.cpu_weight.map(u64::from),
            LimitKind::Pids => self.pids.map(u64::from),
            LimitKind::Nofile => self.nofile.map(u64::from),
            LimitKind::IoWeight => self.io_weight.map(u64::from),
            LimitKind::Tmp => self.tmp_bytes,
            LimitKind::Shm => self.shm_bytes,
            LimitKind::Log => self.log_bytes,
        }
    }

    /// Those that say something.
    pub fn asked(&self) -> impl Iterator<Item = LimitKind> + '_ {
        LimitKind::ALL.into_iter().filter(|kind| self.of(*kind).is_some())
    }

    /// These, and where they say nothing, `others`.
    #[must_use]
    pub fn or(&self, others: &Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.or(others.memory_bytes),
            swap_bytes: self.swap_bytes.or(others.swap_bytes),
            cpu_millis: self.cpu_millis.or(others.cpu_millis),
            cpu_weight: self.cpu_weight.or(others.cpu_weight),
            pids: self.pids.or(others.pids),
            nofile: self.nofile.or(others.nofile),
            io_weight: self.io_weight.or(others.io_weight),
            tmp_bytes: self.tmp_bytes.or(others.tmp_bytes),
            shm_bytes: self.shm_bytes.or(others.shm_bytes),
            log_bytes: self.log_bytes.or(others.log_bytes),
        }
    }

    /// The first that is above what `most` has for it.
    pub fn above(&self, most: &Self) -> Option<(LimitKind, u64, u64)> {
        LimitKind::ALL.into_iter().find_map(|kind| {
            let (asked, most) = (self.of(kind)?, most.of(kind)?);
            (asked > most).then_some((kind, asked, most))
        })
    }
}

/// What came of a change of limits.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Applied {
    /// What was asked for, and the backend's defaults for the rest.
    pub limits: Limits,
    /// Those that changed and count from the next start only.
    pub later: Vec<LimitKind>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_a_kind() {
        let all = Limits {
            memory_bytes: Some(1),
            swap_bytes: Some(2),
            cpu_millis: Some(3),
            cpu_weight: Some(4),
            pids: Some(5),
            nofile: Some(6),
            io_weight: Some(7),
            tmp_bytes: Some(8),
            shm_bytes: Some(9),
            log_bytes: Some(10),
        };
        let numbers: Vec<u64> = LimitKind::ALL.into_iter().filter_map(|kind| all.of(kind)).collect();
        assert_eq!(numbers, (1..=10).collect::<Vec<_>>());
        assert_eq!(all.asked().count(), 10);
        assert_eq!(Limits::default().or(&all), all);
        assert_eq!(all.above(&all), None);
        let less = Limits { pids: Some(4), ..all.clone() };
        assert_eq!(all.above(&less), Some((LimitKind::Pids, 5, 4)));
        assert_eq!(less.above(&Limits::default()), None, "no maximum is none");
    }

    #[test]
    fn limits_of_earlier_versions_are_read() {
        let text = r#"{"memory_bytes":1,"cpu_millis":null,"pids":2,"nofile":null}"#;
        let limits: Limits = serde_json::from_str(text).unwrap();
        assert_eq!(limits, Limits { memory_bytes: Some(1), pids: Some(2), ..Limits::default() });
        assert_eq!(serde_json::to_string(&limits).unwrap(), text, "and written as they are");
    }
}
