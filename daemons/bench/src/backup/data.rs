//! A project on Btrfs, and two read-only snapshots of it: before and after one
//! file in a hundred, or a hundredth of the one file, has changed.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{Storage as _, VolumeOptions},
};
use cocalc_storage::Btrfs;
use tokio::runtime::Runtime;

use crate::{
    Result,
    storage::{LIMIT, Volume, noise},
    tool::run,
};

/// How many files are in a directory.
const FAN: u32 = 200;
const MIB: usize = 1 << 20;

pub(super) struct Data {
    /// In words.
    pub(super) what: String,
    /// Where a snapshot is mounted while it is backed up: restic knows files by
    /// their full path.
    pub(super) before: PathBuf,
    pub(super) after: PathBuf,
    /// One file, below the root of the project.
    pub(super) one: String,
    volume: Volume,
    store: Btrfs,
    project: ProjectId,
    live: PathBuf,
    files: u32,
    bytes: usize,
}

impl Data {
    pub(super) fn make(dir: &Path, runtime: &Runtime, files: u32, mib: u32) -> Result<Self> {
        let volume = Volume::make(dir, "backup")?;
        let store = runtime.block_on(Btrfs::open(volume.path()?))?;
        let project = ProjectId::random();
        let created = runtime.block_on(store.create(project, &VolumeOptions::default()))?;
        let live = created.path.ok_or("a volume without a path")?;
        let bytes = mib as usize * MIB / files as usize;
        for n in 0..files {
            let path = file(&live, n);
            fs::create_dir_all(path.parent().ok_or("a file without a directory")?)?;
            let mut file = File::create(path)?;
            for (part, begin) in (0..bytes).step_by(MIB).enumerate() {
                file.write_all(&text_or_noise(u64::from(n) + part as u64, MIB.min(bytes - begin)))?;
            }
        }
        let snapshots = volume.path()?.join("snapshots").join(project.to_string());
        Ok(Self {
            what: match files {
                1 => format!("one file of {mib} MiB"),
                _ => format!("{mib} MiB in {files} files"),
            },
            before: snapshots.join("before"),
            after: snapshots.join("after"),
            one: file(Path::new(""), files / 2).display().to_string(),
            volume,
            store,
            project,
            live,
            files,
            bytes,
        })
    }

    /// Takes both snapshots anew, with another hundredth changed in between.
    pub(super) fn change(&self, runtime: &Runtime, round: u32) -> Result<()> {
        let [before, after]: [SnapshotName; 2] = ["before".parse()?, "after".parse()?];
        for name in [&before, &after] {
            runtime.block_on(self.store.delete_snapshot(self.project, name))?;
        }
        runtime.block_on(self.store.snapshot(self.project, &before))?;
        if self.files == 1 {
            let file = File::options().write(true).open(file(&self.live, 0))?;
            let changed = self.bytes / 100;
            let at = (round as usize * changed * 3) % (self.bytes - changed);
            file.write_all_at(&noise(u64::from(round) + 77, changed), at as u64)?;
        } else {
            for n in (0..self.files).skip(round as usize).step_by(100) {
                fs::write(file(&self.live, n), noise(u64::from(n + 1_000_003 * (round + 1)), self.bytes))?;
            }
        }
        runtime.block_on(self.store.snapshot(self.project, &after))?;
        self.settle()
    }

    pub(super) fn settle(&self) -> Result<()> {
        self.volume.settle()
    }

    /// A new directory on the volume.
    pub(super) fn target(&self) -> Result<PathBuf> {
        let target = self.volume.path()?.join("bench-target");
        fs::create_dir(&target)?;
        Ok(target)
    }

    pub(super) fn remove(&self, target: &Path) -> Result<()> {
        fs::remove_dir_all(target)?;
        run(Command::new("sync").arg("-f").arg(self.volume.path()?), LIMIT).map(drop)
    }
}

fn file(live: &Path, n: u32) -> PathBuf {
    live.join(format!("home/{}/file-{n}", n / FAN))
}

/// Every other MiB or file is like text.
fn text_or_noise(seed: u64, length: usize) -> Vec<u8> {
    let noise = noise(seed, length);
    if seed.is_multiple_of(2) {
        return noise;
    }
    noise.into_iter().map(|byte| b"etaoin shrdlu\n.,"[usize::from(byte % 16)]).collect()
}
