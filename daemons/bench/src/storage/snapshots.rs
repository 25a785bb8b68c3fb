//! Snapshots and clones with some, many and very many present.

use std::{path::Path, process::Command, time::Instant};

use cocalc_core::{
    ids::ProjectId,
    storage::{CloneOptions, Storage, VolumeOptions},
};
use cocalc_storage::Btrfs;
use tokio::runtime::Runtime;

use super::{LIMIT, Volume, delete, noise};
use crate::{
    Effort, Result,
    table::{Better, Table, quantile},
    tool::run,
};

const MILLIS: (&str, Better) = ("ms", Better::Less);

pub(super) fn measure(dir: &Path, effort: Effort, table: &mut Table, runtime: &Runtime) -> Result<()> {
    let volume = Volume::make(dir, "snapshots")?;
    let store = runtime.block_on(Btrfs::open(volume.path()?))?;
    let project = ProjectId::random();
    let live = runtime.block_on(store.create(project, &VolumeOptions::default()))?;
    let live = live.path.ok_or("a volume without a path")?;
    for n in 0..100_u64 {
        std::fs::write(live.join(format!("file-{n}")), noise(n, 16 << 10))?;
    }
    let raw = volume.path()?.join("bench-raw");
    let mut present = 0;
    for wanted in effort.snapshots {
        while present < *wanted {
            dirty(&live, present)?;
            let name = format!("kept-{present}").parse()?;
            runtime.block_on(store.snapshot(project, &name))?;
            present += 1;
        }
        volume.settle()?;
        let [mut ours, mut peers, mut clones, mut copies] = [const { Vec::new() }; 4];
        for n in 0..effort.snapshot_runs {
            let name = "measured".parse()?;
            dirty(&live, n)?;
            ours.push(time(|| Ok(runtime.block_on(store.snapshot(project, &name)).map(drop)?))?);
            runtime.block_on(store.delete_snapshot(project, &name))?;
            dirty(&live, n)?;
            let mut command = Command::new("btrfs");
            command.args(["-q", "subvolume", "snapshot", "-r"]).arg(&live).arg(&raw);
            peers.push(time(|| run(&mut command, LIMIT).map(drop))?);
            delete(&raw)?;

            let (source, target) = ("kept-0".parse()?, ProjectId::random());
            let options = CloneOptions { same_owner: true, ..CloneOptions::default() };
            clones.push(time(|| {
                Ok(runtime.block_on(store.clone_volume(project, &source, target, &options)).map(drop)?)
            })?);
            runtime.block_on(store.delete(target))?;
            let mut command = Command::new("btrfs");
            let from = volume.path()?.join("snapshots").join(project.to_string()).join("kept-0");
            command.args(["-q", "subvolume", "snapshot"]).arg(from).arg(&raw);
            copies.push(time(|| run(&mut command, LIMIT).map(drop))?);
            delete(&raw)?;
        }
        for (what, peer, ours, peers) in [
            ("snapshot", "btrfs subvolume snapshot -r", &ours, &peers),
            ("clone", "btrfs subvolume snapshot", &clones, &copies),
        ] {
            table.add(format!("{what}, {wanted} present, p50"), peer, MILLIS, ours, peers);
            table.note(format!(
                "{what}, {wanted} present, p99: {:.1} ms against {:.1} ms",
                quantile(ours, 0.99),
                quantile(peers, 0.99)
            ));
        }
    }
    Ok(())
}

/// Something to be written before a snapshot is of one moment.
fn dirty(live: &Path, n: u32) -> Result<()> {
    Ok(std::fs::write(live.join("changing"), noise(u64::from(n), 64 << 10))?)
}

/// How long something takes, in milliseconds.
fn time(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}
