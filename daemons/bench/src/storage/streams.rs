//! A project of many files, whole and as a delta of one in a hundred, from one
//! volume to another.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::Btrfs;
use tokio::runtime::Runtime;

use super::{LIMIT, Volume, delete, noise};
use crate::{
    Effort, Result,
    table::{Better, Table},
    tool::run,
};

const SECS: (&str, Better) = ("s", Better::Less);
/// How many files are in a directory.
const FAN: u32 = 200;

struct Pair<'a> {
    runtime: &'a Runtime,
    from: (Volume, Btrfs),
    to: (Volume, Btrfs),
    project: ProjectId,
}

pub(super) fn measure(dir: &Path, effort: Effort, table: &mut Table, runtime: &Runtime) -> Result<()> {
    let open = |name: &str| -> Result<(Volume, Btrfs)> {
        let volume = Volume::make(dir, name)?;
        let store = runtime.block_on(Btrfs::open(volume.path()?))?;
        Ok((volume, store))
    };
    let pair = Pair { runtime, from: open("from")?, to: open("to")?, project: ProjectId::random() };
    let created = runtime.block_on(pair.from.1.create(pair.project, &VolumeOptions::default()))?;
    let live = created.path.ok_or("a volume without a path")?;
    let (files, bytes) =
        (effort.stream_files, effort.stream_mib as usize * (1 << 20) / effort.stream_files as usize);
    for n in 0..files {
        let path = file(&live, n);
        if n % FAN == 0 {
            std::fs::create_dir_all(path.parent().ok_or("a file without a directory")?)?;
        }
        std::fs::write(path, noise(u64::from(n), bytes))?;
    }
    let what = format!("{} MiB in {files} files", effort.stream_mib);

    // Whole: by turns, and the copies go.
    let first: SnapshotName = "state-0".parse()?;
    runtime.block_on(pair.from.1.snapshot(pair.project, &first))?;
    let raw = pair.to.0.path()?.join("raw");
    let [mut ours, mut peers] = [const { Vec::new() }; 2];
    for round in 0..effort.runs {
        for turn in 0..2 {
            pair.from.0.settle()?;
            pair.to.0.settle()?;
            if turn == round % 2 {
                ours.push(pair.ours(&first, None)?);
                if round + 1 < effort.runs {
                    runtime.block_on(pair.to.1.delete_snapshot(pair.project, &first))?;
                }
            } else {
                std::fs::create_dir(&raw)?;
                peers.push(pair.pipe(&first, None, &raw)?);
                if round + 1 < effort.runs {
                    delete(&raw.join(first.as_str()))?;
                    std::fs::remove_dir(&raw)?;
                }
            }
        }
    }
    table.add(format!("{what}, whole"), "btrfs send, receive, sync", SECS, &ours, &peers);

    // As a delta to what is there already, at all three.
    let copy = pair.to.0.path()?.join("rsync");
    pair.rsync(&first, &copy)?;
    let [mut ours, mut peers, mut rsyncs] = [const { Vec::new() }; 3];
    let mut base = first;
    for round in 0..effort.runs {
        for n in (0..files).skip(round as usize).step_by(100) {
            std::fs::write(file(&live, n), noise(u64::from(n) + 1_000_003 * u64::from(round + 1), bytes))?;
        }
        let next: SnapshotName = format!("state-{}", round + 1).parse()?;
        runtime.block_on(pair.from.1.snapshot(pair.project, &next))?;
        for turn in 0..3 {
            pair.from.0.settle()?;
            pair.to.0.settle()?;
            match (turn + round) % 3 {
                0 => ours.push(pair.ours(&next, Some(&base))?),
                1 => peers.push(pair.pipe(&next, Some(&base), &raw)?),
                _ => rsyncs.push(pair.rsync(&next, &copy)?),
            }
        }
        base = next;
    }
    table.add(format!("{what}, 1 % changed"), "btrfs send -p, receive, sync", SECS, &ours, &peers);
    table.add(format!("{what}, 1 % changed"), "rsync -a, sync", SECS, &ours, &rsyncs);
    for snapshot in std::fs::read_dir(&raw)? {
        delete(&snapshot?.path())?;
    }
    Ok(())
}

fn file(live: &Path, n: u32) -> PathBuf {
    live.join(format!("home/{}/file-{n}", n / FAN))
}

impl Pair<'_> {
    /// Through our sender and receiver, until it is durable.
    fn ours(&self, name: &SnapshotName, base: Option<&SnapshotName>) -> Result<f64> {
        let (from, to) = (&self.from.1, &self.to.1);
        let options =
            SendOptions { version_max: to.capabilities().stream_version, ..SendOptions::since(base) };
        let begun = Instant::now();
        self.runtime.block_on(async {
            let stream = from.send(self.project, name, &options).await?;
            to.receive(&stream.header, stream.reader).await
        })?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn snapshot_path(&self, name: &SnapshotName) -> Result<PathBuf> {
        Ok(self.from.0.path()?.join("snapshots").join(self.project.to_string()).join(name.as_str()))
    }

    /// Through the programs.
    fn pipe(&self, name: &SnapshotName, base: Option<&SnapshotName>, to: &Path) -> Result<f64> {
        let mut pipe = Command::new("timeout");
        pipe.args(["--kill-after=5", "240", "bash", "-c"])
            .arg("set -o pipefail; btrfs -q send \"${@:2}\" | btrfs -q receive \"$1\" && sync -f \"$1\"")
            .arg("bash")
            .arg(to);
        if let Some(base) = base {
            pipe.arg("-p").arg(self.snapshot_path(base)?);
        }
        pipe.arg(self.snapshot_path(name)?);
        let begun = Instant::now();
        run(&mut pipe, LIMIT)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn rsync(&self, name: &SnapshotName, to: &Path) -> Result<f64> {
        let mut from = self.snapshot_path(name)?.into_os_string();
        from.push("/");
        let begun = Instant::now();
        run(Command::new("rsync").args(["-a", "--delete"]).arg(&from).arg(to), LIMIT)?;
        run(Command::new("sync").arg("-f").arg(to), LIMIT)?;
        Ok(begun.elapsed().as_secs_f64())
    }
}
