//! Records on disk, a file for each project that runs.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use cocalc_core::{
    activity::{Record, Saved},
    ids::{ProjectId, Timestamp},
};
use serde::{Deserialize, Serialize};

#[derive(Deserialize, Serialize)]
struct File {
    /// Of which run, and of which boot of this machine.
    started: Option<Timestamp>,
    boot_id: String,
    /// When it was written, on the boot clock.
    boot_ms: u64,
    record: Saved,
}

fn path(directory: &Path, project: ProjectId) -> PathBuf {
    directory.join(format!("{project}.json"))
}

/// What was saved of this run of a project; of another run it means nothing.
pub(super) async fn load(
    directory: &Path,
    project: ProjectId,
    started: Option<Timestamp>,
    now: Duration,
) -> Option<Record> {
    let path = path(directory, project);
    let read = move || {
        let file: File = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let same = file.boot_id == crate::registrar::boot_id() && file.started == started;
        let away = now.saturating_sub(Duration::from_millis(file.boot_ms));
        same.then(|| Record::restore(&file.record, away, now))
    };
    tokio::task::spawn_blocking(read).await.ok().flatten()
}

pub(super) async fn save(
    directory: &Path,
    project: ProjectId,
    started: Option<Timestamp>,
    record: Saved,
    now: Duration,
) -> io::Result<()> {
    let path = path(directory, project);
    let boot_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let file = File { started, boot_id: crate::registrar::boot_id(), boot_ms, record };
    let text = serde_json::to_vec(&file)?;
    let write = move || cocalc_daemon::files::write_atomic(&path, &text);
    tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?
}

pub(super) async fn forget(directory: &Path, project: ProjectId) {
    let path = path(directory, project);
    // What stays behind means nothing to the next run.
    let _ = tokio::task::spawn_blocking(move || std::fs::remove_file(path)).await;
}
