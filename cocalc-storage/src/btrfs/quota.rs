//! One quota group of level 1 per project, over its live volume, snapshots and
//! staging. Simple quotas charge an extent to the subvolume that wrote it
//! first, so a limit on the live subvolume alone would mean nothing after a
//! restore or a move.
//!
//! What is charged falls when the kernel has freed something, not when it was
//! deleted: a file that a snapshot has too is charged until both are gone, and
//! what only a deleted snapshot had is, until the kernel's cleaner has run.

use std::{fs, os::fd::AsFd, path::PathBuf};

use cocalc_core::storage::{Usage, UsageSource};

use super::sys::{self, Qgroup};
use crate::failure::{Doing as _, Failure};

/// What kind of quotas a Btrfs file system has enabled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum QuotaKind {
    /// None.
    Off,
    /// Simple quotas, which this crate uses.
    Simple,
    /// Classic groups, which get slow with snapshots; used where asked for.
    Classic,
}

/// The quota groups of one file system.
#[derive(Debug)]
pub(super) struct Quotas {
    /// `/sys/fs/btrfs/<fsid>/qgroups`.
    directory: PathBuf,
}

/// Where the kernel shows the quota groups of this file system.
fn sysfs(fd: impl AsFd) -> Result<PathBuf, Failure> {
    Ok(sys::shown(fd).doing("find the file system's id")?.join("qgroups"))
}

/// What is enabled now.
pub(super) fn kind(fd: impl AsFd) -> Result<QuotaKind, Failure> {
    Ok(match fs::read_to_string(sysfs(fd)?.join("mode")) {
        Ok(mode) if mode.trim() == "squota" => QuotaKind::Simple,
        Ok(mode) if mode.trim() == "disabled" => QuotaKind::Off,
        Ok(_) => QuotaKind::Classic,
        Err(_) => QuotaKind::Off,
    })
}

impl Quotas {
    /// Uses simple quotas, enabling them if none are on; the classic only if
    /// `classic` allows it and there are no others. With it comes a weakness
    /// for people, if there is one. `Err` is why none can be had.
    pub(super) fn open(root: impl AsFd, classic: bool) -> Result<(Self, Option<String>), String> {
        let root = root.as_fd();
        let chain = |failure: Failure| cocalc_core::chain(&failure);
        let used = match kind(root).map_err(chain)? {
            QuotaKind::Classic if !classic => {
                return Err(
                    "no quotas: classic quota groups are enabled, which are too slow with snapshots; \
                            run `btrfs quota disable`"
                        .to_owned(),
                );
            }
            QuotaKind::Off => match (sys::enable_quotas(root, true), classic) {
                (Ok(()), _) => QuotaKind::Simple,
                (Err(error), false) => {
                    return Err(format!("no quotas: this kernel has no simple quotas ({error})"));
                }
                (Err(_), true) => {
                    sys::enable_quotas(root, false)
                        .map_err(|error| format!("no quotas: they could not be enabled ({error})"))?;
                    QuotaKind::Classic
                }
            },
            on => on,
        };
        let weakness = (used == QuotaKind::Classic)
            .then(|| "classic quota groups: slow with many snapshots, and behind by one commit".to_owned());
        Ok((Self { directory: sysfs(root).map_err(chain)? }, weakness))
    }

    /// Makes the group, if it is not there.
    pub(super) fn ensure(&self, root: impl AsFd, group: Qgroup) -> Result<(), Failure> {
        if self.directory.join(group.sysfs_name()).exists() {
            return Ok(());
        }
        sys::create_group(root, group).doing("make the quota group")
    }

    /// What the group is charged, in constant time.
    pub(super) fn usage(&self, group: Qgroup) -> Result<Usage, Failure> {
        let number = |file: &str| -> Result<u64, Failure> {
            let path = self.directory.join(group.sysfs_name()).join(file);
            let text = fs::read_to_string(path).doing("read the quota group")?;
            text.trim().parse().map_err(|_| Failure::Wrong(format!("{file} of the quota group is {text:?}")))
        };
        let limited = number("limit_flags")? & sys::LIMIT_MAX_RFER != 0;
        Ok(Usage {
            charged_bytes: number("referenced")?,
            limit_bytes: if limited { Some(number("max_referenced")?) } else { None },
            source: UsageSource::Quota,
        })
    }
}
