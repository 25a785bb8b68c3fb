//! Storage on loopback Btrfs, without a federation: snapshots and clones
//! against the `btrfs` program, streams against its pipe and rsync, and what a
//! start asks of a volume with many projects.

mod projects;
mod snapshots;
mod streams;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use cocalc_storage::{Btrfs, loopback::Loopback};

use crate::{Effort, Result, table::Table, tool::run};

pub(crate) const LIMIT: Duration = Duration::from_secs(300);
/// Of each volume; the files are sparse.
const VOLUME_BYTES: u64 = 12 << 30;

pub(crate) fn measure(dir: &Path, effort: Effort, table: &mut Table) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    std::fs::create_dir_all(dir)?;
    for (name, part) in [
        (
            "snapshots",
            snapshots::measure as fn(&Path, Effort, &mut Table, &tokio::runtime::Runtime) -> Result<()>,
        ),
        ("streams", streams::measure),
        ("projects", projects::measure),
    ] {
        part(dir, effort, table, &runtime).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

/// A volume of ours that goes with the value.
pub(crate) struct Volume {
    image: PathBuf,
    loopback: Option<Loopback>,
}

impl Volume {
    pub(crate) fn make(dir: &Path, name: &str) -> Result<Self> {
        let image = dir.join(format!("bench-{name}.img"));
        // Of a run that was killed.
        cocalc_storage::loopback::release(&image)?;
        let _ = std::fs::remove_file(&image);
        let loopback = Loopback::create(&image, VOLUME_BYTES, &dir.join(format!("bench-{name}")))?;
        Btrfs::initialize(loopback.path())?;
        Ok(Self { image, loopback: Some(loopback) })
    }

    pub(crate) fn path(&self) -> Result<&Path> {
        Ok(self.loopback.as_ref().ok_or("it is not mounted")?.path())
    }

    /// Waits until nothing is being written or freed.
    pub(crate) fn settle(&self) -> Result<()> {
        let path = self.path()?;
        run(Command::new("btrfs").args(["filesystem", "sync"]).arg(path), LIMIT)?;
        // What is being freed may take longer; then it is in the ranges.
        let _ = run(Command::new("timeout").args(["60", "btrfs", "subvolume", "sync"]).arg(path), LIMIT);
        Ok(())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let mount_point = self.loopback.as_ref().map(|loopback| loopback.path().to_owned());
        drop(self.loopback.take());
        let _ = std::fs::remove_file(&self.image);
        if let Some(mount_point) = mount_point {
            let _ = std::fs::remove_dir(mount_point);
        }
    }
}

/// `btrfs subvolume delete`, of what a peer made.
fn delete(path: &Path) -> Result<()> {
    run(Command::new("btrfs").args(["-q", "subvolume", "delete"]).arg(path), LIMIT).map(drop)
}

/// Bytes that no compression helps with, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
