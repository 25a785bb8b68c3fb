//! Backing up.

use std::sync::Arc;

use cocalc_backup::protocol::{Failure, FailureKind, Job};
use cocalc_core::backups::{Backup, BackupKind, BackupSource, Phase};
use jiff::{Timestamp, tz::TimeZone};
use rustic_core::{BackupOptions, Excludes, ParentOptions, PathList, SnapshotOptions};

use crate::{
    backend::Backend,
    excludes, fail,
    failure::Failed,
    repository::{self, ROOT},
    root::Root,
    said,
};

pub(crate) fn back_up(job: &Job, backend: &Arc<Backend>, source: &BackupSource) -> Result<Backup, Failed> {
    let invalid = |words: String| Failed::new(FailureKind::Invalid, words);
    if source.project != job.project {
        return Err(invalid("the source is of another project".into()));
    }
    if !source.path.is_absolute() || !source.path.is_dir() {
        return Err(invalid(format!("{} is not a directory", source.path.display())));
    }
    let path = source.path.to_str().ok_or_else(|| invalid("the path of the snapshot is not UTF-8".into()))?;
    said::phase(Phase::Opening);
    let opened = repository::open_or_create(job, backend, Phase::Storing)?;
    let root = Root::of(&source.path)
        .and_then(|mut root| {
            root.excludes.clone_from(&source.excludes);
            Ok(serde_json::to_string(&root)?)
        })
        .map_err(|error| invalid(format!("cannot read {path}: {error}")))?;
    let snapshot = snapshot(source)?.description(root).to_snapshot()?;

    let parents = match &source.parent {
        // One that is gone, or was never ours, is no reason not to back up.
        Some(parent) => {
            let known = repository::find(job, backend, &opened, parent)?;
            known.map(|_| parent.clone()).into_iter().collect()
        }
        None => Vec::new(),
    };
    let parent = ParentOptions::default()
        .force(parents.is_empty())
        .parents(parents)
        // `ignore_inode` does the opposite of what it says in rustic_core 0.13.
        .ignore_ctime(source.moved);
    let options = BackupOptions::default()
        .as_path(std::path::PathBuf::from(ROOT))
        .parent_opts(parent)
        .excludes(Excludes::default().globs(excludes::globs(&source.path, &source.excludes)?));

    fail::point("backup.opened");
    backend.hold_snapshots();
    let opened = opened.to_indexed_ids()?;
    said::phase(Phase::Storing);
    let written = opened.backup(&options, &PathList::from_iter([path]), snapshot)?;
    // Only of a parent that cannot be read may rustic make light: it reads the
    // files instead.
    let missing: Vec<_> = said::warnings()
        .into_iter()
        .filter(|warning| warning.starts_with("ignoring error"))
        .filter(|warning| !warning.starts_with("ignoring error when loading parent"))
        .collect();
    if !missing.is_empty() {
        return Err(Failed(Failure { kind: FailureKind::Incomplete, words: missing }));
    }
    let backup = repository::backup(job.project, &written)
        .ok_or_else(|| Failed::new(FailureKind::Other, "the tags of the backup are not as they were set"))?;
    fail::point("backup.stored");
    backend.release_snapshots(job.repository.shared.then_some(job.project))?;
    Ok(backup)
}

fn snapshot(source: &BackupSource) -> Result<SnapshotOptions, Failed> {
    let taken = Timestamp::from_millisecond(source.taken.millis())
        .map_err(|error| Failed::new(FailureKind::Invalid, error.to_string()))?;
    let kind = match source.kind {
        BackupKind::Scheduled => "scheduled",
        BackupKind::Manual => "manual",
        BackupKind::Stop => "stop",
    };
    Ok(SnapshotOptions::default()
        // Who made it is in the tags: restic groups by host, and a project
        // changes hosts.
        .host(format!("project-{}", source.project))
        .time(taken.to_zoned(TimeZone::UTC))
        .command("cocalc".to_owned())
        .add_tags(&repository::tags(source.project))?
        .add_tags(&format!("host={}", source.host))?
        .add_tags(&format!("epoch={}", source.epoch))?
        .add_tags(&format!("kind={kind}"))?
        .add_tags(&format!("snapshot={}", source.snapshot))?)
}
