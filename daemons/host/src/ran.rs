//! Which projects are to run here, so that a reboot can be made good.
//!
//! A file for each, written when a project has started and removed when it is
//! stopped or removed by command. Containers do not survive a reboot and these
//! files do: what is noted under another boot, and does not run, comes up again.
//! A project that has ended by itself under the present boot is not brought up.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use cocalc_core::ids::{Epoch, ProjectId};
use serde::{Deserialize, Serialize};

/// What is noted. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Ran(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    boot_id: String,
    /// What is wanted, as far as this process has heard. Files are changed under
    /// the lock, so that the last word is what is on the disk.
    wanted: Mutex<BTreeMap<ProjectId, Note>>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Note {
    epoch: Epoch,
    boot_id: String,
}

impl Ran {
    /// Keeps the notes in `directory`, which exists.
    ///
    /// # Errors
    ///
    /// If it cannot be read. A file that makes no sense is passed over.
    pub(crate) fn open(directory: &Path) -> std::io::Result<Self> {
        let mut wanted = BTreeMap::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let Some(project) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match serde_json::from_slice::<Note>(&std::fs::read(entry.path())?) {
                Ok(note) => drop(wanted.insert(project, note)),
                Err(error) => tracing::warn!(%project, %error, "a note of what ran makes no sense"),
            }
        }
        Ok(Self(Arc::new(Inner {
            directory: directory.to_owned(),
            boot_id: crate::registrar::boot_id(),
            wanted: Mutex::new(wanted),
        })))
    }

    /// It runs, and is to. Reads and writes files.
    fn runs(&self, project: ProjectId, epoch: Epoch) {
        let note = Note { epoch, boot_id: self.0.boot_id.clone() };
        let mut wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.get(&project) == Some(&note) {
            return;
        }
        let written = serde_json::to_vec(&note)
            .map_err(std::io::Error::other)
            .and_then(|text| cocalc_daemon::files::write_atomic(&self.path(project), &text));
        match written {
            Ok(()) => drop(wanted.insert(project, note)),
            // It runs all the same; the next start notes it again.
            Err(error) => tracing::warn!(%project, %error, "a reboot would not bring it back"),
        }
    }

    /// It is not to run. Removes a file.
    fn rests(&self, project: ProjectId) {
        let mut wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        match std::fs::remove_file(self.path(project)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%project, %error, "a reboot may bring it back");
            }
            _ => drop(wanted.remove(&project)),
        }
    }

    /// As [`runs`](Self::runs), apart from the runtime; waits for the disk.
    pub(crate) async fn note(&self, project: ProjectId, epoch: Epoch) {
        let ran = self.clone();
        // A failure is a panic, which was said.
        let _ = tokio::task::spawn_blocking(move || ran.runs(project, epoch)).await;
    }

    /// As [`rests`](Self::rests), apart from the runtime.
    pub(crate) async fn forget(&self, project: ProjectId) {
        let ran = self.clone();
        let _ = tokio::task::spawn_blocking(move || ran.rests(project)).await;
    }

    /// Whether it ran under this grant when the machine went down, and nobody has
    /// stopped or started it since.
    pub(crate) fn cut_off(&self, project: ProjectId, held: Option<Epoch>) -> bool {
        let wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.get(&project).is_some_and(|note| note.boot_id != self.0.boot_id && Some(note.epoch) == held)
    }

    fn path(&self, project: ProjectId) -> PathBuf {
        self.0.directory.join(project.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reboot(directory: &Path, project: ProjectId) {
        let path = directory.join(project.to_string());
        let mut note: Note = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        note.boot_id = "an earlier one".into();
        std::fs::write(path, serde_json::to_vec(&note).unwrap()).unwrap();
    }

    #[test]
    fn only_what_a_reboot_cut_off_comes_back_and_only_under_its_grant() {
        let directory = tempfile::tempdir().unwrap();
        let ran = Ran::open(directory.path()).unwrap();
        let [cut, stopped, moved, ended] = [1, 2, 3, 4].map(|id| ProjectId::from_bytes([id; 16]));
        let epoch = |number: u64| number.to_string().parse::<Epoch>().unwrap();
        for project in [cut, stopped, moved, ended] {
            ran.runs(project, epoch(7));
        }
        ran.rests(stopped);
        for project in [cut, moved] {
            reboot(directory.path(), project);
        }
        std::fs::write(directory.path().join("neither"), "x").unwrap();
        let ran = Ran::open(directory.path()).unwrap();
        assert!(ran.cut_off(cut, Some(epoch(7))));
        assert!(!ran.cut_off(stopped, Some(epoch(7))), "somebody stopped it");
        assert!(!ran.cut_off(moved, Some(epoch(8))) && !ran.cut_off(moved, None), "not its grant");
        assert!(!ran.cut_off(ended, Some(epoch(7))), "it ended by itself in this boot");
        ran.runs(cut, epoch(7));
        assert!(!ran.cut_off(cut, Some(epoch(7))), "it is up");
    }
}
