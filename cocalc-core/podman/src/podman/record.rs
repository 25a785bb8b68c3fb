//! What is noted of projects that run, for a daemon that finds a podman that hangs.
//!
//! One file for each, where a reboot takes them, as it takes what runs: written before
//! podman is told to start it, completed when it runs, and removed when it is stopped.

use std::{
    io,
    path::{Path, PathBuf},
};

use cocalc_core::{
    ids::{Epoch, ProjectId, Timestamp},
    runner::Limits,
};
use serde::{Deserialize, Serialize};

use super::cli::Container;

/// The notes of a runner.
#[derive(Debug)]
pub(super) struct Records {
    directory: PathBuf,
    /// Whether whatever may run is noted: not so after an update from a version
    /// that took no notes.
    complete: bool,
}

/// A project that runs, or is being started.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Record {
    pub(super) epoch: Epoch,
    pub(super) slot: u32,
    pub(super) limits: Limits,
    pub(super) made_from: Option<String>,
    /// `None` until podman has started it.
    pub(super) run: Option<Run>,
}

/// Its first process.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Run {
    /// The container's id.
    pub(super) container: String,
    pub(super) pid: i32,
    pub(super) started: Option<Timestamp>,
}

impl Records {
    /// The notes in a directory, which is made later if it is not there.
    pub(super) fn find(directory: PathBuf) -> Self {
        let complete = directory.is_dir();
        Self { directory, complete }
    }

    fn path(&self, project: ProjectId) -> PathBuf {
        self.directory.join(format!("{project}.json"))
    }

    /// Notes a project. Not synced: what it tells of does not outlive the kernel.
    pub(super) fn write(&self, project: ProjectId, record: &Record) -> io::Result<()> {
        super::builder::write_file(&self.path(project), &serde_json::to_vec(record)?, 0o600)
    }

    /// It does not run any more.
    pub(super) fn forget(&self, project: ProjectId) {
        match std::fs::remove_file(self.path(project)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // Its process is not found either, by whoever reads it.
                tracing::warn!(%project, %error, "the note that it runs stays");
            }
            _ => {}
        }
    }

    /// The first process that a container has or had, if it was not stopped.
    pub(super) fn run_of(&self, project: ProjectId, container: &Container) -> Option<Run> {
        let (_, Record { run, .. }) = read(&self.path(project))?;
        run.filter(|run| run.container == container.id)
    }

    /// Where they are.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether it is noted that a project runs, as this process.
    pub(super) fn tells(&self, project: ProjectId, pid: i32) -> bool {
        read(&self.path(project)).and_then(|(_, record)| record.run).is_some_and(|run| run.pid == pid)
    }

    /// Whether it may run for all that is noted.
    pub(super) fn may_run(&self, project: ProjectId) -> bool {
        !self.complete || self.path(project).exists()
    }

    /// All notes that make sense.
    pub(super) fn all(&self) -> Vec<(ProjectId, Record)> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return Vec::new() };
        entries.filter_map(|entry| read(&entry.ok()?.path())).collect()
    }
}

fn read(path: &Path) -> Option<(ProjectId, Record)> {
    let project = path.file_name()?.to_str()?.strip_suffix(".json")?.parse().ok()?;
    match serde_json::from_slice(&std::fs::read(path).ok()?) {
        Ok(record) => Some((project, record)),
        Err(error) => {
            // It stays: what it is about may run.
            tracing::warn!(%project, %error, "a note of what runs makes no sense");
            None
        }
    }
}
