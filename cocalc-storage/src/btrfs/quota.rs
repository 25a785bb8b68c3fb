//! One quota group of level 1 per project, over its live volume, snapshots and
//! staging. Simple quotas charge an extent to the subvolume that wrote it
//! first, so a limit on the live subvolume alone would mean nothing after a
//! restore or a move.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

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
    /// Classic groups, which get slow with snapshots; not used.
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
    let id = sys::filesystem_id(fd).doing("find the file system's id")?;
    let id = cocalc_core::ids::VolumeUuid::from_bytes(id);
    Ok(Path::new("/sys/fs/btrfs").join(id.to_string()).join("qgroups"))
}

/// What is enabled now.
pub(super) fn kind(fd: impl AsFd) -> Result<QuotaKind, Failure> {
    Ok(match fs::read_to_string(sysfs(fd)?.join("mode")) {
        Ok(mode) if mode.trim() == "squota" => QuotaKind::Simple,
        Ok(_) => QuotaKind::Classic,
        Err(_) => QuotaKind::Off,
    })
}

impl Quotas {
    /// Uses simple quotas, enabling them if none are on. `Err` is the weakness
    /// for people, when they can't be had.
    pub(super) fn open(root: impl AsFd) -> Result<Self, String> {
        let root = root.as_fd();
        let chain = |failure: Failure| cocalc_core::chain(&failure);
        match kind(root).map_err(chain)? {
            QuotaKind::Simple => {}
            QuotaKind::Classic => {
                return Err(
                    "no quotas: classic quota groups are enabled, which are too slow with snapshots; \
                            run `btrfs quota disable`"
                        .to_owned(),
                );
            }
            QuotaKind::Off => sys::enable_simple_quotas(root)
                .map_err(|error| format!("no quotas: this kernel has no simple quotas ({error})"))?,
        }
        Ok(Self { directory: sysfs(root).map_err(chain)? })
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
