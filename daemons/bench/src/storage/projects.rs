//! What a start asks of a volume, with few projects and with very many.

use std::{path::Path, time::Instant};

use cocalc_core::{
    ids::ProjectId,
    storage::{Storage, VolumeOptions},
};
use cocalc_storage::Btrfs;
use tokio::runtime::Runtime;

use super::Volume;
use crate::{
    Effort, Result,
    table::{Better, Table},
};

/// How many projects the volume has that the other is compared with.
const FEW: u32 = 50;
/// A single query is too short to be timed alone.
const QUERIES: usize = 20;

pub(super) fn measure(dir: &Path, effort: Effort, table: &mut Table, runtime: &Runtime) -> Result<()> {
    let made = |name: &str, count: u32| -> Result<(Volume, Vec<ProjectId>)> {
        let volume = Volume::make(dir, name)?;
        let options = VolumeOptions { limit_bytes: Some(1 << 30) };
        let projects = runtime.block_on(async {
            let store = Btrfs::open(volume.path()?).await?;
            let mut projects = Vec::new();
            for _ in 0..count {
                let project = ProjectId::random();
                store.create(project, &options).await?;
                projects.push(project);
            }
            Ok::<_, crate::Error>(projects)
        })?;
        volume.settle()?;
        Ok((volume, projects))
    };
    let few = made("few", FEW)?;
    let many = made("many", effort.projects)?;
    let mut samples = [const { [const { Vec::new() }; 2] }; 2];
    for round in 0..effort.runs * 5 {
        for turn in 0..2 {
            let which = ((round + turn) % 2) as usize;
            let (volume, projects) = if which == 0 { &few } else { &many };
            let project = projects[round as usize % projects.len()];
            let (opened, asked) = runtime.block_on(async {
                let begun = Instant::now();
                let store = Btrfs::open(volume.path()?).await?;
                store.volume(project).await?;
                store.usage(project).await?;
                let opened = begun.elapsed();
                let begun = Instant::now();
                for _ in 0..QUERIES {
                    store.usage(project).await?;
                }
                Ok::<_, crate::Error>((opened, begun.elapsed()))
            })?;
            samples[0][which].push(opened.as_secs_f64() * 1e3);
            samples[1][which].push(asked.as_secs_f64() * 1e3 / QUERIES as f64);
        }
    }
    for (what, [few, many]) in
        ["open, volume and usage of one project", "usage of one project"].iter().zip(&samples)
    {
        let what = format!("{what}, {} projects", effort.projects);
        table.add(what, format!("the same with {FEW}"), ("ms", Better::Less), many, few);
    }
    Ok(())
}
