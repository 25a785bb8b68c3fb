//! Backups of Btrfs snapshots into a directory, against the `restic` program on
//! the same files and the same disk: the first, one of what has changed, one of
//! what has not, one after a move; restores; a prune; what each takes of the
//! machine, and what a loop of requests beside them notices.

mod data;
mod programs;

use std::path::Path;

use self::{
    data::Data,
    programs::{Ours, Restic, Taken},
};
use crate::{
    Effort, Result,
    beside::Loop,
    table::{Better, Table},
};

const SECS: (&str, Better) = ("s", Better::Less);
const MIB: (&str, Better) = ("MiB", Better::Less);

pub(crate) fn measure(dir: &Path, effort: Effort, table: &mut Table) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    std::fs::create_dir_all(dir)?;
    for (files, mib) in [(effort.stream_files, effort.stream_mib), (1, 2 * effort.stream_mib)] {
        let data = Data::make(dir, &runtime, files, mib)?;
        Comparison { dir, data: &data, effort, runtime: &runtime }.measure(table)?;
    }
    Ok(())
}

struct Comparison<'a> {
    dir: &'a Path,
    data: &'a Data,
    effort: Effort,
    runtime: &'a tokio::runtime::Runtime,
}

/// What one side took, by what was done.
#[derive(Default)]
struct Side {
    first: Vec<Taken>,
    same: Vec<Taken>,
    changed: Vec<Taken>,
    moved: Vec<Taken>,
    restored: Vec<Taken>,
    one_file: Vec<Taken>,
    pruned: Vec<Taken>,
    /// The 99th percentile of the requests beside the first backup.
    p99: Vec<f64>,
}

impl Comparison<'_> {
    fn measure(&self, table: &mut Table) -> Result<()> {
        let (mut ours, mut theirs) = (Side::default(), Side::default());
        let mut alone = Vec::new();
        for round in 0..self.effort.runs {
            self.data.change(self.runtime, round)?;
            let idle = Loop::start()?;
            std::thread::sleep(std::time::Duration::from_secs(u64::from(self.effort.seconds)));
            alone.push(idle.end()?);
            for turn in 0..2 {
                self.data.settle()?;
                if (turn + round) % 2 == 0 {
                    self.ours(&mut ours, table, round)?;
                } else {
                    self.restic(&mut theirs)?;
                }
            }
        }
        let what = &self.data.what;
        for (name, ours, theirs) in [
            ("first backup", &ours.first, &theirs.first),
            ("nothing changed", &ours.same, &theirs.same),
            ("1 % changed", &ours.changed, &theirs.changed),
            ("first after a move", &ours.moved, &theirs.moved),
            ("restore, verified and synced / not verified", &ours.restored, &theirs.restored),
            ("one file restored", &ours.one_file, &theirs.one_file),
            ("prune of a tenth", &ours.pruned, &theirs.pruned),
        ] {
            let of = |side: &[Taken], part: fn(&Taken) -> f64| side.iter().map(part).collect::<Vec<_>>();
            let row = format!("{what}, {name}");
            table.add(&row, "restic", SECS, &of(ours, |took| took.secs), &of(theirs, |took| took.secs));
            if ["first backup", "1 % changed"].contains(&name) || name.starts_with("restore,") {
                let (row, part) = (format!("{row}, processor"), |took: &Taken| took.cpu_secs);
                table.add(row, "restic", SECS, &of(ours, part), &of(theirs, part));
                let (row, part) = (format!("{what}, {name}, peak memory"), |took: &Taken| took.peak_mib);
                table.add(row, "restic", MIB, &of(ours, part), &of(theirs, part));
            }
        }
        let unit = ("µs", Better::Less);
        table.add(
            format!("{what}, p99 of requests beside the first backup"),
            "restic",
            unit,
            &ours.p99,
            &theirs.p99,
        );
        table.add(
            format!("{what}, p99 of requests beside the first backup"),
            "nothing beside",
            unit,
            &ours.p99,
            &alone,
        );
        Ok(())
    }

    fn ours(&self, side: &mut Side, table: &mut Table, round: u32) -> Result<()> {
        let ours = Ours::new(self.dir, self.runtime)?;
        let data = self.data;
        let beside = Loop::start()?;
        let (first, took) = ours.back_up(&data.before, None, false)?;
        side.p99.push(beside.end()?);
        side.first.push(took);
        let (same, took) = ours.back_up(&data.before, Some(&first), false)?;
        side.same.push(took);
        let (changed, took) = ours.back_up(&data.after, Some(&same), false)?;
        side.changed.push(took);
        let target = data.target()?;
        side.restored.push(ours.restore(&changed, None, &target)?);
        let (moved, took) = ours.back_up(&target, Some(&changed), true)?;
        if round == 0 {
            table.note(format!(
                "{}: after a move {} of {} files were read and {} bytes added",
                data.what, moved.files_read, moved.files, moved.added_bytes
            ));
        }
        side.moved.push(took);
        data.remove(&target)?;
        let target = data.target()?;
        side.one_file.push(ours.restore(&changed, Some(&data.one), &target)?);
        data.remove(&target)?;
        side.pruned.push(ours.prune(&[&first, &same])?);
        ours.end()
    }

    fn restic(&self, side: &mut Side) -> Result<()> {
        let data = self.data;
        let restic = Restic::new(self.dir)?;
        let beside = Loop::start()?;
        let took = restic.back_up(&data.before, false)?;
        side.p99.push(beside.end()?);
        side.first.push(took);
        side.same.push(restic.back_up(&data.before, false)?);
        side.changed.push(restic.back_up(&data.after, false)?);
        let target = data.target()?;
        side.restored.push(restic.restore(None, &target)?);
        side.moved.push(restic.back_up(&restic.restored(&target), true)?);
        data.remove(&target)?;
        let target = data.target()?;
        side.one_file.push(restic.restore(Some(&data.one), &target)?);
        data.remove(&target)?;
        side.pruned.push(restic.prune()?);
        restic.end()
    }
}
